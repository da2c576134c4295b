"""QA, stage 2: lm_head learns to answer the free-form rows; backbone and heads stay as stage 1 left them, to the bit.

The loss is the next-token cross-entropy of the answer alone, end token included (formulas, "Pooling and heads"). What
lm_head reads, the normed last hidden states in front of the answer's tokens, never changes: it is computed once and
cached, and an epoch costs one matrix. An answer that is right at every token under teacher forcing is what greedy
decoding gives, so that validation needs no decoding either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hba.atlas import Atlas
from hba.batch.encode import Encoder
from hba.batch.sampler import Indices
from hba.errors import InputError
from hba.evaluate.backends.interface import evaluation_plan
from hba.model import checkpoint
from hba.model.generate import media_token_ids
from hba.model.heads import CHUNK_VALUES
from hba.run import RunFolder
from hba.storage import halved, room
from hba.train.config import FeatureConfig, QaConfig
from hba.train.features import FeatureBatch, FrozenBase, LanguageHead, cached_batches, features, streamed_batches
from hba.train.loop import KEPT, Stage, Validation, begin, mean_over_tasks, rows_of, train_stage
from hba.train.ranks import Ranks
from hba.train.state import Progress

Progressed = Callable[[int, int], None]
BatchSource = Callable[[Sequence[Indices], int], Iterator[FeatureBatch]]


def train_qa(config: QaConfig, run: RunFolder, progress: Progressed = lambda done, total: None) -> Progress:
    """Run (or resume) stage 2 in `run`. Raises InputError for bad data or config, HbaError for a failing step."""
    free_form = partial(rows_of, datasets=config.datasets, free_form=True)
    ranks, train, validation, resume = begin(config, run, config.dtype, free_form)
    how: dict[str, Any] = {"dtype": config.dtype, "attention": config.attention, "quantization": config.quantization}
    base = FrozenBase(config.base, taxonomy=train.taxonomy, **how)
    shape, _ = base.stored_lm_head()  # before features are made
    if resume is not None:
        checkpoint.stored_lm_head(resume, shape)
    give, give_validation = (batch_source(base, rows, config.features, progress, ranks) for rows in (train, validation))
    if config.features.cache:
        base.release()
    lm_head = build_lm_head(base, resume)
    held_out = evaluation_plan(validation, torch.arange(len(validation)).numpy(), config.features.batch_size)
    own = held_out[ranks.rank :: ranks.world]
    stage = Stage(
        model=lm_head,
        loss=qa_loss,
        batches=give,
        validate=partial(validate_answers, lm_head, base, give_validation, own, validation, run, ranks),
        save_model=partial(save_lm_head, base, lm_head),
        learning_rates={},
    )
    return train_stage(stage, config, run, ranks, train, base.encode)


def qa_loss(lm_head: nn.Module, batch: FeatureBatch) -> Tensor:
    """Cross-entropy of the answers' tokens, the mean over each row's, summed over the rows."""
    loss: Tensor = lm_head(batch.states_LH, answer_tokens(batch), batch.lengths_B)
    return loss


def answer_tokens(batch: FeatureBatch) -> Tensor:
    """The tokens of the answers [L]. Raises InputError for a batch of classification rows."""
    if batch.tokens_L is None:
        raise InputError("rows with classes have no answer to train lm_head on", fix="Choose free-form datasets.")
    return batch.tokens_L


def exact(logits_LV: Tensor, tokens_L: Tensor, lengths_B: Tensor, banned: Sequence[int]) -> list[bool]:
    """Whether greedy decoding gives each answer whole: every token the most probable one behind those before it."""
    return whole_answers(_likeliest(logits_LV, banned) == tokens_L, lengths_B)


def right_tokens(states_LH: Tensor, lm_head: nn.Module, tokens_L: Tensor, banned: Sequence[int]) -> Tensor:
    """Which tokens greedy decoding gives [L], from the states in front of them; logits are made of a part at a time."""
    parts = torch.split(states_LH, max(1, CHUNK_VALUES // len(lm_head.get_parameter("weight"))))
    return torch.cat([_likeliest(lm_head(part), banned) for part in parts]) == tokens_L


def _likeliest(logits_LV: Tensor, banned: Sequence[int]) -> Tensor:
    banned_ids = torch.tensor(list(banned), dtype=torch.long, device=logits_LV.device)
    return logits_LV.float().index_fill(1, banned_ids, -torch.inf).argmax(1)


def whole_answers(right_L: Tensor, lengths_B: Tensor) -> list[bool]:
    """Whether all tokens of each answer are right."""
    return [bool(part_L.all()) for part_L in torch.split(right_L, lengths_B.tolist())]


def exact_matches(rows: Atlas, said: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """The exact match of each task: the mean over its datasets of the share of answers that are right."""
    by_task: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for key, right in said:
        by_task[str(rows.taxonomy.dataset(key).task or key)][key].append(right)
    return {
        task: sum(sum(hits) / len(hits) for hits in keys.values()) / len(keys) for task, keys in sorted(by_task.items())
    }


def build_lm_head(base: FrozenBase, resume: Path | None) -> LanguageHead:
    """A trainable copy of the base's lm_head, or that of the checkpoint at which a run resumes; float32 masters.

    A copy, since the tiny backbone ties lm_head to its embeddings: training those would change the heads' outputs.
    """
    lm_head = base.lm_head()
    if resume is not None:
        lm_head.weight = nn.Parameter(checkpoint.load_lm_head(resume, lm_head.weight.shape))
    lm_head.float().requires_grad_(True)
    return lm_head


def save_lm_head(base: FrozenBase, lm_head: LanguageHead, folder: Path) -> None:
    """Write the base's checkpoint with this lm_head in the place of its own."""
    checkpoint.link(base.folder, folder, without=[checkpoint.LM_HEAD], speaks=True, quantization=base.quantization)
    checkpoint.save_lm_head(lm_head.weight, folder)


def batch_source(
    base: FrozenBase, rows: Atlas, config: FeatureConfig, progress: Progressed, ranks: Ranks
) -> BatchSource:
    """What gives the batches of a plan over `rows`: caches, filled here, or the backbone where nothing is kept."""
    if not config.cache:
        encoder = Encoder(base.processor, base.encode, rows.taxonomy, answers=True)
        return lambda plan, start: streamed_batches(rows, base, encoder, plan, config.loader, start)
    caches = features(base, rows, config, progress, ranks)
    return lambda plan, start: cached_batches(rows, caches, plan, {}, start)


def validate_answers(
    lm_head: nn.Module,
    base: FrozenBase,
    give: BatchSource,
    plan: list[Indices],
    rows: Atlas,
    run: RunFolder,
    ranks: Ranks,
) -> Validation:
    """Exact match of greedy decoding on the validation rows, per task; their mean chooses the best checkpoint.

    Samples that cannot be read go into the run's quarantine.
    """
    said: list[tuple[str, bool]] = []
    banned = media_token_ids(base.config, base.processor)
    with torch.no_grad():
        for batch in give(plan, 0):
            run.quarantine.add_all(batch.quarantined)
            if not len(batch):
                continue
            moved = batch.to(ranks.device)
            with room(batch, halved("features.batch_size", batch), fix=KEPT):
                right_L = right_tokens(moved.states_LH, lm_head, answer_tokens(moved), banned)
            hits_B = whole_answers(right_L, moved.lengths_B)
            said += zip([sample.dataset for sample in batch.samples], hits_B, strict=True)
    answered = ranks.gather(said)
    return mean_over_tasks(exact_matches(rows, answered), rows, len(answered))
