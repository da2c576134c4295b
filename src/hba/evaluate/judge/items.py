"""An answer that is judged, and judgements.jsonl, where verdicts go: one line each, append-only; beside it judge.json,
which says who judged and by what rules.

`correct` is true, false, or null for an answer that no judge could be got to judge, with the reason in `error`. A later
line for an id takes the place of an earlier one only if that one was unjudged. What the judge said stands in `replies`
as it came, every attempt. A file belongs to one judge, from its first verdict on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from hba.errors import InputError
from hba.evaluate.predictions import JUDGE_SETTINGS, JUDGEMENTS
from hba.storage import AppendLog, json_sha256, read_json, read_jsonl, write_json

FILE, SETTINGS = JUDGEMENTS, JUDGE_SETTINGS
PLACE = "base_url"  # where the judge ran may differ, what it is may not


@dataclass(frozen=True, kw_only=True)
class Item:
    """One answer to judge. `task` is a key such as SOC, None for a dataset without one."""

    id: str
    dataset: str
    task: str | None
    question: str
    reference: str
    answer: str

    @property
    def answer_sha256(self) -> str:
        """What a verdict is about; a verdict on another answer is not this one's."""
        return answer_sha256(self.reference, self.answer)


def answer_sha256(reference: str, answer: str) -> str:
    """Hash of an answer with its reference."""
    return json_sha256([reference, answer])


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict on one answer. Token counts are over all attempts, None if the server did not say them all.

    `model` is the version that the server says has answered, which a name such as gpt-5-nano leaves open; `left_out`
    what of the requests it refused.
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
    left_out: tuple[str, ...] = ()
    replies: tuple[str, ...] = ()

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
        if (folder / FILE).is_file():
            AppendLog(folder / FILE).close()  # cuts off a line that a kill left torn
        self.known = known_judgements(folder, settings)
        if not self.known:
            (folder / FILE).unlink(missing_ok=True)
            write_json(folder / SETTINGS, settings)
        self._log = AppendLog(folder / FILE)

    def append(self, judgement: Judgement) -> None:
        """Write one line. Raises StorageError on a full disk."""
        kept = asdict(judgement)
        self._log.append({name: value for name, value in kept.items() if value or name not in ("left_out", "replies")})
        self.known[judgement.id] = judgement

    def __enter__(self) -> JudgementLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()


def known_judgements(folder: Path, settings: dict[str, Any]) -> dict[str, Judgement]:
    """The judgements of a folder, none if it has none. Raises InputError if they are another judge's."""
    path = folder / FILE
    known = read_judgements(path) if path.is_file() else {}
    if not known:
        return {}
    if not (folder / SETTINGS).is_file():
        fix = "Restore judge.json, or remove judgements.jsonl."
        raise InputError("judgements of an unknown judge: judge.json is missing", where=str(folder), fix=fix)
    before = read_json(folder / SETTINGS)
    differing = [key for key in sorted({*settings, *before} - {PLACE}) if before.get(key) != settings.get(key)]
    if not differing:
        return known
    if all(judgement.correct is None for judgement in known.values()):
        return {}  # whoever was to judge here before came to nothing
    fix = "Write this judge's verdicts elsewhere with --out, or remove judge.json and judgements.jsonl."
    raise InputError(f"holds judgements with another {', '.join(differing)}", where=str(folder), fix=fix)
