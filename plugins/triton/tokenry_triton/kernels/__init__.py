"""What Triton compiles, and nothing else: no launch, no architecture, no torch."""
