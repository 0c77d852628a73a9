"""Text: tokenizer, chat templates, incremental detokenizer, stop strings, the user's outputs."""
