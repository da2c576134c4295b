"""verl's `data.custom_cls`: the rows of a run as prompts, and their media when a prompt is about to be sampled.

A row is a few hundred bytes of text; media are decoded when its prompt is built, and a sample whose media cannot be
read is named in the run's quarantine.jsonl. The order of the prompts is `PlanSampler`'s.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from hba.atlas import Atlas
from hba.atlas.media import SAMPLE_RATE, Video
from hba.atlas.rows import Sample
from hba.batch.config import Media, load_media, messages_of
from hba.batch.prompt import FormatMix, PlainText
from hba.batch.sampler import Indices
from hba.config import load_config
from hba.errors import InputError, MediaError
from hba.rl.config import RlConfig
from hba.rl.evaluation import answer_of, is_right
from hba.rl.evaluation_log import WAYS, mean_parts
from hba.rl.prompts import training_rows, validation_rows
from hba.rl.rewards import well_formed
from hba.rl.verl.config import AGENT, SIGNAL_PART, TRAINING, VALIDATION
from hba.run import QuarantineLog
from hba.taxonomy import Taxonomy
from hba.train.loop import training_plan

# From a run folder to its rows, in each of verl's processes: opened once, named by role and number.
#
# Messages carry a reference to a medium, never its bytes: verl copies every column for every rollout.


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


# The evaluations of a run on verl in the local engine's form: evaluations/step_N.jsonl, one line a held-out prompt.
#
# verl validates with one way of sampling and keeps means. Each row stands in its validation set once a response, the
# reward manager adds the evaluation's judgement, the answer and the row's number to the parts of a reward, and the
# trainer puts the responses to a row together again. A row of which one response is missing (its media cannot be read)
# is left out.


ROW, WAY = "hba_row", "hba_way"  # which response it is, as numbers
ANSWER = "hba_answer"  # what is read in it, a text
OURS = (ROW, WAY, ANSWER, SIGNAL_PART)  # among the parts of a reward, of which verl makes means


def ways(draws: int) -> tuple[str, ...]:
    """How each of the responses to a row is made: `draws` are sampled, one is greedy."""
    return ("sampled",) * draws + ("greedy",)


def verdict(sample: Sample, text: str, row: int, way: str, taxonomy: Taxonomy) -> dict[str, float | str]:
    """What an evaluation says of a response beyond the parts of its reward, and which response it is."""
    judged: dict[str, float | str] = {
        "right": float(is_right(sample, text, taxonomy)),
        "format": float(well_formed(text)),
        ANSWER: answer_of(sample, text, taxonomy),
    }
    return {**judged, ROW: float(row), WAY: float(WAYS.index(way))}


def records(atlas: Atlas, parts: Mapping[str, Sequence[Any]], draws: int) -> list[dict[str, Any]]:
    """One record a row of `atlas` with the parts both ways, means over `draws` sampled responses, in the atlas' order.

    `parts` are columns, a value a response: `ROW`, `WAY`, `ANSWER`, tokens, right, format and the parts of the reward.
    """
    by_row: dict[int, dict[str, list[dict[str, float]]]] = defaultdict(lambda: {way: [] for way in WAYS})
    greedy: dict[int, str] = {}
    names = [name for name in parts if name not in (*OURS, "reward")]  # reward is verl's name of the score
    for i, (row, way) in enumerate(zip(parts[ROW], parts[WAY], strict=True)):
        by_row[int(row)][WAYS[int(way)]].append({name: parts[name][i] for name in names})
        if WAYS[int(way)] == "greedy":
            greedy[int(row)] = parts[ANSWER][i]
    found = []
    for row, responses in by_row.items():
        if all(len(made) == ways(draws).count(way) for way, made in responses.items()):
            sample = atlas[row]
            identity = {"id": sample.id, "task": sample.task, "dataset": sample.dataset, "number": sample.number}
            means = {way: mean_parts(made) for way, made in responses.items()}
            found.append({**identity, "target": sample.target, **means, "answer": greedy[row]})
    return sorted(found, key=lambda record: int(record["number"]))


# --- the dataset of verl ----------------------------------------------------------------------------------------------


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
    single = replace(config.train, accumulation=1, device_batch_size=None, device_tokens=None)
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
