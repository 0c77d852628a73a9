"""A response while it is told: its output items, and the events of its stream in the order that
OpenAI's clients accumulate them.

In: pieces of the chat's answer. Out: events, and the response object as it stands. Every event has
the next sequence number; an item is added, its part is added, its deltas come, and all are closed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tokenry.api.inner import Piece, Telling
from tokenry.api.responses_body import ResponsesRequest, new_item_id
from tokenry.errors import TokenryError

Event = dict[str, Any]


class Teller:
    """One response. `response` is its object as it stands."""

    def __init__(self, wanted: ResponsesRequest, model: str) -> None:
        self.telling = Telling()
        self.response = _head(wanted, model)
        self._sequence = 0
        self._open: dict[str, Any] | None = None
        self._open_call = ("", 0)

    def begin(self) -> list[Event]:
        """Events before the first piece."""
        first = "queued" if self.response["background"] else "in_progress"
        self.response["status"] = first
        events = [self._about("response.created")]
        if first == "queued":
            events.append(self._about("response.queued"))
        self.response["status"] = "in_progress"
        return [*events, self._about("response.in_progress")]

    def take(self, pieces: Sequence[Piece]) -> list[Event]:
        """Events of new pieces."""
        events: list[Event] = []
        for piece in pieces:
            if self._open is None or self._open_call != (piece.kind, piece.call):
                events += self._close("completed")
                events += self._add(piece)
            events += self._delta(piece)
        return events

    def end(self) -> list[Event]:
        """Events after the last piece; the response is completed, or incomplete."""
        cut = self.telling.finish_reason in ("length", "content_filter")
        status = "incomplete" if cut else "completed"
        events = self._close(status)
        self.response["status"] = status
        if cut:
            why = "content_filter"
            if self.telling.finish_reason == "length":
                why = "max_output_tokens"
            self.response["incomplete_details"] = {"reason": why}
        self._finish()
        return [*events, self._about(f"response.{status}")]

    def fail(self, error: TokenryError) -> list[Event]:
        """The response failed."""
        events = self._close("incomplete")
        self.response["status"] = "failed"
        self.response["error"] = {"code": error.code or "server_error", "message": error.message}
        self._finish()
        return [*events, self._about("response.failed")]

    def cancel(self) -> list[Event]:
        """Somebody cancelled it."""
        events = self._close("incomplete")
        self.response["status"] = "cancelled"
        self._finish()
        return events

    def _finish(self) -> None:
        self.response["completed_at"] = int(time.time())
        usage = self.telling.usage
        if usage:
            prompt, details = usage["prompt_tokens"], usage.get("prompt_tokens_details") or {}
            out = usage.get("completion_tokens_details") or {}
            self.response["usage"] = {
                "input_tokens": prompt,
                "input_tokens_details": {
                    "cached_tokens": details.get("cached_tokens", 0),
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": out.get("reasoning_tokens", 0)},
                "total_tokens": usage["total_tokens"],
            }

    def _event(self, kind: str, **more: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **more}
        self._sequence += 1
        return event

    def _about(self, kind: str) -> Event:
        """An event with the response as it stands: a copy, since it goes on."""
        return self._event(kind, response={**self.response, "output": [*self.response["output"]]})

    def _here(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.response["output"]) - 1}

    def _add(self, piece: Piece) -> list[Event]:
        """A new item, and its part."""
        item = _item(piece)
        self._open, self._open_call = item, (piece.kind, piece.call)
        self.response["output"].append(item)
        index = len(self.response["output"]) - 1
        shown = {**item, **({"content": []} if "content" in item else {})}
        events = [self._event("response.output_item.added", output_index=index, item=shown)]
        if piece.kind != "call":
            part = {**item["content"][0]}
            where = {**self._here(), "content_index": 0}
            events.append(self._event("response.content_part.added", **where, part=part))
        return events

    def _delta(self, piece: Piece) -> list[Event]:
        item = self._open
        assert item is not None
        if not piece.text and not piece.logprobs:
            return []
        here = self._here()
        if piece.kind == "call":
            item["arguments"] += piece.text
            kind = "response.function_call_arguments.delta"
            return [self._event(kind, **here, delta=piece.text)]
        part = item["content"][0]
        part["text"] += piece.text
        here["content_index"] = 0
        if piece.kind == "thought":
            return [self._event("response.reasoning_text.delta", **here, delta=piece.text)]
        logprobs = list(piece.logprobs)
        part["logprobs"] += logprobs
        kind = "response.output_text.delta"
        return [self._event(kind, **here, delta=piece.text, logprobs=logprobs)]

    def _close(self, status: str) -> list[Event]:
        """The open item is done."""
        item = self._open
        if item is None:
            return []
        here, events = self._here(), []
        if item["type"] == "function_call":
            kind = "response.function_call_arguments.done"
            done = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._event(kind, **here, **done))
        else:
            part, at = item["content"][0], {**here, "content_index": 0}
            if item["type"] == "reasoning":
                kind = "response.reasoning_text.done"
                events.append(self._event(kind, **at, text=part["text"]))
            else:
                told = {"text": part["text"], "logprobs": part["logprobs"]}
                events.append(self._event("response.output_text.done", **at, **told))
            events.append(self._event("response.content_part.done", **at, part=part))
        item["status"] = status
        done_at = here["output_index"]
        events.append(self._event("response.output_item.done", output_index=done_at, item=item))
        self._open = None
        return events


def _item(piece: Piece) -> dict[str, Any]:
    """An empty output item for the piece."""
    head: dict[str, Any] = {"status": "in_progress"}
    if piece.kind == "call":
        call_id = piece.call_id or new_item_id("call")
        call = {"call_id": call_id, "name": piece.name, "arguments": ""}
        return {"id": new_item_id("fc"), "type": "function_call", **head, **call}
    if piece.kind == "thought":
        part = {"type": "reasoning_text", "text": ""}
        return {
            "id": new_item_id("rs"),
            "type": "reasoning",
            "summary": [],
            "content": [part],
        } | head
    text = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    message = {"type": "message", "role": "assistant", "content": [text]}
    return {"id": new_item_id("msg"), **message, **head}


def _head(wanted: ResponsesRequest, model: str) -> dict[str, Any]:
    """The response object before its first token."""

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return {
        "id": new_item_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(wanted.background),
        "error": None,
        "incomplete_details": None,
        "instructions": wanted.instructions,
        "max_output_tokens": wanted.max_output_tokens,
        "max_tool_calls": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": given(wanted.parallel_tool_calls, True),
        "previous_response_id": wanted.previous_response_id,
        "reasoning": {"effort": (wanted.reasoning or {}).get("effort"), "summary": None},
        "service_tier": "default",
        "store": given(wanted.store, True),
        "temperature": given(wanted.temperature, 1.0),
        "text": given(wanted.text, {"format": {"type": "text"}}),
        "tool_choice": given(wanted.tool_choice, "auto"),
        "tools": given(wanted.tools, []),
        "top_logprobs": given(wanted.top_logprobs, 0),
        "top_p": given(wanted.top_p, 1.0),
        "truncation": "disabled",
        "usage": None,
        "metadata": given(wanted.metadata, {}),
    }
