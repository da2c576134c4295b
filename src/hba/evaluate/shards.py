"""One run on several processes, GPUs or machines: each predicts its share into a folder of its own, the last merges.

Shard i of N takes every N-th row. It writes `shards/i-of-N/` of the run folder; whoever finds all rows done, the last
shard or a later run without shards, puts everything into the run's own predictions.jsonl and quarantine.jsonl and
removes the folder `shards`. What any shard has done counts as done for all, so that a run may go on with another N.
The machines must share the run folder, on a file system with locks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hba.atlas.sample import Quarantined
from hba.errors import InputError
from hba.evaluate.predictions import Prediction, PredictionLog, read_predictions, write_predictions
from hba.quarantine import QuarantineLog
from hba.run import FolderInUseError, locked_folder
from hba.taxonomy import Taxonomy

# (rank, number of processes, rank on its machine) as torchrun and accelerate launch, and as srun say it. A batch script
# has SLURM_NTASKS too, without being one of the tasks.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


class _Named(msgspec.Struct):
    id: str


_named = msgspec.json.Decoder(_Named)


@dataclass(frozen=True)
class Shard:
    """Shard `number` (from 1) of `count`; `device` is the GPU that it takes, None for the usual one."""

    number: int
    count: int
    device: int | None = None

    @property
    def name(self) -> str:
        """Such as 2-of-4."""
        return f"{self.number}-of-{self.count}"

    def folder(self, run: Path) -> Path:
        """Where its predictions go."""
        return run / "shards" / self.name


def parse_shard(text: str) -> Shard:
    """The shard that 'i/N' names, i from 1 to N. Raises InputError for anything else."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(f"no shard {text!r}", where="--shard", fix="Write i/N with i from 1 to N, such as 1/4.")
    return Shard(int(number), int(count))


def launched_shard(environment: Mapping[str, str] = os.environ) -> Shard | None:
    """The share of this process under torchrun, accelerate launch or srun; None for one process alone."""
    for rank, world, local in LAUNCHERS:
        if int(environment.get(world, "1")) > 1 and rank in environment:
            return Shard(int(environment[rank]) + 1, int(environment[world]), int(environment.get(local, "0")))
    return None


def done_elsewhere(run: Path, besides: Path | None = None) -> set[str]:
    """The ids with a prediction in the run's own file or in that of any shard, whoever is writing there.

    The file `besides` is left out.
    """
    files = [run / "predictions.jsonl", *run.glob("shards/*/predictions.jsonl")]
    return {record for file in files if file != besides for record in _whole_ids(file)}


def left_out(run: Path) -> set[str]:
    """The ids that the run or any shard has quarantined."""
    files = [run / "quarantine.jsonl", *run.glob("shards/*/quarantine.jsonl")]
    return {record for file in files for record in _whole_ids(file)}


def _whole_ids(file: Path) -> Iterator[str]:
    """The ids of the lines that are written to their end."""
    if file.is_file():
        with file.open("rb") as handle:
            for line in handle:
                if line.endswith(b"\n"):
                    yield _named.decode(line).id


def merge(run: Path, taxonomy: Taxonomy) -> None:
    """Put what all shards have into the run's own files and remove theirs. The caller holds the run's lock.

    Killed at any point, it can be done again. Raises FolderInUseError when a shard is still being predicted.
    """
    folders = sorted(path for path in run.glob("shards/*") if path.is_dir())
    if not folders:
        return
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(locked_folder(folder))
        _merge_predictions(run / "predictions.jsonl", [f / "predictions.jsonl" for f in folders], taxonomy)
        _merge_quarantines(run, folders)
        shutil.rmtree(run / "shards", ignore_errors=True)


def merge_when_done(run: Path, wanted: set[str], taxonomy: Taxonomy) -> bool:
    """Merge if every id of `wanted` is predicted or quarantined; False while shards are at work.

    Shards that end together may each find the other's lock taken; each lets go of its own before, so that one merges.
    """
    if not wanted <= done_elsewhere(run) | left_out(run):
        return False
    try:
        with locked_folder(run):
            merge(run, taxonomy)
    except FolderInUseError:  # by another process, which is about to do the same
        return not (run / "shards").is_dir()
    return True


def _merge_predictions(own: Path, parts: list[Path], taxonomy: Taxonomy) -> None:
    files = [path for path in (own, *parts) if path.is_file()]
    for path in files:
        PredictionLog(path, taxonomy).close()  # cuts off a line that a kill left torn
    kept: dict[str, Prediction] = {}
    for path in files:
        for prediction in read_predictions(path, taxonomy):
            kept.setdefault(prediction.id, prediction)
    write_predictions(own, kept.values())


def _merge_quarantines(run: Path, folders: list[Path]) -> None:
    with QuarantineLog(run) as own:
        for folder in folders:
            with QuarantineLog(folder) as log:
                for record in log.records():
                    own.add(Quarantined(**{name: record.get(name, "") for name in Quarantined._fields}))
