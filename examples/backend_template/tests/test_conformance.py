from tokenry.conformance import conformance_tests

test_conformance = conformance_tests("acme")
