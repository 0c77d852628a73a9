"""Models: their config, their weights, and their layers over the seven ops. See `registry.py`."""
