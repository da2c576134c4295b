"""Batches of features for the stages that stand on a frozen backbone: from its cache, or from the backbone itself.

`FrozenBase` is the checkpoint that a stage starts from; its backbone is loaded only when features are missing.
`features` fills the caches of the datasets that a stage uses and opens them. Cached or not, the same plan gives the
same `FeatureBatch`es to float tolerance, and the loop cannot tell them apart.

Shapes: B samples, L states of all samples in a row, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor

from hba.atlas import Atlas
from hba.atlas.batch import IGNORED, Batch, Encoder, collate
from hba.atlas.config import EncodeConfig, LoaderConfig
from hba.atlas.loader import load_batches
from hba.atlas.sample import Quarantined, Sample
from hba.atlas.sampler import Indices
from hba.errors import InputError
from hba.evaluate.backends.batches import evaluation_plan
from hba.model import checkpoint, heads
from hba.model.omni import OmniSapiens
from hba.run import locked_folder
from hba.storage import json_sha256
from hba.taxonomy import Taxonomy
from hba.train.cache import Feature, FeatureCache, Shard, missing_shards, start_cache, write_shards
from hba.train.config import FeatureConfig

SHARD_BATCHES = 16
Descriptors: TypeAlias = Mapping[int, Mapping[str, Tensor] | Quarantined]
"""By row number: the pooled descriptors of a sample, or why it has none."""


@dataclass(frozen=True, kw_only=True)
class FeatureBatch:
    """Samples by what a frozen backbone says about them; a batch of the training loop."""

    samples: tuple[Sample, ...]
    domain_names: tuple[str | None, ...]
    class_index_B: Tensor  # global class index, IGNORED for free-form rows
    states_LH: Tensor  # a pooled state a sample, or one state for each token of its answer
    lengths_B: Tensor  # how many of the states are each sample's
    tokens_L: Tensor | None  # the tokens that the states predict, of free-form rows
    descriptors: tuple[Mapping[str, Tensor], ...] = ()
    quarantined: tuple[Quarantined, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device | str) -> FeatureBatch:
        """The same batch with its tensors on `device`."""
        tokens = None if self.tokens_L is None else self.tokens_L.to(device)
        moved = {name: getattr(self, name).to(device) for name in ("class_index_B", "states_LH", "lengths_B")}
        return replace(self, tokens_L=tokens, **moved)


class FrozenBase:
    """The checkpoint that a stage starts from, with its backbone frozen."""

    def __init__(self, path: str, *, dtype: str, attention: str, taxonomy: Taxonomy) -> None:
        """Raises InputError when `path` is a backbone without trained heads."""
        folder = checkpoint.resolve(path)
        if folder is None:
            fix = "Give the run folder of `hba train sft`, or a checkpoint of it."
            raise InputError("has no trained heads: this stage stands on stage 1", where=path, fix=fix)
        self.path, self.folder, self.card = Path(path), folder, checkpoint.read_card(folder)
        self.dtype, self.attention, self.taxonomy = dtype, attention, taxonomy
        self.encode: EncodeConfig = checkpoint.encode_config(folder) or EncodeConfig()

    @cached_property
    def model(self) -> OmniSapiens:
        """The whole model in evaluation mode; nothing of it trains."""
        model = checkpoint.load(self.folder, dtype=self.dtype, attention=self.attention, taxonomy=self.taxonomy)
        model.requires_grad_(False)
        model.bam = None  # features are those before any adapter
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def processor(self) -> Any:
        """Of the checkpoint."""
        return checkpoint.load_processor(self.folder)

    @cached_property
    def hidden_size(self) -> int:
        """H, as the heads have it; the backbone is not loaded for it."""
        return checkpoint.load_heads(self.folder).hidden_size

    @cached_property
    def weights(self) -> str:
        """Hash of everything that decides a hidden state: the backbone and its adapters, neither heads nor lm_head."""
        return json_sha256(checkpoint.backbone_hashes(self.folder))

    def identity(self, rows: Atlas, batch_size: int) -> dict[str, Any]:
        """What decides the features of `rows`, by the names that a warning uses."""
        return {
            "model": self.weights,
            "precision": str(checkpoint.resolve_dtype(self.dtype)),
            "data": rows.fingerprint,
            "encoding": asdict(self.encode),
            "code": code_version(),
            "transformers": transformers.__version__,
            "batch_size": batch_size,
        }


@cache
def code_version() -> str:
    """Hash of the source of everything between a sample and its features, as it is when this process first asks."""
    parts = (OmniSapiens, heads.masked_mean, Encoder, collate, extract)
    return json_sha256([inspect.getsource(part) for part in parts])


@torch.no_grad()
def extract(model: OmniSapiens, batch: Batch) -> list[Feature]:
    """The features of each sample: the pooled state of a row with classes, else the normed states of its answer."""
    output = model(batch)
    found = [Feature(pooled_H.unsqueeze(0), None) for pooled_H in output.pooled_BH]
    for row, domain in enumerate(batch.domain_names):
        if domain is None and batch.labels_BT is not None:
            # The state at a position predicts the token behind it: one shift, here and nowhere else.
            labels_T = batch.labels_BT[row, 1:]
            mask_T = labels_T != IGNORED
            found[row] = Feature(output.last_hidden_BTH[row, :-1][mask_T], labels_T[mask_T])
    return found


def is_free_form(atlas: Atlas, dataset: str) -> bool:
    """Whether the rows of a dataset are answered in words."""
    return atlas.taxonomy.dataset(dataset).domain is None


def features(
    base: FrozenBase,
    atlas: Atlas,
    config: FeatureConfig,
    progress: Callable[[int, int], None],
    *,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, FeatureCache]:
    """The cache of every dataset of `atlas`, filled where it is not. Each rank computes its share; `wait` joins them.

    Raises StorageError when the folder cannot be written, InputError for a damaged shard.
    """
    root = Path(config.folder) if config.folder is not None else base.path / "features"
    views = {key: atlas.filter(datasets=[key]) for key in sorted({atlas.columns.datasets[c] for c in _codes(atlas)})}
    folders = {key: root / atlas.split / key for key in views}
    plans = {key: _shard_plan(view, config.batch_size) for key, view in views.items()}
    total, done = len(atlas), 0
    if rank == 0:
        for key, view in views.items():
            with locked_folder(folders[key]):
                start_cache(folders[key], base.identity(view, config.batch_size))
    wait()
    for key, view in views.items():
        todo = missing_shards(folders[key], len(plans[key]))
        done += len(view) - sum(len(batch) for index in todo for batch in plans[key][index])
        own = todo[rank::world]
        for count in write_shards(folders[key], own, _computed(base, view, [plans[key][i] for i in own], config)):
            done += count
            progress(done, total)
    wait()
    return {key: FeatureCache(folders[key], len(plans[key])) for key in views}


def _codes(atlas: Atlas) -> list[int]:
    return sorted(set(atlas.columns.dataset_codes.tolist()))


def _shard_plan(rows: Atlas, batch_size: int) -> list[list[Indices]]:
    import numpy as np

    plan = evaluation_plan(rows, np.arange(len(rows)), batch_size)
    return [plan[start : start + SHARD_BATCHES] for start in range(0, len(plan), SHARD_BATCHES)]


def _computed(
    base: FrozenBase, rows: Atlas, shards: Sequence[list[Indices]], config: FeatureConfig
) -> Iterator[Shard]:
    if not shards:
        return
    answers = is_free_form(rows, rows[0].dataset)
    encoder = Encoder(base.processor, base.encode, rows.taxonomy, answers=answers)
    batches = load_batches(rows, encoder, [batch for shard in shards for batch in shard], config.loader)
    numbers = {rows[i].id: int(number) for i, number in enumerate(rows.numbers)}
    for shard in shards:
        found: dict[int, Feature] = {}
        quarantined: list[Quarantined] = []
        for batch in islice(batches, len(shard)):
            quarantined += batch.quarantined
            computed = extract(base.model, batch.to(base.model.device)) if len(batch) else []
            for sample, feature in zip(batch.samples, computed, strict=True):
                tokens = None if feature.tokens_L is None else feature.tokens_L.cpu()
                found[numbers[sample.id]] = Feature(feature.states_LH.cpu(), tokens)
        yield Shard(found, quarantined)


def assemble(
    samples: Sequence[Sample],
    found: Sequence[Feature],
    taxonomy: Taxonomy,
    descriptors: Sequence[Mapping[str, Tensor]] = (),
    quarantined: Sequence[Quarantined] = (),
) -> FeatureBatch:
    """A batch of samples of one kind: all with a pooled state, or all with the states of an answer."""
    tokens = [feature.tokens_L for feature in found if feature.tokens_L is not None]
    indices = [taxonomy.global_index(s.dataset, s.label) if s.label is not None else IGNORED for s in samples]
    return FeatureBatch(
        samples=tuple(samples),
        domain_names=tuple(taxonomy.dataset(s.dataset).domain for s in samples),
        class_index_B=torch.tensor(indices, dtype=torch.long),
        states_LH=torch.cat([feature.states_LH for feature in found]) if found else torch.zeros(0, 1),
        lengths_B=torch.tensor([len(feature.states_LH) for feature in found], dtype=torch.long),
        tokens_L=torch.cat(tokens) if tokens else None,
        descriptors=tuple(descriptors),
        quarantined=tuple(quarantined),
    )


def cached_batches(
    atlas: Atlas, caches: Mapping[str, FeatureCache], plan: Sequence[Indices], descriptors: Descriptors, start: int = 0
) -> Iterator[FeatureBatch]:
    """The batches of `plan` from number `start` on, read from the caches."""
    numbers = atlas.numbers
    for rows in islice(plan, start, None):
        samples, found, vectors, refused = [], [], [], []
        for row in rows:
            sample, number = atlas[int(row)], int(numbers[row])
            cache = caches[sample.dataset]
            feature, vector = cache.get(number), descriptors.get(number, {})
            if feature is None or isinstance(vector, Quarantined):
                refused.append(vector if isinstance(vector, Quarantined) else cache.quarantined[sample.id])
                continue
            samples.append(sample)
            found.append(feature)
            vectors.append(vector)
        yield assemble(samples, found, atlas.taxonomy, vectors, refused)


def streamed_batches(
    atlas: Atlas, base: FrozenBase, encoder: Encoder, plan: Sequence[Indices], loader: LoaderConfig, start: int = 0
) -> Iterator[FeatureBatch]:
    """The same batches without a cache: the backbone runs for each of them."""
    model = base.model  # loaded before the loop seeds a step: building it draws random numbers

    def batches() -> Iterator[FeatureBatch]:
        for batch in load_batches(atlas, encoder, plan, loader, start=start):
            found = extract(model, batch.to(model.device)) if len(batch) else []
            yield assemble(batch.samples, found, atlas.taxonomy, batch.descriptors, batch.quarantined)

    return batches()
