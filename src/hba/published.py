"""The published figures, as the package brings them: `published_results.yaml`, a table by name.

Figures stand as they were published, in per cent or as shares; whoever shows them beside scores says so.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hba.errors import InputError, nearest


def published_table(name: str) -> dict[str, Any]:
    """The rows of a table by their names; `columns` are among them where the rows are lists. Raises InputError."""
    tables = _tables()
    if name not in tables:
        raise InputError(f"no published table {name!r}", fix=nearest(name, tables))
    return dict(tables[name])


@cache
def _tables() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("published_results.yaml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return tables
