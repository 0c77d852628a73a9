// One translation unit: the torch headers are read once.
#include "device.cpp"
#include "fallback.cpp"
#include "graph.cpp"
#include "hooks.cpp"

#include "abi.cpp"
