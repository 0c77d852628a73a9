"""How a step runs: plan -> packed inputs -> program -> sampled token ids."""
