"""Triton kernels for the ops of the backend contract, one source for NVIDIA and AMD.

A library, not a backend: `tokenry_triton.ops.triton_ops(arch, options)` gives the ops, the CUDA and
ROCm plugins hand them to the core. kernels/ holds what is compiled, launch.py the launch parameters
of each architecture, the other modules the ops. Importing it needs no device and makes no context.
"""
