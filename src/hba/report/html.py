"""What every page shares: escaping templates, one style, nothing that is loaded from anywhere.

Escaping is always on, a name that a template misspells is an error, and what no HTML file may hold (control characters,
lone surrogates) is replaced, so that any text of an atlas or a run can be shown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hba.report import words

HERE = Path(__file__).parent
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def environment(*folders: Path) -> Environment:
    """Jinja over the templates of `folders` and of this package, with `words` at hand."""
    made = Environment(
        loader=FileSystemLoader([*folders, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals["words"] = words
    return made


def style(*names: str) -> Markup:
    """The style sheets of that name, one after the other, to stand in a page."""
    return Markup("\n").join(Markup((HERE / name).read_text(encoding="utf-8")) for name in names)  # noqa: S704  our own


def _clean(value: Any) -> Any:
    if isinstance(value, str) and CONTROL.search(value):
        return type(value)(CONTROL.sub("\ufffd", value))
    return value
