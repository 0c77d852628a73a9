"""The conformance kit on an AMD GPU, where there is one."""

from __future__ import annotations

from tokenry.conformance import conformance_tests

test_an_amd_gpu_conforms = conformance_tests("rocm")
