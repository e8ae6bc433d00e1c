"""A request's body to its fields and its audio, which lies in memory or in a file without a name.

The file is unlinked before its first byte is written, so no crash leaves one behind, and nobody's file name is used.
Unusual: a body is refused as soon as it is too large or comes too slowly, whatever its headers promised.
"""

import asyncio
import base64
import binascii
import json
import tempfile
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, BinaryIO, Self

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from arkasr.server.fetch import UrlError, UrlPolicy, fetch
from arkasr.server.openai import Refusal
from arkasr.server.settings import Settings

IN_MEMORY_BYTES = 1 << 20
MAX_JSON_BYTES = 36 << 20  # held in memory; 27 MB of audio in base64
MAX_JSON_VALUES = 10_000  # millions of them would be made while nobody else is served
MAX_FIELDS = 64
MAX_FIELD_BYTES = 64 << 10
FORM_BYTES = 1 << 20  # of boundaries and fields around a file
GRACE_S = 15.0
TOO_LARGE = "file_too_large"


class Upload:
    """What a request brought: fields, and audio until it is closed."""

    def __init__(self, fields: Mapping[str, object], file: BinaryIO, num_bytes: int) -> None:
        self.fields, self._file, self.num_bytes = fields, file, num_bytes

    @property
    def source(self) -> bytes | str:
        """The audio as `audio.stream` takes it."""
        if self.num_bytes > IN_MEMORY_BYTES:
            self._file.flush()  # who opens it by its number does not see what Python holds back
            return f"/dev/fd/{self._file.fileno()}"
        self._file.seek(0)
        return self._file.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        self._file.close()


class _Meter:
    """A request's `receive` that refuses what is too large or too slow."""

    def __init__(self, request: Request, max_bytes: int, min_rate: float) -> None:
        self._receive, self._max_bytes, self._min_rate = request.receive, max_bytes, min_rate
        self._num_bytes = 0
        self._started = time.monotonic()

    async def __call__(self) -> Message:
        left_s = self._started + GRACE_S + self._num_bytes / self._min_rate - time.monotonic()
        try:
            async with asyncio.timeout(max(left_s, 0.001)):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(
                408,
                f"the body comes at less than {self._min_rate:g} bytes a second; send it faster",
                code="upload_too_slow",
                headers={"connection": "close"},
            ) from None
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise _too_large(self._max_bytes)
        return message


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(
        413,
        f"the body has more than the {max_bytes / 1e6:g} MB that this server takes; compress or cut the audio",
        code=TOO_LARGE,
        param="file",
        headers={"connection": "close"},
    )


async def read(request: Request, settings: Settings, urls: UrlPolicy, *, field: str = "file") -> Upload:
    """The fields and audio of a form or of a JSON object; `field` names the audio in a form.

    Raises:
        Refusal: too large, too slow, damaged, of another type, or without audio.
        starlette's ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    limits = {"multipart/form-data": settings.max_upload_bytes + FORM_BYTES, "application/json": MAX_JSON_BYTES}
    if kind not in limits:
        raise Refusal(415, "send multipart/form-data, or application/json", code="unsupported_media_type")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits[kind]:
        raise _too_large(limits[kind])
    metered = Request(request.scope, _Meter(request, limits[kind], settings.min_upload_rate))
    try:
        if kind == "application/json":
            return await _from_json(await metered.body(), settings, urls)
        return await _from_form(metered, settings, field)
    except OSError as error:
        raise Refusal(
            503, f"no room for the upload ({error.strerror})", code="no_room", headers={"retry-after": "60"}
        ) from None


async def _from_form(request: Request, settings: Settings, field: str) -> Upload:
    try:
        form = await request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except HTTPException as error:
        raise Refusal(400, f"not a form: {error.detail}", code="invalid_body") from None
    fields: dict[str, object] = {}
    files: list[UploadFile] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            files.append(value)
            if name != field:
                await form.close()
                raise Refusal(
                    400, f"{name[:200]}: unexpected file; send it as {field}", code="invalid_body", param=field
                )
        elif name in fields:
            before = fields[name]
            fields[name] = [*before, value] if isinstance(before, list) else [before, value]
        else:
            fields[name] = value
    if not files:
        raise Refusal(400, f"{field}: send the audio as a file", code="missing_parameter", param=field)
    (file,) = files
    size = file.size or 0
    if size > settings.max_upload_bytes:
        await form.close()
        raise _too_large(settings.max_upload_bytes)
    return Upload(fields, file.file, size)


async def _from_json(raw: bytes, settings: Settings, urls: UrlPolicy) -> Upload:
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise Refusal(400, f"the body has over {MAX_JSON_VALUES} values; send the audio in base64", code="invalid_body")
    try:
        fields: Any = await asyncio.to_thread(json.loads, raw)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON", code="invalid_body") from None
    if not isinstance(fields, dict):
        raise Refusal(400, "the body is not a JSON object", code="invalid_body")
    url, encoded = fields.pop("url", None), fields.pop("audio", None)
    if (url is None) == (encoded is None):
        raise Refusal(400, "audio: send either url, or audio in base64", code="missing_parameter", param="audio")
    if encoded is not None:
        return await asyncio.to_thread(_from_base64, fields, encoded, settings)
    if not urls.hosts:
        raise Refusal(400, "url: this server takes none; send the audio", code="url_not_allowed", param="url")
    if not isinstance(url, str):
        raise Refusal(400, "url: not a string", code="invalid_parameter", param="url")
    return await _from_url(fields, url, urls)


def _from_base64(fields: Mapping[str, object], encoded: object, settings: Settings) -> Upload:
    if not isinstance(encoded, str):
        raise Refusal(400, "audio: not a string", code="invalid_parameter", param="audio")
    try:
        raw = base64.b64decode(encoded.partition(",")[2] if encoded.startswith("data:") else encoded, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, "audio: not base64", code="invalid_parameter", param="audio") from None
    if len(raw) > settings.max_upload_bytes:
        raise _too_large(settings.max_upload_bytes)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the Upload closes it
    file.write(raw)
    return Upload(fields, file, len(raw))


async def _from_url(fields: Mapping[str, object], url: str, urls: UrlPolicy) -> Upload:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the Upload closes it
    cancelled = threading.Event()
    try:
        await asyncio.to_thread(fetch, url, file, urls, cancelled=cancelled)
    except UrlError as error:
        file.close()
        raise Refusal(400, str(error), code="url_failed", param="url") from None
    finally:
        cancelled.set()
    return Upload(fields, file, file.tell())
