"""Hooks of the CPU backend."""
