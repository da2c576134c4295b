"""BAM, stage 3: adapters over descriptors correct what stage 1 or 2 says, dataset by dataset.

Each dataset has adapters of its own (model/bam.py); one run trains those of one, several or all datasets, in batches
of one dataset each. Stages: `adapters` alone, `adapters+heads`, or `full`, the backbone too. In the first two the
backbone is frozen: its states are computed once and cached, and an epoch costs a small MLP. Classification rows take
the loss of stage 1, free-form rows that of stage 2.

A row that has a medium but no descriptor of it stops the run, by name, unless `descriptors.allow_missing`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hba.atlas import Atlas, data_record, open_atlas
from hba.batch.encode import IGNORED, Batch, Encoder
from hba.batch.loader import load_batches
from hba.batch.sampler import Indices
from hba.errors import InputError
from hba.evaluate.backends.interface import evaluation_plan
from hba.evaluate.metrics import score
from hba.model import checkpoint
from hba.model.bam import FOLDER, AdapterSpec, Bam, load_bam, save_bam
from hba.model.generate import media_token_ids
from hba.model.heads import DomainHeads, token_loss
from hba.model.omni import OmniSapiens, apply_strategy, config_of
from hba.model.process import prepare_process, start_accelerator
from hba.run import RunFolder
from hba.train.config import BamConfig, refuse_windows_of_shards
from hba.train.features import (
    Descriptors,
    FeatureBatch,
    FrozenBase,
    cached_batches,
    described_datasets,
    features,
    fitting,
    is_free_form,
    read_descriptors,
    streamed_batches,
    training_matrix,
)
from hba.train.loop import Stage, Validation, planned_rows, run_training, training_plan
from hba.train.qa import Progressed
from hba.train.ranks import Ranks
from hba.train.scores import after_bam, exact, exact_matches, mean_over_tasks
from hba.train.state import Progress, latest


class AdaptedLogits(NamedTuple):
    """What adapted states lead to: logits over the classes, or over the tokens of the answers."""

    logits_BC: Tensor
    answer_logits_NV: Tensor | None


class AdaptedHeads(nn.Module):
    """Adapters in front of the heads and lm_head of a frozen backbone; the model of the stages that are cached."""

    def __init__(self, bam: Bam, heads: DomainHeads, lm_head: nn.Module | None) -> None:
        super().__init__()
        self.bam, self.heads, self.lm_head = bam, heads, lm_head

    def forward(self, batch: FeatureBatch) -> AdaptedLogits:
        """Class logits [B, C] of classification rows, token logits [L, V] of free-form ones."""
        datasets = [sample.dataset for sample in batch.samples]
        if batch.tokens_L is None:
            adapted_BH = self.bam(batch.states_LH, datasets, batch.descriptors)
            return AdaptedLogits(self.heads(adapted_BH, batch.domain_names), None)
        assert self.lm_head is not None  # built with one where a dataset is free-form
        zeros_BH = batch.states_LH.new_zeros(len(batch), batch.states_LH.shape[1])
        delta_BH = self.bam(zeros_BH, datasets, batch.descriptors)
        states_LH = batch.states_LH.float() + delta_BH.repeat_interleave(batch.lengths_B, 0)
        weight = next(self.lm_head.parameters())
        return AdaptedLogits(self.heads(zeros_BH, batch.domain_names), self.lm_head(states_LH.to(weight.dtype)))


def train_bam(config: BamConfig, run: RunFolder, progress: Progressed = lambda done, total: None) -> Progress:
    """Run (or resume) stage 3 in `run`. Raises InputError for bad data or config, HbaError for a failing step."""
    ranks = Ranks(start_accelerator(config.dtype))
    prepare_process(config.train.seed)
    opened = open_atlas(config.atlas, split=config.train_split)
    keys = described_datasets(opened, config.datasets)
    held_out = open_atlas(config.atlas, split=config.validation_split, taxonomy=opened.taxonomy)
    train, validation = Rows.of(opened, keys, config), Rows.of(held_out, keys, config)
    run.record_data(data_record(config.atlas, train.atlas))
    base = FrozenBase(config.base, dtype=config.dtype, attention=config.attention, taxonomy=opened.taxonomy)
    if config.stage == "full":
        refuse_windows_of_shards(base.encode, config.train)
    columns, heads = train.atlas.columns, config.stage != "adapters"
    how = (columns, train.atlas.estimated_tokens, config.mix, config.train, columns.dataset_codes.astype(np.int64))
    reached = {columns.datasets[code] for code in columns.dataset_codes[planned_rows(*how)]} if heads else keys
    domains = after_bam(base.card, reached, base.taxonomy, base.folder, heads=heads)
    resume = ranks.told(latest(run.checkpoints))
    bam = build_bam(config, keys, train, base, resume)
    train, validation = (rows._replace(descriptors=fitting(*rows, bam.dims)) for rows in (train, validation))
    model = build_model(config, bam, base, resume, speaks=any(is_free_form(opened, key) for key in keys))
    give, give_validation = (batch_source(config, base, bam, rows, progress, ranks) for rows in (train, validation))
    if config.features.cache:
        base.release()
    plan = training_plan(*how, rank=ranks.rank, world=ranks.world)
    held_out_plan = validation.plan(config.features.batch_size)[ranks.rank :: ranks.world]
    stage: Stage[Any] = Stage(
        model=model,
        loss=bam_loss,
        batches=give,
        validate=lambda: validate_bam(model, base, give_validation(held_out_plan, 0), validation.atlas, run, ranks),
        save_model=lambda folder: save_checkpoint(config, model, base, domains, folder),
        learning_rates={"bam.": config.adapter_learning_rate},
    )
    return run_training(stage, plan, config.train, ranks, run)


class Rows(NamedTuple):
    """The rows of a split that get adapters, with their descriptors."""

    atlas: Atlas
    descriptors: Descriptors

    @classmethod
    def of(cls, atlas: Atlas, keys: list[str], config: BamConfig) -> Rows:
        """The rows of the datasets `keys`. Raises InputError for missing descriptors."""
        chosen = atlas.filter(datasets=keys)
        return cls(chosen, read_descriptors(chosen, config.descriptors))

    def plan(self, batch_size: int) -> list[Indices]:
        """Every row once, in batches of one dataset."""
        codes_N = self.atlas.columns.dataset_codes
        views = [np.flatnonzero(codes_N == code) for code in np.unique(codes_N)]
        return [batch for rows_M in views for batch in evaluation_plan(self.atlas, rows_M, batch_size)]


def build_bam(config: BamConfig, keys: list[str], train: Rows, base: FrozenBase, resume: Path | None) -> Bam:
    """Fresh adapters, which change nothing yet, or those of the checkpoint at which a run resumes."""
    if resume is not None:
        loaded = load_bam(resume, base.hidden_size)
        if loaded is None:
            fix = "Remove the checkpoint; the run then goes on from the one before, or from its start."
            raise InputError("holds no adapters", where=str(resume), fix=fix)
        return loaded
    torch.manual_seed(config.train.seed)
    matrices = {key: training_matrix(train.atlas, train.descriptors, key) for key in keys}
    bam = Bam([_spec(config, key, matrices[key]) for key in keys], base.hidden_size)
    for key, by_modality in matrices.items():
        for modality, f_NF in by_modality.items():
            adapter = bam.adapters(key).adapter(modality)
            if adapter is not None:
                adapter.start(f_NF if config.standardise else None)
    return bam


def _spec(config: BamConfig, key: str, matrix: dict[str, Tensor]) -> AdapterSpec:
    return AdapterSpec(
        dataset=key,
        dims={modality: f_NF.shape[1] for modality, f_NF in matrix.items()},
        hidden=config.hidden,
        dropout=config.dropout,
        modality_dropout=config.modality_dropout,
        layer_norm=config.layer_norm,
        descriptors=config.descriptors,
    )


def build_model(
    config: BamConfig, bam: Bam, base: FrozenBase, resume: Path | None, *, speaks: bool
) -> AdaptedHeads | OmniSapiens:
    """What the loop trains, with requires_grad set for the stage: the adapters, the heads, or the whole model."""
    if config.stage == "full":
        name, strategy = base.folder if resume is None else resume, base.card["strategy"]
        # Weights that train keep float32 masters; the configured dtype is for those that do not.
        dtype = "float32" if strategy == "full" else config.dtype
        how: dict[str, Any] = {"attention": config.attention, "mapped": config.train.sharding == "full"}
        model = OmniSapiens.from_pretrained(name, dtype=dtype, taxonomy=base.taxonomy, **how)
        model.bam = bam
        return apply_strategy(model, config_of(model, str(name), strategy))
    heads = checkpoint.load_heads(base.folder if resume is None else resume)
    heads.requires_grad_(config.stage == "adapters+heads")
    return AdaptedHeads(bam, heads, base.lm_head() if speaks else None)


def batch_source(config: BamConfig, base: FrozenBase, bam: Bam, rows: Rows, progress: Progressed, ranks: Ranks) -> Any:
    """What gives the batches of a plan over `rows`: of the cache, of the frozen backbone, or for the whole model."""
    atlas = rows.atlas
    speaks = any(is_free_form(atlas, key) for key in bam.datasets)
    descriptors, dims = bam.descriptors, bam.dims
    encoder = Encoder(base.processor, base.encode, atlas.taxonomy, answers=speaks, descriptors=descriptors, dims=dims)
    loader = config.features.loader
    if config.stage == "full":
        return lambda plan, start: load_batches(atlas, encoder, plan, loader, start=start)
    if not config.features.cache:
        return lambda plan, start: streamed_batches(atlas, base, encoder, plan, loader, start)
    caches = features(base, atlas, config.features, progress, ranks)
    return lambda plan, start: cached_batches(atlas, caches, plan, rows.descriptors, start)


def answer_parts(batch: FeatureBatch | Batch) -> tuple[Tensor, Tensor] | None:
    """The tokens [L] of a free-form batch's answers and how many are each sample's [B]; None for rows with classes."""
    if batch.domain_names[0] is not None:
        return None
    if isinstance(batch, FeatureBatch):
        return None if batch.tokens_L is None else (batch.tokens_L, batch.lengths_B)
    assert batch.labels_BT is not None  # the encoder gives every free-form row its answer
    labelled_BT = batch.labels_BT != IGNORED
    return batch.labels_BT[labelled_BT], labelled_BT.sum(1)


def bam_loss(model: nn.Module, batch: FeatureBatch | Batch) -> Tensor:
    """Cross-entropy over each row's own classes, or over the tokens of its answer, summed over the batch."""
    output = model(batch)
    answers = answer_parts(batch)
    if answers is not None:
        return token_loss(output.answer_logits_NV, *answers)
    return F.cross_entropy(output.logits_BC, batch.class_index_B, reduction="sum")


