"""The wall between the core and a device, see `contract.py`."""
