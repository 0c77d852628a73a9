"""The progress bar of a call.

In: outputs as they end. Out: lines on stderr. Knows nothing of the engine.
"""

from __future__ import annotations

import time

from tokenry.outputs import RequestOutput


class Bar:
    """Progress of a call on stderr: finished prompts, and tokens per second in and out."""

    def __init__(self, total: int, *, shown: bool) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, desc="Prompts", unit=" prompt", disable=not shown)
        self._start_s = time.monotonic()
        self._num_in = 0
        self._num_out = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def finished(self, output: RequestOutput) -> None:
        """Count a finished prompt."""
        self._num_in += len(output.prompt_token_ids)
        self._num_out += sum(len(completion.token_ids) for completion in output.outputs)
        seconds = max(time.monotonic() - self._start_s, 1e-9)
        self._bar.set_postfix_str(
            f"in {self._num_in / seconds:.1f} tok/s, out {self._num_out / seconds:.1f} tok/s",
            refresh=False,
        )
        self._bar.update()
