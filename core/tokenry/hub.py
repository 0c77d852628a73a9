"""Where a model's files lie: a directory, a name that an installed package provides, or an id on
the Hugging Face hub.

In: what the user wrote after `tokenry serve`. Out: a directory with config, tokenizer and weights,
or a `ModelLoadError` that says what was tried. Reads no file of the model, and knows nothing of
tensors.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from pathlib import Path

from tokenry.errors import ModelLoadError

ENTRY_POINTS = "tokenry.models"
"""Entry-point group under which a distribution names its models: `demo = "tokenry_demo:tales_4m"`,
a Path."""

EXTRAS = {"demo": "demo", "demo-draft": "demo"}
"""Models of this project's own packages, and the extra of tokenry that installs them."""

_FILES = (
    "*.json",
    "*.jinja",
    "*.safetensors",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "chat_templates/*",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_model(name: str, revision: str | None = None) -> Path:
    """The directory of the model; a hub id is downloaded (with a progress bar) or taken from the
    hub's cache.

    Raises ModelLoadError that names similar models and the way out.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    provided = _provided()
    # A directory that only happens to have the name of a model (as `demo/` in our own repository)
    # is not meant.
    named = name in provided or name in EXTRAS
    if path.is_dir() and not named:
        return path
    if path.is_file():
        raise ModelLoadError(
            f"{name} is a file; a model is a directory with config.json, tokenizer and "
            "*.safetensors.",
            mend=f"tokenry serve {path.parent}",
        )
    if name in provided:
        return _load_provided(provided[name])
    if name in EXTRAS:
        raise ModelLoadError(
            f"The model {name!r} is not installed.", mend=f'pip install "tokenry[{EXTRAS[name]}]"'
        )
    if _looks_like_path(name) or not _HUB_ID.fullmatch(name):
        raise ModelLoadError(f"There is no directory {name}.", mend=_mend(name, provided))
    return _download(name, revision, _mend(name, provided))


def model_names() -> list[str]:
    """Names that installed packages provide, sorted."""
    return sorted(_provided())


def _provided() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _load_provided(entry: importlib.metadata.EntryPoint) -> Path:
    owner = entry.dist.name if entry.dist is not None else entry.module
    try:
        path = entry.load()
    except Exception as error:  # whatever the package raises, its name belongs into the answer
        raise ModelLoadError(
            f"The package {owner} provides the model {entry.name!r}, but loading "
            f"{entry.value} failed: "
            f"{type(error).__name__}: {error}.",
            mend=f"pip install --force-reinstall {owner}",
        ) from error
    if not isinstance(path, Path) or not path.is_dir():
        raise ModelLoadError(
            f"The package {owner} provides the model {entry.name!r}, but {entry.value} is "
            f"{path!r}, "
            "not the Path of a directory.",
            mend=f"pip install --force-reinstall {owner}",
        )
    return path


def _download(name: str, revision: str | None, mend: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{name} is a gated model on the hub, and this machine is not let in.",
            mend=(
                f"accept its terms at https://huggingface.co/{name}, then `hf auth login` or "
                "set HF_TOKEN"
            ),
        ) from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(
            f"The hub model {name} has no revision {revision!r}.",
            mend="leave --revision away, or name a branch, tag or commit",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"There is no directory {name}, no installed model of that name, and none on the hub "
            "(or it is private and this machine is not logged in).",
            mend=mend,
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"There is no directory {name} and no installed model of that name; as a hub "
            "model it is not in this "
            "machine's cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set).",
            mend=f"{mend}; or go online and unset HF_HUB_OFFLINE",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelLoadError(
            f"Downloading {name} from the hub failed: {type(error).__name__}: {error}.",
            mend=f"try again, or {mend}",
        ) from error


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def _mend(name: str, provided: dict[str, importlib.metadata.EntryPoint]) -> str:
    near = difflib.get_close_matches(name, provided, n=1) + _similar_directories(name)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? Otherwise " if near else ""
    known = f" (installed models: {', '.join(sorted(provided))})" if provided else ""
    return (
        f"{hint}name a directory (`tokenry serve ./dir`), an installed model or a hub id "
        f"(owner/name){known}"
    )


def _similar_directories(name: str) -> list[str]:
    """Up to two directories beside the one that was meant, with nearly its name."""
    path = Path(name).expanduser()
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:  # the parent does not exist or may not be read: nothing to propose
        return []
    return [str(path.parent / near) for near in difflib.get_close_matches(path.name, siblings, n=2)]
