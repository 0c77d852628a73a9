"""An upload (multipart/form-data): its file goes to disk as it comes, its fields stay in memory.

In: a request. Out: the fields, and the uploaded file's name. Raises HTTPError (400, 413, 415), and
then nothing is left on disk.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from tokenry.api.disk import room_for
from tokenry.api.errors import HTTPError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 64 * 1024
MAX_PARTS = 32


async def read_upload(request: Request, path: Path, *, most: int) -> tuple[dict[str, str], str]:
    """Write the part `file` to `path`; the other fields by name, and the file's name.

    most   bytes of the whole body.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise HTTPError(
            415,
            "The content type must be multipart/form-data with a boundary.",
            mend="-F purpose=batch -F file=@requests.jsonl",
        )
    try:
        with room_for(path), path.open("wb") as file:
            form = _Form(file)
            parser = MultipartParser(options[b"boundary"], form.callbacks())
            num_bytes = 0
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > most:
                    raise HTTPError(
                        413,
                        f"The upload is larger than {most} bytes.",
                        mend="--max-file-bytes N on the server",
                    )
                await asyncio.to_thread(parser.write, chunk)
            parser.finalize()
            if not form.complete:
                raise HTTPError(400, "The form's last boundary is missing.")
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
    except FormParserError as error:
        raise HTTPError(400, f"The form cannot be read: {error}.") from error
    if form.filename is None:
        raise HTTPError(400, "The form has no part named file with a filename.")
    return form.fields, form.filename


class _Form:
    """What the parser has found so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.complete = False
        self._file = file
        self._header = [b"", b""]
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._value = bytearray()
        self._in_file = False
        self._num_parts = 0

    def callbacks(self) -> MultipartCallbacks:
        """For python_multipart."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._take,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise HTTPError(400, f"The form has more than {MAX_PARTS} parts.")
        self._headers, self._header, self._value = {}, [b"", b""], bytearray()

    def _add(self, i: int, data: bytes) -> None:
        self._header[i] += data
        if len(self._header[i]) > MAX_FIELD_BYTES:
            raise HTTPError(400, f"A part's header is larger than {MAX_FIELD_BYTES} bytes.")

    def _end_header(self) -> None:
        self._headers[self._header[0].lower()] = self._header[1]
        self._header = [b"", b""]

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        self._in_file = self._name == "file" and filename is not None
        if self._in_file:
            if self.filename is not None:
                raise HTTPError(400, "The form has more than one file.")
            assert filename is not None
            self.filename = filename.decode("utf-8", "replace")

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._file.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise HTTPError(
                400, f"The field {self._name!r} is larger than {MAX_FIELD_BYTES} bytes."
            )

    def _end(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _finish(self) -> None:
        self.complete = True
