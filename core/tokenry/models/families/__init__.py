"""One small file per family: what its architecture is, as a DecoderPlan."""
