"""The parts of drawing: a draw's facts, rules that change logits, foreign processors, scores."""