def validate_bam(
    model: AdaptedHeads | OmniSapiens,
    base: FrozenBase,
    batches: Iterable[FeatureBatch | Batch],
    rows: Atlas,
    run: RunFolder,
    ranks: Ranks,
) -> Validation:
    """The published metrics of classification rows, exact match of free-form ones; the mean over tasks decides.

    Samples that cannot be read go into the run's quarantine.
    """
    labels: list[tuple[str | None, str, str]] = []
    right: list[tuple[str, bool]] = []
    names = rows.taxonomy.class_names
    with torch.no_grad():
        for batch in batches:
            run.quarantine.add_all(batch.quarantined)
            if not len(batch):
                continue
            moved = batch.to(ranks.device)
            output, answers = model(moved), answer_parts(moved)
            if answers is not None:
                banned = media_token_ids(base.config, base.processor)
                hits_B = exact(output.answer_logits_NV, *answers, banned)
                right += zip([sample.dataset for sample in batch.samples], hits_B, strict=True)
                continue
            best_B = output.logits_BC.argmax(1).tolist()
            labels += [(names[i], s.target, s.dataset) for i, s in zip(best_B, batch.samples, strict=True)]
    said, answered = ranks.gather(labels), ranks.gather(right)
    scores: dict[str, float | None] = {}
    if said:
        answers_N, targets_N, keys_N = zip(*said, strict=True)
        tasks = score(answers_N, targets_N, keys_N, taxonomy=rows.taxonomy)["tasks"]
        scores = {key: task["score"] for key, task in tasks.items()}
    return mean_over_tasks(scores | exact_matches(rows, answered), rows, len(said) + len(answered))


def save_checkpoint(
    config: BamConfig, model: AdaptedHeads | OmniSapiens, base: FrozenBase, domains: list[str] | None, folder: Path
) -> None:
    """Write a checkpoint that `OmniSapiens.from_pretrained` loads: what was frozen is linked from the base."""
    if isinstance(model, OmniSapiens):
        known = {name: base.card.get(name, False) for name in ("strategy", "speaks")}
        backbone = checkpoint.backbone_of(str(base.folder))
        model.save_pretrained(folder, backbone=backbone, encode=base.encode, domains=domains, **known)
        return
    trained = [FOLDER, *([checkpoint.HEADS] if config.stage == "adapters+heads" else [])]
    checkpoint.link(base.folder, folder, without=trained, domains=domains)
    save_bam(model.bam, folder)
    if config.stage == "adapters+heads":
        checkpoint.save_heads(model.heads, folder)
