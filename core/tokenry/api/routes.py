"""What a route is: one line in `app.py` gives it a path, a verb, a handler, and its place in the
OpenAPI document.

In: the facts. Out: Starlette's routes. Knows no handler.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Verb = Literal["GET", "POST", "DELETE"]
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One verb of one path.

    about   a line for the OpenAPI document.
    body    the struct that the JSON body must fit; a dict is a JSON schema; None: there is no body.
    kind    the content type of the answer.
    query   names of the parameters in the URL that mean something, each with its JSON schema.
    form    the body is multipart/form-data with these fields, each with its JSON schema.
    refused   fields that the body may not ask with, and why.
    """

    verb: Verb
    path: str
    run: Handler
    about: str
    body: type[Any] | dict[str, Any] | None = None
    kind: str = "application/json"
    query: dict[str, dict[str, Any]] | None = None
    form: dict[str, dict[str, Any]] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


def get(path: str, run: Handler, about: str, **more: Any) -> Endpoint:
    """A GET endpoint."""
    return Endpoint(verb="GET", path=path, run=run, about=about, **more)


def post(path: str, run: Handler, about: str, body: Any = None, **more: Any) -> Endpoint:
    """A POST endpoint; `body` is the struct of its JSON."""
    return Endpoint(verb="POST", path=path, run=run, about=about, body=body, **more)


def delete(path: str, run: Handler, about: str, **more: Any) -> Endpoint:
    """A DELETE endpoint."""
    return Endpoint(verb="DELETE", path=path, run=run, about=about, **more)


def routes_of(endpoints: Iterable[Endpoint]) -> list[Route]:
    """Starlette's routes: one per path, so that a wrong verb's 405 names all that are allowed."""
    by_path: dict[str, dict[str, Handler]] = {}
    for endpoint in endpoints:
        verbs = by_path.setdefault(endpoint.path, {})
        if endpoint.verb in verbs:
            raise ValueError(f"{endpoint.verb} {endpoint.path} has two handlers")
        verbs[endpoint.verb] = endpoint.run
    return [Route(path, _by_verb(verbs), methods=list(verbs)) for path, verbs in by_path.items()]


def _by_verb(verbs: dict[str, Handler]) -> Handler:
    if len(verbs) == 1:
        return next(iter(verbs.values()))

    async def run(request: Request) -> Response:
        return await verbs["GET" if request.method == "HEAD" else request.method](request)

    return run
