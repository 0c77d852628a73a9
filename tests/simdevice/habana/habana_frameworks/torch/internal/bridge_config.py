"""Settings of the bridge that public code asks for."""


def get_pt_compile_only_mode() -> bool:
    """Programs are executed as well as compiled."""
    return False
