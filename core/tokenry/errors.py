"""Every error that tokenry raises on purpose, each with its mend.

In: facts (numbers, names, paths). Out: exceptions whose text says what happened, where, and what to
do about it.
Knows no other room, so every room may import it. An error that reaches an HTTP client carries the
status, type,
parameter and code of OpenAI's error object; an error at start carries an exit code.
"""

from __future__ import annotations

from dataclasses import dataclass


class TokenryError(Exception):
    """What happened, and how to mend it.

    message   one or two sentences with the numbers in them.
    mend      what the reader can do, as a flag, command or sentence; None where nothing can be
              done.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, mend: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return self.message if self.mend is None else f"{self.message}\n  mend: {self.mend}"


# ---- a request is at fault: answered to its sender, 4xx --------------------------------------


class RequestError(TokenryError):
    """The request cannot be served as it stands. `param` is the JSON path of the field, or None."""

    status = 400
    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        mend: str | None = None,
    ) -> None:
        super().__init__(message, mend=mend)
        self.param = param
        if code is not None:
            self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A RequestError as data, so that it crosses rooms and processes and its sender gets all of
    it.
    """

    message: str
    param: str | None = None
    code: str | None = None
    mend: str | None = None
    status: int = 400

    @classmethod
    def of(cls, error: RequestError) -> Refusal:
        """What the error says."""
        return cls(
            message=error.message,
            param=error.param,
            code=error.code,
            mend=error.mend,
            status=error.status,
        )

    def error(self) -> RequestError:
        """The error that says it."""
        error = RequestError(self.message, param=self.param, code=self.code, mend=self.mend)
        error.status = self.status
        return error


class ContextLengthExceeded(RequestError):
    """Prompt (plus requested output) does not fit into the model's context."""

    code = "context_length_exceeded"

    def __init__(
        self, *, max_model_len: int, num_prompt_tokens: int, param: str = "messages"
    ) -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens. "
            f"However, your prompt has {num_prompt_tokens} tokens, and the "
            "answer needs at least one more.",
            param=param,
            mend=f"shorten the prompt to {max_model_len - 1} tokens or fewer",
        )


class ModelNotFound(RequestError):
    """The request names a model that this server does not serve."""

    status = 404
    code = "model_not_found"

    def __init__(self, name: str, served: list[str]) -> None:
        super().__init__(
            f"The model '{name}' does not exist here. Served: {', '.join(served)}.", param="model"
        )


class Overloaded(TokenryError):
    """No capacity now; the client may try again."""

    status = 503
    type = "server_error"
    code = "overloaded"


# ---- the start fails: the command line prints it and exits -----------------------------------


class ConfigError(TokenryError):
    """A flag, variable or configuration file holds a value that cannot be used."""


class NoBackend(TokenryError):
    """No installed backend can run here; the text is the table of what was probed."""


class BackendError(TokenryError):
    """A backend broke the contract or could not open its device."""


class ModelLoadError(TokenryError):
    """Config, tokenizer or weights on disk cannot be loaded; the text names the file."""


class UnknownArchitecture(ModelLoadError):
    """No native model and no fallback for this architecture; the text lists what is known."""


class KVCacheTooSmall(TokenryError):
    """Model fits, but not one request's KV cache beside it; the text has the figures."""


# ---- a device says no (raised by backends, see backend/contract.py) --------------------------


class DeviceOOM(TokenryError):
    """The device has no memory for an allocation; it stays usable."""


class DeviceLost(TokenryError):
    """The device, or this process's hold on it, is beyond use: every later step would fail, too, so
    the engine ends with this as its cause.
    """


class Unsupported(TokenryError):
    """An op or a request parameter that this backend cannot serve; `why` is in the message."""


class UncoveredShape(TokenryError):
    """A static device met a batch that no warmed bucket covers: an error of ours, never a silent
    compile.
    """


# ---- the engine fails ------------------------------------------------------------------------


class EngineDead(TokenryError):
    """The engine process ended; every waiting request is answered with this."""

    status = 503
    code = "engine_dead"


class StepFailed(TokenryError):
    """An exception in a step; the requests of that step fail with it, the engine goes on."""

    code = "step_failed"
