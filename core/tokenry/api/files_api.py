"""/v1/files: upload, list, get, content, delete.

In: OpenAI's requests. Out: file objects. Files are the input and the output of batches; they live
in the data directory.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from tokenry.api import routes
from tokenry.api.answer import ignored_header
from tokenry.api.caller import caller
from tokenry.api.files_store import FileStore
from tokenry.api.multipart import read_upload
from tokenry.api.owned import shown, visible
from tokenry.api.paging import QUERY, page
from tokenry.api.routes import get, post
from tokenry.api.service import service_of
from tokenry.api.wire import JSON
from tokenry.errors import RequestError


async def upload(request: Request) -> Response:
    """POST /v1/files."""
    store, config = file_store(request), service_of(request).config
    name, path = store.draft()
    try:
        fields, filename = await read_upload(request, path, most=config.max_file_bytes)
        purpose = fields.pop("purpose", None)
        if purpose != "batch":
            raise RequestError(
                f"purpose is {purpose!r}; files are kept for batches only.",
                param="purpose",
                code="unsupported",
                mend="purpose=batch",
            )
        if fields and config.strict_params:
            raise RequestError(f"There is no field {min(fields)!r}.", param=min(fields))
        owner = caller().owner
        found = await asyncio.to_thread(
            store.commit, name, filename=filename, purpose=purpose, owner=owner
        )
    except BaseException:
        store.discard(name)
        raise
    return JSON(shown(found), headers=ignored_header(sorted(fields)))


async def list_files(request: Request) -> Response:
    """GET /v1/files."""
    files, purpose = visible(file_store(request).all()), request.query_params.get("purpose")
    kept = [file for file in files if purpose in (None, file["purpose"])]
    return JSON(page(request, kept, most=10_000, usual=10_000))


async def retrieve(request: Request) -> Response:
    """GET /v1/files/{id}."""
    return JSON(shown(file_store(request).get(request.path_params["id"])))


async def content(request: Request) -> Response:
    """GET /v1/files/{id}/content."""
    store = file_store(request)
    found = store.get(request.path_params["id"])
    path = store.path_of(found["id"])
    return FileResponse(path, media_type="application/octet-stream", filename=found["filename"])


async def delete(request: Request) -> Response:
    """DELETE /v1/files/{id}."""
    store, name = file_store(request), request.path_params["id"]
    store.get(name)
    if request.app.state.batches.uses(name):
        raise RequestError("A batch that has not ended reads this file.", code="file_in_use")
    await asyncio.to_thread(store.delete, name)
    return JSON({"id": name, "object": "file", "deleted": True})


def file_store(request: Request) -> FileStore:
    """The server's files; raises RequestError if it has no directory for them."""
    store: FileStore | None = request.app.state.files
    if store is None:
        raise RequestError(
            "Files and batches are not served: the server has no directory for them.",
            code="unsupported",
            mend="--data-dir DIR on the server",
        )
    return store


_BINARY = {"type": "string", "format": "binary"}
ENDPOINTS = (
    post(
        "/v1/files",
        upload,
        "Upload a file for a batch.",
        form={"file": _BINARY, "purpose": {"type": "string", "enum": ["batch"]}},
    ),
    get(
        "/v1/files", list_files, "The key's files.", query={**QUERY, "purpose": {"type": "string"}}
    ),
    get("/v1/files/{id}", retrieve, "One file."),
    get("/v1/files/{id}/content", content, "Its content.", kind="application/octet-stream"),
    routes.delete("/v1/files/{id}", delete, "Delete a file."),
)
