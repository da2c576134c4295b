"""Media straight from the store to the browser, by ranges: a clip starts to play before it has been read, also when it
lies inside a shard.

A medium is named by its sample's split and row, its field and its place in the field, never by a path, so that no
request can name a file. Content decides the type that is declared, of a short list; anything else is bytes to save.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from starlette.responses import Response, StreamingResponse

from hba.atlas.sample import MEDIA_FIELDS, Field, Sample
from hba.atlas.slices import Source, opened
from hba.atlas.source import DEFAULT_LIMITS, check_source, head
from hba.errors import InputError, MediaError

BLOCK = 1 << 18
MAX_RANGE_BYTES = 8 << 20  # of one answer: players ask for the rest
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_PLAIN = "application/octet-stream"


class Span(NamedTuple):
    """Bytes `start` to `stop` (exclusive) of a medium."""

    start: int
    stop: int


def source_of(sample: Sample, field: str, index: int) -> Source:
    """Medium `index` of a sample's field. Raises InputError for one that is not there, MediaError for a broken path."""
    if field not in MEDIA_FIELDS or not 0 <= index < getattr(sample, field):
        raise InputError(f"no medium {index} in {field!r}", where=sample.where, fix="See the sample's own page.")
    name: Field = field  # type: ignore[assignment]
    return sample.source.medium(sample.number, name, index, where=sample.place(name))


def media_type(start: bytes) -> str:
    """The declared type of content that begins with `start`."""
    if start[:4] == b"RIFF":
        return {b"WAVE": "audio/wav", b"AVI ": "video/x-msvideo", b"WEBP": "image/webp"}.get(start[8:12], _PLAIN)
    if start[4:8] == b"ftyp":
        return "audio/mp4" if start[8:12] == b"M4A " else "video/mp4"
    known = {
        b"fLaC": "audio/flac", b"OggS": "audio/ogg", b"ID3": "audio/mpeg", b"\xff\xfb": "audio/mpeg",
        b"\x1a\x45\xdf\xa3": "video/webm", b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif",
    }  # fmt: skip
    return next((kind for magic, kind in known.items() if start.startswith(magic)), _PLAIN)


def media_response(source: Source, asked: str | None, *, where: str) -> Response:
    """The medium, or the part of it that the Range header `asked` names; 416 for a range that it does not have."""
    size = check_source(source, where=where, limits=DEFAULT_LIMITS)
    headers = {"accept-ranges": "bytes", "content-security-policy": "sandbox; default-src 'none'"}
    span = Span(0, size)
    if asked is not None:
        found = parse_range(asked, size)
        if found is None:
            return Response(status_code=416, headers=headers | {"content-range": f"bytes */{size}"})
        span = found
        headers["content-range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
    headers["content-length"] = str(span.stop - span.start)
    kind = media_type(head(source, 16, where=where))
    if kind == _PLAIN:
        headers["content-disposition"] = "attachment"
    return StreamingResponse(_blocks(source, span, where), 200 if asked is None else 206, headers, kind)


def parse_range(asked: str, size: int) -> Span | None:
    """The bytes that 'bytes=a-b', 'bytes=a-' or 'bytes=-n' means of `size`, at most 8 MB of them; None for no bytes."""
    match = _RANGE.fullmatch(asked.strip())
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    return Span(start, min(stop, start + MAX_RANGE_BYTES)) if start < stop else None


def _blocks(source: Source, span: Span, where: str) -> Iterator[bytes]:
    """The bytes of a span. A medium that ends early, or differs from its checksum, breaks the answer off."""
    with opened(source, where=where) as file:
        file.seek(span.start)
        left = span.stop - span.start
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                raise MediaError("became shorter while it was read", where=where)
            yield block
            left -= len(block)
