"""Collected only when it is named: the harness has a venv of its own (`make test-lm-eval`)."""

import sys

if not any("lm_eval" in arg for arg in sys.argv):
    collect_ignore_glob = ["test_*.py"]
