"""Several labels in one text: how rows write them, how models answer with them, and their one canonical spelling.

Labels are listed with commas, semicolons, bars, slashes or lines, numbered or not, the last perhaps after 'and'; 'none'
(or one of its words) says that there is none. Canonical: labels in the taxonomy's order, joined by ', ', or 'none'. A
part that is no label is left out of an answer (`read`), and refused in a row (`read(..., strict=True)`); a text without
any label that does not say 'none' is no answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

NONE = "none"
NONE_WORDS = frozenset((NONE, "no label", "none of these", "none of the above", "background", "n/a", "nothing"))
_SEPARATORS = re.compile(r"[,;|/\n、，；]+")
_AND = re.compile(r"\band\b|&")
_BULLET = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):])\s*")
_DECORATION = " \t\r\n.:!?\"'`*_$()[]。！？：“”‘’"


def visible(raw: str) -> str:
    """`raw` as a reader sees it: compatibility forms are folded (full-width letters are letters), and signs that nobody
    sees (zero-width spaces, byte order marks, marks of direction) are left out."""
    if raw.isascii():
        return raw
    return "".join(sign for sign in unicodedata.normalize("NFKC", raw) if unicodedata.category(sign) != "Cf").strip()


def plain(raw: str) -> str:
    """`raw` as labels are compared: `visible`, in lower case, runs of white space one space."""
    return " ".join(visible(raw).lower().split())


def read(text: str, labels: Sequence[str], synonyms: Mapping[str, str], *, strict: bool = False) -> str | None:
    """The canonical spelling of the labels that `text` gives, None if it gives none and does not say so.

    `strict`: None as well if any part of it is not a label.
    """
    table = {plain(label): label for label in labels} | {plain(raw): label for raw, label in synonyms.items()}
    text = visible(text).lower()
    if " ".join(text.strip(_DECORATION).split()) in NONE_WORDS:
        return NONE
    parts = [part for piece in _SEPARATORS.split(text) for part in _parts(piece, table)]
    found = {table[part] for part in parts if part in table}
    unknown = any(part not in table for part in parts)
    if not found or (strict and unknown):
        return None
    return ", ".join(label for label in labels if label in found)


def split(canonical: str) -> tuple[str, ...]:
    """The labels of a canonical spelling."""
    return () if canonical == NONE else tuple(canonical.split(", "))


def _parts(piece: str, table: Mapping[str, str]) -> list[str]:
    """The labels in a piece between separators; one that is no label is cut at 'and'."""
    whole = _clean(piece)
    if whole in table or not whole:
        return [whole] if whole else []
    return [part for part in map(_clean, _AND.split(piece)) if part]


def _clean(piece: str) -> str:
    return " ".join(_BULLET.sub("", piece).strip(_DECORATION).split())
