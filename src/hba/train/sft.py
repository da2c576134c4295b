"""SFT stage 1: LoRA (or everything) and one classification head a domain, on what the model sees, hears and reads.

The loss is the cross-entropy over the classes of each row's domain, from the masked mean of the penultimate hidden
states (paper, SFT; formulas "Pooling and heads"). With `answer_weight` the same forward pass also trains the answer as
text, response tokens only: that is how a backbone with random weights learns to speak before later stages use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hba.atlas import Atlas
from hba.atlas.rows import Quarantined
from hba.batch.encode import Batch, Encoder
from hba.batch.loader import load_batches
from hba.batch.sampler import Indices
from hba.errors import InputError
from hba.evaluate.backends.heads import HeadsBackend
from hba.evaluate.backends.interface import answerable, predict
from hba.evaluate.metrics import score
from hba.evaluate.predictions import Prediction
from hba.model import checkpoint
from hba.model.heads import answer_loss
from hba.model.omni import OmniOutput, OmniSapiens
from hba.run import RunFolder
from hba.taxonomy import Taxonomy
from hba.train.config import SftConfig
from hba.train.loop import Stage, Validation, begin, load_model, mean_over_tasks, planned_rows, rows_of, train_stage
from hba.train.ranks import Ranks
from hba.train.state import Progress


def train_sft(config: SftConfig, run: RunFolder) -> Progress:
    """Run (or resume) stage 1 in `run`. Raises InputError for bad data or config, HbaError for a failing step."""
    ranks, train, validation, resume = begin(config, run, config.model.dtype, partial(training_rows, config=config))
    validation, taxonomy = rows_of(validation, config.datasets, free_form=False), train.taxonomy
    domains = after_sft(train, planned_rows(train, config), config.model.name)
    require_trained(validation, domains)
    checkpoint.require_perceived(config.model.name, config.encode, train)
    model = build_model(config, resume, taxonomy)
    encoder = Encoder(model.processor, config.encode, taxonomy)
    options: dict[str, Any] = {"batch_size": config.validation_batch_size, "loader": config.loader}
    backend = HeadsBackend(model, encoder, domains=domains, size_key="validation_batch_size", **options)
    train_encoder = Encoder(model.processor, config.encode, taxonomy, answers=config.answer_weight > 0)
    stage = Stage(
        model=model,
        loss=partial(sft_loss, answer_weight=config.answer_weight),
        batches=lambda plan, start: load_batches(train, train_encoder, plan, config.loader, start=start),
        validate=partial(validate_heads, backend, validation, run, ranks),
        save_model=partial(save_checkpoint, model, config, domains),
        learning_rates={},
    )
    return train_stage(stage, config, run, ranks, train, config.encode)


def sft_loss(model: nn.Module, batch: Batch, *, answer_weight: float) -> Tensor:
    """Cross-entropy over each row's own classes plus the weighted answer loss, summed over the batch."""
    output: OmniOutput = model(batch)
    assert output.logits_BC is not None  # stage 1 has heads
    # Free-form rows have no classes: every logit of theirs is -inf, and not even their gradient may be touched. Which
    # they are is read from the batch's names: the host would have to wait for a mask on the device.
    rows = [row for row, name in enumerate(batch.domain_names) if name is not None]
    loss = F.cross_entropy(output.logits_BC[rows], batch.class_index_B[rows], reduction="sum")
    if batch.labels_BT is None or output.answer_logits_NV is None:
        return loss
    return loss + answer_weight * answer_loss(output.answer_logits_NV, batch.labels_BT)


def training_rows(atlas: Atlas, config: SftConfig) -> Atlas:
    """The rows that stage 1 trains on: those of a domain, and free-form ones where answers are trained as text."""
    if config.answer_weight > 0:
        return atlas.filter(datasets=config.datasets)
    return rows_of(atlas, config.datasets, free_form=False)


def after_sft(train: Atlas, rows: Indices, start: str) -> list[str] | None:
    """The domains whose heads are trained at the end: those of `rows` of `train`, and those of the checkpoint `start`.

    What another head says is noise: it is not scored. A checkpoint's card names them; None stands for all, as of the
    checkpoints that the authors released.
    """
    base = checkpoint.resolve(start)
    card: dict[str, Any] = {"columns": None} if base is None else checkpoint.read_card(base)
    known: list[str] | None = [] if card["columns"] is None else card.get("domains")
    if known is None:
        return None
    columns = train.columns
    codes = set(columns.dataset_codes[rows].tolist())
    return sorted({*known, *domains_of(train.taxonomy, (columns.datasets[code] for code in codes))})


def require_trained(validation: Atlas, domains: list[str] | None) -> None:
    """Raise InputError when no row of `validation` belongs to a domain whose head is trained: no score is had."""
    columns = validation.columns
    found = domains_of(validation.taxonomy, (columns.datasets[code] for code in set(columns.dataset_codes.tolist())))
    if domains is not None and not found & set(domains):
        what = f"its rows are of {', '.join(sorted(found))}, the trained heads of {', '.join(domains)}"
        fix = "Give training and validation rows of one domain at least: other datasets, or other splits."
        raise InputError(what, where=f"{validation.root}, split {validation.split}", fix=fix)


def domains_of(taxonomy: Taxonomy, datasets: Iterable[str]) -> set[str]:
    """The domains of the datasets that have one."""
    return {domain for key in datasets if (domain := taxonomy.dataset(key).domain) is not None}


def build_model(config: SftConfig, resume: Path | None, taxonomy: Taxonomy) -> OmniSapiens:
    """The model to train: fresh from the backbone, or from the checkpoint that a run resumes at."""
    torch.manual_seed(config.train.seed)
    return load_model(config.model, resume, mapped=config.train.sharding == "full", taxonomy=taxonomy)


def save_checkpoint(model: OmniSapiens, config: SftConfig, domains: list[str] | None, folder: Path) -> None:
    """Write the model of a run as a checkpoint that `OmniSapiens.from_pretrained` loads."""
    known: dict[str, Any] = {"backbone": checkpoint.backbone_of(config.model.name), "strategy": config.model.strategy}
    speaks = config.answer_weight > 0
    model.save_pretrained(folder, encode=config.encode, speaks=speaks, domains=domains, **known)


def validate_heads(backend: HeadsBackend, atlas: Atlas, run: RunFolder, ranks: Ranks) -> Validation:
    """The published metrics of the trained heads on the validation rows; their mean over tasks chooses the checkpoint.

    Every rank answers its share of the rows and gets the score of all. Samples that cannot be read go into the run's
    quarantine. Raises InputError when none is left to score.
    """
    own = answerable(atlas, backend)[ranks.rank :: ranks.world]
    said: list[tuple[str | None, str, str]] = []
    for step in predict(atlas, backend.batches(atlas, own), backend):
        if isinstance(step, Prediction):
            said.append((step.label, str(step.target), step.dataset))  # rows of a training have answers
        elif isinstance(step, Quarantined):
            run.quarantine.add(step)
    done = ranks.gather(said)
    labels, targets, keys = zip(*done, strict=True) if done else ((), (), ())
    tasks = score(labels, targets, keys, taxonomy=atlas.taxonomy)["tasks"] if done else {}
    return mean_over_tasks({key: task["score"] for key, task in tasks.items()}, atlas, len(done))
