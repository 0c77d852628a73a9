"""Opens a device so that a request's bits do not depend on what else runs, where that is asked for.

In: a DeviceRef, the backend's options, whether it must be so. Out: a Backend that claims
`batch_invariant` (the conformance kit tests the claim), or an error; never a backend that does not.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenry.backend.base import Backend
from tokenry.backend.contract import DeviceRef
from tokenry.backend.discovery import open_backend
from tokenry.errors import ConfigError


def open_device(
    device: DeviceRef, options: Mapping[str, str], *, deterministic: bool = False
) -> Backend:
    """The device's backend, in its deterministic mode if it must be and is not so already.

    Raises ConfigError where the backend has no such mode, or the options forbid it; otherwise as
    `open_backend`.
    """
    backend = open_backend(device, options)
    if not deterministic or backend.caps.batch_invariant:
        return backend
    if backend.caps.invariant_option is None:
        raise ConfigError(
            f"--deterministic: on the {device.backend} backend a request's bits depend on the "
            "requests beside it, and it has no mode in which they do not.",
            mend="leave --deterministic out, or --backend cpu",
        )
    key, _, value = backend.caps.invariant_option.partition("=")
    if options.get(key, value) != value:
        raise ConfigError(
            f"--deterministic and --backend-option {key}={options[key]} are opposites.",
            mend=f"leave one of them out; the mode is {backend.caps.invariant_option}",
        )
    backend = open_backend(device, {**options, key: value})
    if not backend.caps.batch_invariant:
        raise ConfigError(
            f"--deterministic: the {device.backend} backend does not claim it with {key}={value}.",
            mend="leave --deterministic out, or --backend cpu",
        )
    return backend
