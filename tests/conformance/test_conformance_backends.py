"""Every backend of the core and of this machine conforms: three lines each, as in a plugin."""

from tokenry.conformance import conformance_tests

test_cpu = conformance_tests("cpu", steps=100)
test_sim_cuda = conformance_tests("sim-cuda", steps=100)
test_sim_hpu = conformance_tests("sim-hpu", steps=100)
test_sim_neuron = conformance_tests("sim-neuron", steps=100)
test_sim_opaque = conformance_tests("sim-opaque", steps=100)
