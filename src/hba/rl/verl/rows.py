"""From a run folder to its rows, in each of verl's processes: opened once, named by role and number.

Messages carry a reference to a medium, never its bytes: verl copies every column for every rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from hba.atlas import Atlas
from hba.atlas.answer_format import FormatMix
from hba.atlas.batch import Media, load_media, messages_of
from hba.atlas.media import SAMPLE_RATE
from hba.atlas.sample import Sample
from hba.config import load_config
from hba.errors import InputError
from hba.rl.config import RlConfig
from hba.rl.rows import training_rows, validation_rows
from hba.rl.verl.config import TRAINING, VALIDATION

DECODED = 16  # rows whose media are kept: the responses to a prompt ask for the same, at the same time


class Reference(NamedTuple):
    """Medium `item` of its kind of row `row`, as it stands in a message."""

    role: str
    row: int

    def text(self) -> str:
        """`hba:training/12`."""
        return f"hba:{self.role}/{self.row}"

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises InputError for a text that `text` did not make."""
        role, _, row = text.removeprefix("hba:").partition("/")
        if role not in (TRAINING, VALIDATION) or not row.isdigit():
            raise InputError(f"not a reference to a medium: {text!r}", where="raw_prompt")
        return cls(role, int(row))


@lru_cache(maxsize=8)
def run_config(run: str) -> RlConfig:
    """The config of the run folder `run`."""
    return load_config(RlConfig, Path(run) / "config.yaml")


@lru_cache(maxsize=8)
def run_rows(run: str, role: str) -> Atlas:
    """The rows of a role, training or validation."""
    opened = {TRAINING: training_rows, VALIDATION: validation_rows}
    if role not in opened:
        raise InputError(f"no rows {role!r}", where="data.train_files", fix=f"Use {' or '.join(opened)}.")
    return opened[role](run_config(run))


def messages(
    sample: Sample, config: RlConfig, reference: Reference, plain: Callable[[str], str] = str
) -> list[dict[str, Any]]:
    """The chat messages of a sample, each medium with its reference; `plain` makes text of its text."""
    found = messages_of(sample, config.encode, FormatMix((config.format,)), plain)
    return [{**message, "content": [_referring(item, reference) for item in message["content"]]} for message in found]


def _referring(item: dict[str, Any], reference: Reference) -> dict[str, Any]:
    return item if item["type"] == "text" else {**item, item["type"]: reference.text()}


def referred(messages: list[dict[str, Any]]) -> Reference | None:
    """The row whose media the messages refer to; None for a prompt of text alone."""
    for message in messages:
        for item in message["content"] if isinstance(message["content"], list) else ():
            if item["type"] != "text":
                return Reference.parse(item[item["type"]])
    return None


class RowMedia:
    """The media of a row, decoded by the first that asks; those that ask meanwhile wait for it."""

    def __init__(self, run: str, reference: Reference) -> None:
        self._run, self._reference = run, reference
        self._lock = Lock()
        self._media: Media | None = None

    def decoded(self) -> Media:
        """From any thread. Raises MediaError naming what cannot be read."""
        with self._lock:
            if self._media is None:
                sample = run_rows(self._run, self._reference.role)[self._reference.row]
                self._media = load_media(sample, run_config(self._run).encode, SAMPLE_RATE)
            return self._media


@lru_cache(maxsize=DECODED)
def row_media(run: str, reference: Reference) -> RowMedia:
    """The media of a row, the same object for all its responses. To be called from one thread."""
    return RowMedia(run, reference)
