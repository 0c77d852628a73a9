"""What a start would give, before it: buckets and their padding, memory and context."""
