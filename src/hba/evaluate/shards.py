"""One run on several processes, GPUs or machines: each predicts its share into a folder of its own, the last merges.

Shard i of N takes every N-th batch of the rows that are asked together. It writes `shards/i-of-N/` of the run folder;
whoever finds all rows done, the last shard or a later run without shards, puts everything into the run's own
predictions.jsonl and quarantine.jsonl and removes the folder `shards`. What any shard has done counts as done for all,
so that a run may go on with another N. The machines must share the run folder, on a file system with locks.

Nothing that a shard finds ends it with a failure, since a launcher then ends the others: whoever merges speaks for the
run, its exit code included.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from hba.atlas.rows import Quarantined
from hba.errors import ConfigError, InputError
from hba.evaluate.predictions import Prediction, PredictionLog, has_failed, read_predictions, write_predictions
from hba.run import FolderInUseError, QuarantineLog, locked_folder
from hba.taxonomy import Taxonomy

T = TypeVar("T")

# (rank, number of processes, rank on its machine) as torchrun and accelerate launch, and as srun say it. A batch script
# has SLURM_NTASKS too, without being one of the tasks.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
FILES = ("predictions.jsonl", "quarantine.jsonl")
VISIBLE = "CUDA_VISIBLE_DEVICES"
PATIENCE_SECONDS = 120.0
"""for the run's lock, which processes of one run hold for moments, or for as long as one puts everything together"""


class _Line(msgspec.Struct):
    id: str
    output: str | None = None
    answer: str | None = None
    label: str | None = None
    error: str | None = None


_line = msgspec.json.Decoder(_Line)


@dataclass(frozen=True)
class Shard:
    """Shard `number` (from 1) of `count`; `device` is its place among the processes that a launcher started on this
    machine, None without a launcher."""

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

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every N-th of the items."""
        return items[self.number - 1 :: self.count]


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


def take_gpus(shard: Shard, each: int, *, shared: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Show this process its own `each` GPUs alone, of those that its machine shows to all, by CUDA_VISIBLE_DEVICES.

    Names in that list may be numbers, UUIDs or MIG devices. Where srun has dealt out GPUs already, nothing changes.
    With `shared`, processes may have a GPU together where there are too few. Nothing happens where there is none.
    Raises ConfigError for too few GPUs, and when CUDA has started, which reads the list once.
    """
    seen = _visible(environment)
    dealt_out = "LOCAL_RANK" not in environment and ("SLURM_GPUS_PER_TASK" in environment or len(seen) == each)
    if not seen or dealt_out:
        return
    if each > len(seen):
        what = f"{each} GPUs are wanted for each process, but {len(seen)} can be seen"
        raise ConfigError(what, where=VISIBLE, fix=f"Set vllm.tensor_parallel_size={len(seen)} or less.")
    first = (shard.device or 0) * each
    if first + each > len(seen):
        if not shared:
            fits = len(seen) // each
            what = f"{len(seen)} GPUs are enough for {fits} processes of {each}, and this is number {first // each + 1}"
            raise ConfigError(what, where=VISIBLE, fix=f"Start {fits} on this machine (--nproc-per-node {fits}).")
        first %= len(seen)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise ConfigError("CUDA has started already", where=VISIBLE, fix="Predict before anything uses a GPU.")
    environment[VISIBLE] = ",".join(seen[first : first + each])


