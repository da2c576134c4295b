"""Name the extracted descriptors in the rows, and keep the rows as they were.

A JSONL file is replaced in one rename; before that its bytes are kept as `describe/{name}.{their SHA-256}.jsonl`.
Only lines that gain something are written anew, with their fields in order and their unknown fields kept; every other
line keeps its bytes. A file that changed since it was read is left alone, loudly. Media are never touched.
"""

from __future__ import annotations

import json
from pathlib import Path

from hba.descriptors.items import RowFile, Wanted, stamp_of
from hba.errors import HbaError
from hba.storage import atomic_write, file_sha256

_BOM = b"\xef\xbb\xbf"


def link_rows(rows: RowFile, done: set[str], keep_in: Path) -> int:
    """Set the wanted fields of every row whose outputs are all `done`; return how many rows gained something.

    Raises HbaError when the file has changed since it was read.
    """
    wanted: dict[int, list[Wanted]] = {}
    for want in rows.wanted:
        if done.issuperset(want.outputs):
            wanted.setdefault(want.line, []).append(want)
    if not wanted:
        return 0
    if stamp_of(rows.path) != rows.stamp:
        fix = "Run the same command again: the descriptors stand, only the rows are left to write."
        raise HbaError("the rows were changed while descriptors were extracted", where=str(rows.path), fix=fix)
    with rows.path.open("rb") as file:
        lines = file.readlines()
    gained = 0
    for number, wants in wanted.items():
        linked = _linked(lines[number - 1], wants)
        gained += linked is not None
        lines[number - 1] = linked or lines[number - 1]
    if gained:
        _keep(rows.path, keep_in)
        with atomic_write(rows.path, "wb") as handle:
            handle.writelines(lines)
    return gained


def _linked(raw: bytes, wants: list[Wanted]) -> bytes | None:
    """The line with its new fields; None when it has them already."""
    row = json.loads(raw.removeprefix(_BOM))
    fields = {want.field: list(want.outputs) for want in wants}
    if all(row.get(name) == outputs for name, outputs in fields.items()):
        return None
    end = b"\r\n" if raw.endswith(b"\r\n") else b"\n" if raw.endswith(b"\n") else b""
    return json.dumps(row | fields, ensure_ascii=False).encode() + end


def _keep(path: Path, folder: Path) -> None:
    copy = folder / f"{path.stem}.{file_sha256(path)[:12]}.jsonl"
    if not copy.exists():
        with atomic_write(copy, "wb") as handle, path.open("rb") as original:
            while block := original.read(1 << 20):
                handle.write(block)
