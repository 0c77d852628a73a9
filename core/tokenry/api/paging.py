"""Lists that are asked for page by page, as OpenAI's clients turn them.

In: all items, and the query's `limit`, `order` and `after`. Out: one page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from tokenry.errors import RequestError

QUERY = {
    "limit": {"type": "integer", "minimum": 1},
    "order": {"type": "string", "enum": ["asc", "desc"]},
    "after": {"type": "string"},
}
"""The query's parameters for the OpenAPI document."""


def page(
    request: Request, items: Sequence[dict[str, Any]], *, most: int = 100, usual: int = 20
) -> dict[str, Any]:
    """The list object with the page that the query asks for; `items` are oldest first."""
    query = request.query_params
    text = query.get("limit", str(usual))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= most):
        raise RequestError(f"limit must be 1 to {most}, got {text!r}.", param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be asc or desc, got {order!r}.", param="order")
    ordered = list(items) if order == "asc" else list(reversed(items))
    after = query.get("after")
    if after:
        at = next((i for i, item in enumerate(ordered) if item["id"] == after), None)
        if at is None:
            raise RequestError(f"There is no item {after!r} in this list.", param="after")
        ordered = ordered[at + 1 :]
    shown = ordered[: int(text)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(ordered) > len(shown),
    }
