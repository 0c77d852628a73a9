"""What a model's makers say of drawing: the sampling defaults of generation_config.json.

In: a model's directory and what the config says of it. Out: fields of SamplingParams. As in vLLM
(`--generation-config`): the same six fields, max_new_tokens also as the most that any request gets.
Its end tokens are read in models/config.py, whatever is said here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenry.errors import ModelLoadError
from tokenry.models.config import read_json

FILE = "generation_config.json"
NEUTRAL: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 0,
}
"""Fields that count, and the values that a file writes without meaning them (the defaults of
transformers' GenerationConfig; vLLM leaves them out likewise).
"""


def sampling_defaults(path: Path, choice: str) -> dict[str, int | float]:
    """Fields of SamplingParams that requests get which do not set them; max_tokens is the most that
    any gets. `choice`: auto (the model's file), none, or a directory or file. Raises
    ModelLoadError.
    """
    if choice in ("none", "vllm"):
        return {}
    file = path / FILE if choice == "auto" else Path(choice)
    if file.is_dir():
        file /= FILE
    if not file.exists():
        if choice == "auto":
            return {}
        raise ModelLoadError(
            f"--generation-config {choice}: there is no {file}.",
            mend="auto, none, or a directory that holds the file",
        )
    data = read_json(file)
    found: dict[str, int | float] = {}
    for name, neutral in NEUTRAL.items():
        value = data.get(name)
        if value is None or value == neutral:
            continue
        whole = name in ("top_k", "max_new_tokens")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ModelLoadError(
                f"{file}: {name} is {value!r}, not a number.",
                mend="--generation-config none, or repair the file",
            )
        found["max_tokens" if name == "max_new_tokens" else name] = value
    return found


def told(defaults: Mapping[str, int | float]) -> tuple[str, ...]:
    """One line for the start-up log, none where there is nothing to tell."""
    if not defaults:
        return ()
    values = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
    return (f"{FILE} sets {values} for requests that do not (off: --generation-config none)",)
