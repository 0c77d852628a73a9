"""A stand-in for the vendor's `habana_frameworks`, on the simulated device `hpu`; for tests only.

Names and signatures are those that public code calls (vllm-gaudi 091bbadd, optimum-habana 1.21.2)
or that Habana's documentation gives; what is refused follows how they are called there. Numbers are
plain fp32 torch. Nothing here shows what a real Gaudi computes.
"""


def load() -> None:
    """The `torch.backends` entry point: torch calls it at the end of its own import."""
    import habana_frameworks.torch  # noqa: F401
