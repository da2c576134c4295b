"""BAM, stage 3: adapters over descriptors correct what stage 1 or 2 says, dataset by dataset.

Each dataset has adapters of its own (model/bam.py); one run trains those of one, several or all datasets, in batches
of one dataset each. Stages: `adapters` alone, `adapters+heads`, or `full`, the backbone too. In the first two the
backbone is frozen: its states are computed once and cached, and an epoch costs a small MLP. Classification rows take
the loss of stage 1, free-form rows that of stage 2.

A row that has a medium but no descriptor of it stops the run, by name, unless `descriptors.allow_missing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hba.atlas import Atlas
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
from hba.run import RunFolder
from hba.storage import halved, room
from hba.taxonomy import Taxonomy
from hba.train.config import BamConfig, refuse_quantized_training, refuse_windows_of_shards
from hba.train.features import (
    Descriptors,
    FeatureBatch,
    FrozenBase,
    LanguageHead,
    cached_batches,
    described_datasets,
    features,
    fitting,
    is_free_form,
    read_descriptors,
    streamed_batches,
    training_matrix,
)
from hba.train.loop import KEPT, Stage, Validation, begin, mean_over_tasks, planned_rows, train_stage
from hba.train.qa import Progressed, exact, exact_matches, right_tokens, whole_answers
from hba.train.ranks import Ranks
from hba.train.sft import domains_of
from hba.train.state import Progress


class AdaptedOutput(NamedTuple):
    """What adapted states lead to: logits over the classes, or what was asked about the answers."""

    logits_BC: Tensor | None
    answers: Tensor | None


class AdaptedHeads(nn.Module):
    """Adapters in front of the heads and lm_head of a frozen backbone; the model of the stages that are cached."""

    def __init__(self, bam: Bam, heads: DomainHeads, lm_head: LanguageHead | None) -> None:
        super().__init__()
        self.bam, self.heads, self.lm_head = bam, heads, lm_head

    def forward(
        self, batch: FeatureBatch, read: Callable[[Tensor, LanguageHead], Tensor] | None = None
    ) -> AdaptedOutput:
        """Class logits [B, C] of classification rows; of free-form ones what `read` gives for the adapted states [L, H]
        and lm_head, whose logits it need not have all at once."""
        datasets = [sample.dataset for sample in batch.samples]
        if read is None:
            adapted_BH = self.bam(batch.states_LH, datasets, batch.descriptors)
            return AdaptedOutput(self.heads(adapted_BH, batch.domain_names), None)
        assert self.lm_head is not None  # built with one where a dataset is free-form
        zeros_BH = batch.states_LH.new_zeros(len(batch), batch.states_LH.shape[1])
        delta_BH = self.bam(zeros_BH, datasets, batch.descriptors)
        states_LH = batch.states_LH.float() + delta_BH.repeat_interleave(batch.lengths_B, 0)
        return AdaptedOutput(None, read(states_LH, self.lm_head))


def train_bam(config: BamConfig, run: RunFolder, progress: Progressed = lambda done, total: None) -> Progress:
    """Run (or resume) stage 3 in `run`. Raises InputError for bad data or config, HbaError for a failing step."""
    keys: list[str] = []

    def described(atlas: Atlas) -> Atlas:
        keys[:] = keys or described_datasets(atlas, config.datasets)  # of the training rows, which are opened first
        return atlas.filter(datasets=keys)

    ranks, *opened, resume = begin(config, run, config.dtype, described)
    train, validation = (Rows(atlas, read_descriptors(atlas, config.descriptors)) for atlas in opened)
    columns, taxonomy = train.atlas.columns, train.atlas.taxonomy
    how: dict[str, Any] = {"dtype": config.dtype, "attention": config.attention, "quantization": config.quantization}
    base = FrozenBase(config.base, taxonomy=taxonomy, **how)
    if config.stage == "full":
        refuse_quantized_training(base.quantization, base.card["strategy"], config.train, where="quantization")
        refuse_windows_of_shards(base.encode, config.train)
    groups_N, heads = columns.dataset_codes.astype(np.int64), config.stage != "adapters"
    reached: Iterable[str] = keys
    if heads:
        reached = {columns.datasets[code] for code in groups_N[planned_rows(train.atlas, config, groups_N)]}
    domains = after_bam(base.card, reached, taxonomy, base.folder, heads=heads)
    bam = build_bam(config, keys, train, base, resume)
    speaks = any(is_free_form(train.atlas, key) for key in keys)
    if speaks and config.stage != "full":
        base.stored_lm_head()  # before features are made
    train, validation = (rows._replace(descriptors=fitting(*rows, bam.dims)) for rows in (train, validation))
    give, give_validation = (batch_source(config, base, bam, rows, progress, ranks) for rows in (train, validation))
    if config.features.cache:
        base.release()
    model = build_model(config, bam, base, resume, speaks=speaks)
    held_out_plan = validation.plan(config.features.batch_size)[ranks.rank :: ranks.world]
    stage: Stage[Any] = Stage(
        model=model,
        loss=bam_loss,
        batches=give,
        validate=lambda: validate_bam(model, base, give_validation(held_out_plan, 0), validation.atlas, run, ranks),
        save_model=lambda folder: save_checkpoint(config, model, base, domains, folder),
        learning_rates={"bam.": config.adapter_learning_rate},
    )
    return train_stage(stage, config, run, ranks, train.atlas, base.encode, groups_N)


class Rows(NamedTuple):
    """The rows of a split that get adapters, with their descriptors."""

    atlas: Atlas
    descriptors: Descriptors

    def plan(self, batch_size: int) -> list[Indices]:
        """Every row once, in batches of one dataset."""
        codes_N = self.atlas.columns.dataset_codes
        views = [np.flatnonzero(codes_N == code) for code in np.unique(codes_N)]
        return [batch for rows_M in views for batch in evaluation_plan(self.atlas, rows_M, batch_size)]


def after_bam(
    card: dict[str, Any], datasets: Iterable[str], taxonomy: Taxonomy, base: Path, *, heads: bool
) -> list[str] | None:
    """The domains of trained heads: of the checkpoint `base` with this `card`, and of `datasets` if `heads` train, too.

    Raises InputError for adapters alone before a head that was never trained.
    """
    known: list[str] | None = card.get("domains")
    if known is None:
        return None
    wanted = domains_of(taxonomy, datasets)
    if not heads and (fresh := wanted - set(known)):
        fix = "Leave its datasets out (datasets=[...]), use stage=adapters+heads, or train its head first (train sft)."
        raise InputError(f"no head of {', '.join(sorted(fresh))} was trained", where=str(base), fix=fix)
    return sorted({*known, *wanted})


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
    specs = [
        AdapterSpec(
            dataset=key,
            dims={modality: f_NF.shape[1] for modality, f_NF in matrices[key].items()},
            hidden=config.hidden,
            dropout=config.dropout,
            modality_dropout=config.modality_dropout,
            layer_norm=config.layer_norm,
            descriptors=config.descriptors,
        )
        for key in keys
    ]
    bam = Bam(specs, base.hidden_size)
    for key, by_modality in matrices.items():
        for modality, f_NF in by_modality.items():
            adapter = bam.adapters(key).adapter(modality)
            if adapter is not None:
                adapter.start(f_NF if config.standardise else None)
    return bam


def build_model(
    config: BamConfig, bam: Bam, base: FrozenBase, resume: Path | None, *, speaks: bool
) -> AdaptedHeads | OmniSapiens:
    """What the loop trains, with requires_grad set for the stage: the adapters, the heads, or the whole model."""
    if config.stage == "full":
        name, strategy = base.folder if resume is None else resume, base.card["strategy"]
        # Weights that train keep float32 masters; the configured dtype is for those that do not.
        dtype = "float32" if strategy == "full" else config.dtype
        how: dict[str, Any] = {"attention": config.attention, "mapped": config.train.sharding == "full"}
        how["quantization"] = base.quantization
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
    answers = answer_parts(batch)
    if answers is None:
        return F.cross_entropy(model(batch).logits_BC, batch.class_index_B, reduction="sum")
    if isinstance(batch, FeatureBatch):
        loss: Tensor = model(batch, lambda states_LH, lm_head: lm_head(states_LH, *answers)).answers
        return loss
    return token_loss(model(batch).answer_logits_NV, *answers)


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
    names, banned = rows.taxonomy.class_names, media_token_ids(base.config, base.processor)
    with torch.no_grad():
        for batch in batches:
            run.quarantine.add_all(batch.quarantined)
            if not len(batch):
                continue
            moved = batch.to(ranks.device)
            answers = answer_parts(moved)
            with room(batch, halved("features.batch_size", batch), fix=KEPT):
                if answers is None:
                    best_B = model(moved).logits_BC.argmax(1).tolist()
                elif isinstance(moved, FeatureBatch):
                    right_L = model(moved, partial(right_tokens, tokens_L=answers[0], banned=banned)).answers
                    hits_B = whole_answers(right_L, answers[1])
                else:
                    hits_B = exact(model(moved).answer_logits_NV, *answers, banned)
            if answers is not None:
                right += zip([sample.dataset for sample in batch.samples], hits_B, strict=True)
                continue
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
    checkpoint.link(base.folder, folder, without=trained, domains=domains, quantization=base.quantization)
    save_bam(model.bam, folder)
    if config.stage == "adapters+heads":
        checkpoint.save_heads(model.heads, folder)
