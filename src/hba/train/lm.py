"""Generative SFT: any chat model learns to answer in words, from what it sees, hears and reads.

The loss is the next-token cross-entropy of the response, the end of the turn included, teacher-forced: a mean over each
row's response tokens, then over the rows. Logits are computed for response tokens alone (`model.omni`). Every row is
asked and answered in one of the formats of the config (plain, in a box, with thinking), the same one in every epoch.
Media of modalities that are left out neither reach the model nor leave their tags in the prompt.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hba.atlas import Atlas
from hba.batch.encode import IGNORED, Batch, Encoder, encoder_for
from hba.batch.loader import load_batches
from hba.batch.prompt import FormatMix
from hba.errors import InputError
from hba.evaluate.backends.interface import evaluation_plan
from hba.model import checkpoint
from hba.model.heads import answer_loss
from hba.model.omni import OmniOutput, OmniSapiens
from hba.run import RunFolder
from hba.storage import halved, room
from hba.train.config import LmConfig
from hba.train.loop import KEPT, Stage, Validation, begin, load_model, train_stage
from hba.train.ranks import Ranks
from hba.train.state import Progress


def train_lm(config: LmConfig, run: RunFolder) -> Progress:
    """Run (or resume) it in `run`. Raises InputError for bad data or config, HbaError for a failing step."""
    of_datasets = partial(Atlas.filter, datasets=config.datasets)
    ranks, train, validation, resume = begin(config, run, config.model.dtype, of_datasets)
    checkpoint.require_perceived(config.model.name, config.encode, train)
    model = build_model(config, resume)
    wording = FormatMix(config.formats, reasoning=config.reasoning, seed=config.train.seed)
    encoder = encoder_for(model.processor, config.encode, train.taxonomy, answers=True, wording=wording)
    stage = Stage(
        model=model,
        loss=lm_loss,
        batches=lambda plan, start: load_batches(train, encoder, plan, config.loader, start=start),
        validate=partial(validate_answers, model, validation, encoder, config, run, ranks),
        save_model=partial(save_checkpoint, model, config),
        learning_rates={},
    )
    return train_stage(stage, config, run, ranks, train, config.encode)


def lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the response tokens: the mean over each row's, summed over the rows."""
    output: OmniOutput = model(batch)
    assert batch.labels_BT is not None and output.answer_logits_NV is not None  # the encoder gives answers
    return answer_loss(output.answer_logits_NV, batch.labels_BT)


def build_model(config: LmConfig, resume: Path | None) -> OmniSapiens:
    """The model to train: from the config's name, or from the checkpoint that a run resumes at."""
    torch.manual_seed(config.train.seed)
    folder = checkpoint.resolve(resume or config.model.name)
    if folder is not None and (folder / checkpoint.LM_HEAD).is_file():
        fix = "Merge it first (hba merge), or start from the run of the stage before."
        raise InputError("the checkpoint has a language head of its own from stage 2", where=str(folder), fix=fix)
    return load_model(config.model, resume, mapped=config.train.sharding == "full", heads=False)


def save_checkpoint(model: OmniSapiens, config: LmConfig, folder: Path) -> None:
    """Write the model of a run as a checkpoint that `OmniSapiens.from_pretrained` loads."""
    backbone = checkpoint.backbone_of(config.model.name)
    strategy, formats = config.model.strategy, config.formats
    model.save_pretrained(folder, backbone=backbone, strategy=strategy, encode=config.encode, formats=formats)


def validate_answers(
    model: OmniSapiens,
    atlas: Atlas,
    encoder: Encoder,
    config: LmConfig,
    run: RunFolder,
    ranks: Ranks,
) -> Validation:
    """Loss of the right responses on the validation rows, and what greedy decoding would give of them: the share of
    their tokens, end tokens not counted, and the share of whole responses, with their end.

    The lowest loss chooses the best checkpoint. Every rank takes its share of the rows and gets the figures of all.
    Raises InputError when no row is left to score.
    """
    rows = np.arange(len(atlas))[ranks.rank :: ranks.world]
    plan = evaluation_plan(atlas, rows, config.validation_batch_size)
    counts: list[tuple[float, int, int, int, int]] = []  # summed loss, rows, right tokens, tokens, right responses
    for batch in load_batches(atlas, encoder, plan, config.loader):
        run.quarantine.add_all(batch.quarantined)
        if len(batch):
            with room(batch, halved("validation_batch_size", batch), fix=KEPT):
                counts.append(_score(model, batch.to(ranks.device)))
    done = ranks.gather(counts)
    if not done:
        fix = "Repair the media named in quarantine.jsonl."
        raise InputError(f"no sample of split {atlas.split!r} can be read", where=str(atlas.root), fix=fix)
    loss, count, right, tokens, whole = map(sum, zip(*done, strict=True))
    figures = {"loss": loss / count, "token_accuracy": right / tokens, "answer_accuracy": whole / count}
    return Validation(-loss / count, figures)


@torch.inference_mode()
def _score(model: OmniSapiens, batch: Batch) -> tuple[float, int, int, int, int]:
    logits_NV = model(batch).answer_logits_NV
    assert batch.labels_BT is not None and logits_NV is not None  # the encoder gives answers
    said_BT = batch.labels_BT != IGNORED
    right_BT = torch.zeros_like(said_BT)
    right_BT[said_BT] = logits_NV.argmax(-1) == batch.labels_BT[said_BT]
    whole = int((right_BT == said_BT).all(1).sum())
    ends_B = said_BT.shape[1] - 1 - said_BT.flip(1).int().argmax(1)  # every answer closes with its end token
    rows_B = torch.arange(len(batch), device=ends_B.device)
    right = int(right_BT.sum() - right_BT[rows_B, ends_B].sum())
    return float(answer_loss(logits_NV, batch.labels_BT)), len(batch), right, int(said_BT.sum()) - len(batch), whole