def _visible(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has; CUDA does not start for it."""
    if VISIBLE not in environment:
        import torch  # asks the driver's library, which starts nothing

        return [str(number) for number in range(torch.cuda.device_count())]
    named: list[str] = []
    for name in map(str.strip, environment[VISIBLE].split(",")):
        if not name or name.startswith("-"):  # CUDA, too, reads no further
            break
        named.append(name)
    return named


def done_elsewhere(run: Path, besides: Path | None = None, *, failed: bool = True) -> set[str]:
    """The ids with a prediction in the run's own file or in that of any shard, whoever is writing there.

    The file `besides` is left out, and unless `failed`, what failed.
    """
    files = [run / "predictions.jsonl", *run.glob("shards/*/predictions.jsonl")]
    lines = (line for file in files if file != besides for line in _whole_lines(file))
    return {line.id for line in lines if failed or not has_failed(line)}


def _settled(run: Path, *, retry_failed: bool) -> set[str]:
    """The ids of which this command has nothing more to say: answered, or failed or quarantined in a shard.

    What the run itself has in quarantine was left out by an earlier command and is tried again; so is what failed
    there, with `retry_failed`.
    """
    found = done_elsewhere(run, failed=not retry_failed)
    return found | {line.id for name in FILES for file in run.glob(f"shards/*/{name}") for line in _whole_lines(file)}


def _whole_lines(file: Path) -> Iterator[_Line]:
    """The lines that are written to their end."""
    if file.is_file():
        with file.open("rb") as handle:
            for line in handle:
                if line.endswith(b"\n"):
                    yield _line.decode(line)


def merge(run: Path, taxonomy: Taxonomy) -> bool:
    """Put what all shards have into the run's own files and remove theirs; False where there is none.

    The caller holds the run's lock. Killed at any point, it can be done again. Raises FolderInUseError when a shard is
    still being predicted.
    """
    folders = sorted(path for path in run.glob("shards/*") if path.is_dir())
    if not folders:
        return False
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(locked_folder(folder))
        _merge_predictions(run / "predictions.jsonl", [f / "predictions.jsonl" for f in folders], taxonomy)
        _merge_quarantines(run, folders)
        shutil.rmtree(run / "shards", ignore_errors=True)
    return True


def merge_when_done(run: Path, wanted: set[str], taxonomy: Taxonomy, *, retry_failed: bool) -> bool:
    """Merge if every id of `wanted` is predicted or quarantined; False while shards are at work, and where another did.

    Shards that end together may each find the other's lock taken; each lets go of its own before, so that one merges.
    """
    if not wanted <= _settled(run, retry_failed=retry_failed):
        return False
    try:
        with locked_folder(run):
            return merge(run, taxonomy)
    except FolderInUseError:  # by another process, which is about to do the same
        return False


def merged_since(run: Path, began: float) -> bool:
    """Whether shards were merged after `began`, in seconds since the epoch, and no shard has been at work since.

    The processes of a launcher do not start at once: one may come when the others have found that all is done.
    """
    merged = run / "predictions.jsonl"
    at_work = any((run / "shards").glob("*/*.jsonl"))
    return merged.is_file() and merged.stat().st_mtime >= began and not at_work


def leave_nothing(run: Path, shard: Shard) -> None:
    """Remove the folder of a shard that had nothing to do; the run may have been merged before it came.

    The caller holds both locks.
    """
    own = shard.folder(run)
    if not any((own / name).is_file() and (own / name).stat().st_size for name in FILES):
        shutil.rmtree(own, ignore_errors=True)
        if not any((run / "shards").glob("*")):
            shutil.rmtree(run / "shards", ignore_errors=True)


def _merge_predictions(own: Path, parts: list[Path], taxonomy: Taxonomy) -> None:
    files = [path for path in (own, *parts) if path.is_file()]
    for path in files:
        PredictionLog(path, taxonomy).close()  # cuts off a line that a kill left torn
    kept: dict[str, Prediction] = {}
    for path in files:
        for prediction in read_predictions(path, taxonomy):
            if prediction.id not in kept or kept[prediction.id].failed:  # a row that failed was asked again
                kept[prediction.id] = prediction
    write_predictions(own, kept.values())


def _merge_quarantines(run: Path, folders: list[Path]) -> None:
    with QuarantineLog(run) as own:
        for folder in folders:
            with QuarantineLog(folder) as log:
                for record in log.records():
                    own.add(Quarantined(**{name: record.get(name, "") for name in Quarantined._fields}))
