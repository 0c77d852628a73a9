"""Which of the two modes this process runs in."""

import os


def is_lazy() -> bool:
    """Lazy mode, by PT_HPU_LAZY_MODE as it was when torch loaded."""
    return os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"
