"""verl's `data.custom_cls`: the rows of a run as prompts, and their media when a prompt is about to be sampled.

A row is a few hundred bytes of text; media are decoded when its prompt is built, and a sample whose media cannot be
read is named in the run's quarantine.jsonl. The order of the prompts is `PlanSampler`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from hba.atlas import Atlas
from hba.atlas.batch import Media
from hba.atlas.media import Video
from hba.atlas.prompt import PlainText
from hba.atlas.sampler import Indices
from hba.errors import MediaError
from hba.quarantine import QuarantineLog
from hba.rl.config import RlConfig
from hba.rl.evaluation_log import WAYS
from hba.rl.verl.config import AGENT, VALIDATION
from hba.rl.verl.evaluation import ways
from hba.rl.verl.rows import Reference, messages, referred, row_media, run_config, run_rows
from hba.train.plan import training_plan


class AtlasDataset(Dataset[dict[str, Any]]):
    """Rows of any atlas store. `data_files` is the role: training, or validation, where each stands once a response."""

    def __init__(
        self, data_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        """verl's constructor; `config.hba_run` is the run folder. Raises InputError for rows that cannot be opened."""
        self.role = data_files if isinstance(data_files, str) else str(data_files[0])
        self.config = run_config(config.hba_run)
        asked = processor if processor is not None else tokenizer
        self._plain = str if asked is None else PlainText(asked)
        atlas = run_rows(config.hba_run, self.role)
        self.atlas = atlas if max_samples < 0 else atlas[:max_samples]

    def __len__(self) -> int:
        return len(self.atlas) * len(self._ways)

    @property
    def _ways(self) -> Sequence[str]:
        """Of the responses to a row, the copies of which are next to each other."""
        return ways(self.config.validation_draws) if self.role == VALIDATION else WAYS[:1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The columns of a prompt; verl's own names, then ours, which reach sampling, rewards and advantages."""
        row, way = divmod(int(index), len(self._ways))
        sample = self.atlas[row]
        return {
            "raw_prompt": messages(sample, self.config, Reference(self.role, row), self._plain),
            "data_source": sample.dataset,
            "reward_model": {"style": "rule", "ground_truth": sample.target},
            "extra_info": {"index": row},
            "index": row,
            "agent_name": AGENT,
            "dummy_tensor": torch.zeros(1, dtype=torch.uint8),  # verl's batches need one tensor
            "role": self.role,
            "way": self._ways[way],
            "sample_id": sample.id,
            "task": sample.task,
            "dataset": sample.dataset,
        }

    @classmethod
    async def process_multi_modal_info(
        cls, messages: list[dict[str, Any]], image_patch_size: int, config: Any
    ) -> tuple[Any, Any, Any]:
        """Images, videos and sounds that the messages refer to, decoded in a thread.

        Raises MediaError for what cannot be read, when the run's quarantine has its sample.
        """
        reference = referred(messages)
        if reference is None:
            return None, None, None
        run = str(config.hba_run)
        try:
            found: Media = await asyncio.get_running_loop().run_in_executor(None, row_media(run, reference).decoded)
        except MediaError as error:
            with QuarantineLog(Path(run)) as quarantine:  # opened anew: other processes write to it
                quarantine.add(run_rows(run, reference.role)[reference.row].quarantined(error))
            raise
        return found.images or None, [_clip(video) for video in found.videos] or None, found.audios or None


def _clip(video: Video) -> tuple[torch.Tensor, dict[str, Any]]:
    """Frames [N, 3, H, W] with the metadata that transformers and vLLM read."""
    count = len(video.frames)
    metadata = {
        "fps": video.rate_hz,
        "duration": video.duration_seconds,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "do_sample_frames": False,
    }
    return torch.from_numpy(video.frames).permute(0, 3, 1, 2), metadata


def step_rows(atlas: Atlas, config: RlConfig) -> list[Indices]:
    """The rows of each step of the run, all epochs: the batches of the training plan, in its order."""
    single = replace(config.train, accumulation=1, device_batch_size=None)
    plan = training_plan(atlas.columns, atlas.estimated_tokens, config.mix, single, rank=0, world=1)
    batches, together = plan.micro_batches, config.train.accumulation
    steps = [np.concatenate(batches[i : i + together]) for i in range(0, len(batches), together)]
    return steps if config.train.max_steps is None else steps[: config.train.max_steps]


class PlanSampler(Sampler[int]):
    """The rows of all steps in one row; a resumed loader skips those that were taken, without touching them."""

    def __init__(self, atlas: Atlas, config: RlConfig) -> None:
        self.steps = step_rows(atlas, config)

    def __len__(self) -> int:
        return sum(map(len, self.steps))

    def __iter__(self) -> Iterator[int]:
        return map(int, chain.from_iterable(self.steps))
