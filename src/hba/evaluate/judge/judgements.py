"""judgements.jsonl: one line a verdict, append-only; beside it judge.json, which says who judged and by what rules.

`correct` is true, false, or null for an answer that no judge could be got to judge, with the reason in `error`. A later
line for an id takes the place of an earlier one only if that one was unjudged. A file belongs to one judge.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from hba.errors import InputError
from hba.storage import AppendLog, read_json, read_jsonl, write_json

FILE = "judgements.jsonl"
SETTINGS = "judge.json"
PLACE = "base_url"  # where the judge ran may differ, what it is may not


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict on one answer. Token counts are over all attempts, None if the server did not say them all.

    `model` is the version that the server says has answered, which a name such as gpt-5-nano leaves open.
    """

    id: str
    dataset: str
    answer_sha256: str
    correct: bool | None
    reason: str | None
    error: str | None
    attempts: int
    tokens_in: int | None
    tokens_out: int | None
    model: str | None = None

    def __post_init__(self) -> None:
        if (self.correct is None) == (self.error is None):
            raise ValueError("a judgement has a verdict or an error")


def read_judgements(path: Path) -> dict[str, Judgement]:
    """The judgement of every id. Raises InputError naming file and line for a bad line or a second verdict on an id."""
    found: dict[str, Judgement] = {}
    for line in read_jsonl(path):
        where = f"{path}:{line.number}"
        try:
            judgement = msgspec.convert(line.record, Judgement)
        except (msgspec.ValidationError, ValueError) as error:
            raise InputError(str(error), where=where, fix="Remove the line; `hba judge` asks again.") from None
        before = found.get(judgement.id)
        if before is not None and before.correct is not None:
            what = f"a second verdict on {judgement.id!r}"
            raise InputError(what, where=where, fix="Keep one line per sample.")
        found[judgement.id] = judgement
    return found


class JudgementLog:
    """The judgements of one folder, opened to add more. Raises InputError if it belongs to another judge."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        _claim(folder, settings)
        self._log = AppendLog(folder / FILE)
        try:
            self.known = read_judgements(folder / FILE)
        except InputError:
            self._log.close()
            raise

    def append(self, judgement: Judgement) -> None:
        """Write one line. Raises StorageError on a full disk."""
        self._log.append(asdict(judgement))
        self.known[judgement.id] = judgement

    def __enter__(self) -> JudgementLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()


def known_judgements(folder: Path, settings: dict[str, Any]) -> dict[str, Judgement]:
    """The judgements of a folder, none if it has none. Raises InputError if they are another judge's."""
    if not _has_verdicts(folder):
        return {}
    _check_judge(folder, settings)
    return read_judgements(folder / FILE)


def _has_verdicts(folder: Path) -> bool:
    return (folder / FILE).is_file() and (folder / FILE).stat().st_size > 0


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    if _has_verdicts(folder):
        _check_judge(folder, settings)
    else:
        write_json(folder / SETTINGS, settings)  # whoever was to judge here before came to nothing


def _check_judge(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.is_file():
        fix = "Restore judge.json, or remove judgements.jsonl."
        raise InputError("judgements of an unknown judge: judge.json is missing", where=str(folder), fix=fix)
    before = read_json(path)
    keys = sorted({*settings, *before} - {PLACE})
    differing = [key for key in keys if before.get(key) != settings.get(key)]
    if differing:
        fix = "Write this judge's verdicts elsewhere with --out, or remove judge.json and judgements.jsonl."
        raise InputError(f"holds judgements with another {', '.join(differing)}", where=str(folder), fix=fix)
