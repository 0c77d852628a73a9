"""A stand-in of AITER's package."""
