"""Grammars that bind answers: compiled off the step, one matcher per request; see compiler.py."""
