"""The transfer protocol (paper, table 5): does training on the atlas help on a dataset that it did not contain?

One pretraining leaves all held-out datasets out. Each of these is then fine-tuned twice, from the pretrained model and
from the backbone, with the same rows, order and steps, and tested on its own test rows. The published fine-tuning lasts
one epoch, two for DAIC-WOZ. Every part is a run folder below the given one (`pretrain`, `KEY/pretrained`, `KEY/direct`)
that resumes by itself or is skipped when it stands, so that a killed protocol ends with the same figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from hba.atlas import Atlas, open_atlas
from hba.errors import InputError, nearest
from hba.evaluate.compare import compare_runs
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import Selection, predict_run
from hba.evaluate.predictions import Tally
from hba.evaluate.score import score_run
from hba.run import QuarantineLog
from hba.storage import write_json
from hba.taxonomy import PUBLISHED, published_table
from hba.train.config import SftConfig
from hba.train.loop import rows_of
from hba.train.sft import train_sft
from hba.train.state import training_run

ShowProgress: TypeAlias = Callable[[str], AbstractContextManager[Callable[[Tally], None]]]
"""A bar of the given name; what it yields takes the tally of predictions."""
STARTS = ("pretrained", "direct")
LONGER_EPOCHS = {"daicwoz": 2}
PUBLISHED_ROWS = {
    "mosei_senti": "MOSEI SEN",
    "meld_emotion": "MELD EMO",
    "daicwoz": "DAIC-WOZ DEP",
    "mustard": "MUStARD SAR",
}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A score in [0, 1] with its 95 % interval."""

    score: float | None
    ci95: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One held-out dataset. `difference` is pretrained minus direct over the same rows, with its interval and p-value.

    `published` are the paper's two figures for it, None where it has none.
    """

    dataset: str
    task: str
    metric: str
    epochs: int
    n: int
    pretrained: Scored
    direct: Scored
    difference: Scored
    p_value: float | None
    published: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """All held-out datasets, those of the protocol that the atlas lacks, and what had to be left out."""

    rows: list[Transfer]
    not_in_atlas: list[str]
    synthetic: bool
    quarantined: list[dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "quarantined": len(self.quarantined)}


def run_transfer(
    folder: Path, config: SftConfig, *, heldout: Sequence[str] | None, progress: ShowProgress
) -> TransferResult | None:
    """Run (or resume) the protocol in `folder`; writes transfer.json and returns it, None on ranks but the first.

    `config` is that of the pretraining; fine-tuning takes it with other rows, epochs and starts. `heldout` are dataset
    keys, by default those of the paper that the atlas has. Raises InputError for one without rows.
    """
    atlas = open_atlas(config.atlas, split=config.train_split).with_answers()
    keys, absent = heldout_datasets(atlas, heldout)
    pretrain = replace(config, datasets=pretraining_datasets(rows_of(atlas, config.datasets, free_form=False), keys))
    _train(folder / "pretrain", pretrain)
    for key in keys:
        epochs = LONGER_EPOCHS.get(key, 1)
        for start in STARTS:
            name = str(folder / "pretrain") if start == "pretrained" else config.model.name
            model, train = replace(config.model, name=name), replace(config.train, epochs=epochs)
            _train(folder / key / start, replace(config, model=model, train=train, datasets=(key,)))
    if int(os.environ.get("RANK", "0")) != 0:
        return None
    rows = [_tested(folder / key, key, config, progress) for key in keys]
    runs = [folder / "pretrain", *(folder / key / start for key in keys for start in STARTS)]
    left_out = [record for run in runs for record in QuarantineLog(run).records()]
    result = TransferResult(rows=rows, not_in_atlas=absent, synthetic=atlas.synthetic, quarantined=left_out)
    write_json(folder / "transfer.json", result.record())
    return result


def _train(run: Path, config: SftConfig) -> None:
    with training_run(run, config=config, command="transfer", seed=config.train.seed) as opened:
        train_sft(config, opened)


def heldout_datasets(atlas: Atlas, wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The datasets to hold out, and those of the protocol that the atlas has no classification rows of."""
    rows = rows_of(atlas, None, free_form=False)
    there = {rows.columns.datasets[code] for code in set(rows.columns.dataset_codes.tolist())}
    protocol = [entry["dataset"] for entry in PUBLISHED["heldout_transfer"]]
    if wanted is not None:
        missing = [key for key in wanted if key not in there]
        if missing:
            what = f"no classification rows of {', '.join(missing)} to hold out"
            raise InputError(what, where=str(atlas.root), fix=nearest(missing[0], there))
        return list(dict.fromkeys(wanted)), []
    found = [key for key in protocol if key in there]
    if not found:
        fix = "Name datasets of yours with --heldout."
        raise InputError("the atlas has none of the held-out datasets", where=str(atlas.root), fix=fix)
    return found, [key for key in protocol if key not in there]


def pretraining_datasets(rows: Atlas, keys: Sequence[str]) -> tuple[str, ...]:
    """The datasets of the pretraining: not the held-out ones, nor those of a task that it must not have seen."""
    unseen = [
        entry["dataset"] for entry in PUBLISHED["heldout_transfer"] if "note" in entry and entry["dataset"] in keys
    ]
    tasks = [task for task in rows.taxonomy.tasks.values() if set(unseen) & set(task.datasets)]
    out = {*keys, *(key for task in tasks for key in task.datasets)}
    there = {rows.columns.datasets[code] for code in set(rows.columns.dataset_codes.tolist())}
    kept = tuple(sorted(there - out))
    if not kept:
        fix = "Hold fewer datasets out."
        raise InputError("nothing is left to pretrain on", where=str(rows.root), fix=fix)
    return kept


def _tested(folder: Path, key: str, config: SftConfig, progress: ShowProgress) -> Transfer:
    scores: dict[str, Scored] = {}
    nothing = Scored(score=None, ci95=None)
    only = Selection(datasets=(key,))
    settings = PredictConfig(loader=config.loader, dtype=config.model.dtype, attention=config.model.attention)
    for start in STARTS:
        run = folder / start
        with progress(f"predict {key}, {start}") as show:
            predict_run(str(run), run, atlas=config.atlas, split="test", config=settings, progress=show, selection=only)
        metrics = score_run(run)
        # One dataset's rows are of one task, or of none; and a task may have no score on them.
        name, found = next(iter(metrics.tasks.items()), ("", None))
        scores[start] = nothing if found is None else Scored(score=found.score, ci95=found.ci95)
    compared = compare_runs(folder / "direct", folder / "pretrained").paired.tasks.get(name)
    difference = nothing if compared is None else Scored(score=compared.difference, ci95=compared.ci95)
    published = published_table("hba_transfer").get(PUBLISHED_ROWS.get(key, ""))
    return Transfer(
        dataset=key,
        task=name,
        metric="" if found is None else found.metric,
        epochs=LONGER_EPOCHS.get(key, 1),
        n=metrics.datasets[key].n,
        **scores,
        difference=difference,
        p_value=None if compared is None else compared.p_value,
        published=published,
    )
