"""A stand-in of FlashInfer's package."""
