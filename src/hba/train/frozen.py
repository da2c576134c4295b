"""Batches of features for the stages that stand on a frozen backbone: from its cache, or from the backbone itself.

`FrozenBase` is the checkpoint that a stage starts from; its backbone is loaded only when features are missing, and
does not stay once they are cached. `features` fills the caches of the datasets that a stage uses and opens them. Cached
or not, the same plan gives the same `FeatureBatch`es to float tolerance, and the loop cannot tell them apart.

Shapes: B samples, L states of all samples in a row, H hidden size.
"""

from __future__ import annotations

import ast
import gc
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib.metadata import packages_distributions, version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

import hba
from hba.atlas import Atlas
from hba.atlas.batch import IGNORED, Batch, Encoder, collate
from hba.atlas.config import EncodeConfig, LoaderConfig
from hba.atlas.loader import load_batches
from hba.atlas.sample import Quarantined, Sample
from hba.atlas.sampler import Indices
from hba.errors import InputError
from hba.evaluate.backends.batches import evaluation_plan
from hba.model import checkpoint
from hba.model.omni import OmniSapiens
from hba.run import locked_folder
from hba.storage import json_sha256
from hba.taxonomy import Taxonomy
from hba.train.cache import Claims, Feature, FeatureCache, Shard, shard_path, start_cache, write_shard
from hba.train.config import FeatureConfig
from hba.train.ranks import Ranks

SHARD_BATCHES = 16  # most batches in a shard
FEWEST_SHARDS = 64  # of a dataset that has so many batches
POLL_SECONDS = 0.5  # between looks at the shards that other processes compute
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

    def pinned(self) -> FeatureBatch:
        """The same batch in page-locked memory, from which a GPU takes it while it computes."""
        tokens = None if self.tokens_L is None else self.tokens_L.pin_memory()
        named = ("class_index_B", "states_LH", "lengths_B")
        return replace(self, tokens_L=tokens, **{name: getattr(self, name).pin_memory() for name in named})

    def to(self, device: torch.device | str) -> FeatureBatch:
        """The same batch with its tensors on `device`."""
        tokens = None if self.tokens_L is None else self.tokens_L.to(device, non_blocking=True)
        named = ("class_index_B", "states_LH", "lengths_B")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in named}
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

    def release(self) -> None:
        """Let the backbone go, since nothing runs it once the features are cached."""
        if self.__dict__.pop("model", None) is not None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @cached_property
    def config(self) -> Any:
        """The thinker's; the backbone is not loaded for it."""
        return checkpoint.read_thinker_config(checkpoint.base_of(self.folder))

    def lm_head(self) -> nn.Linear:
        """The layer that says what a last hidden state is as tokens, frozen; nothing else of the model is read."""
        base = checkpoint.base_of(self.folder)
        if (self.folder / checkpoint.LM_HEAD).is_file():
            text = self.config.get_text_config()
            weight_VH = checkpoint.load_lm_head(self.folder, (text.vocab_size, text.hidden_size))
        else:
            weight_VH = checkpoint.fit_thinker(base).read("lm_head.weight")
        lm_head = nn.Linear(weight_VH.shape[1], weight_VH.shape[0], bias=False, device="meta")
        lm_head.weight = nn.Parameter(weight_VH.to(checkpoint.resolve_dtype(self.dtype)), requires_grad=False)
        return lm_head

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
            "processor": checkpoint.settings_hash(self.folder),
            "code": code_between().source,
            "packages": code_between().packages,
            "batch_size": batch_size,
        }


class Code(NamedTuple):
    """What the way from a sample to its features is made of, as it is when this process first asks."""

    source: str  # hash of our own code
    packages: dict[str, str]  # versions


@cache
def code_between() -> Code:
    """The code of every module that loading, encoding, padding and the model import, and the versions of packages."""
    begin = [Path(inspect.getfile(part)) for part in (load_batches, Encoder, collate, OmniSapiens)]
    found = code_from(Path(inspect.getfile(hba)).parent, begin)
    return found._replace(source=json_sha256([found.source, inspect.getsource(extract)]))


def code_from(root: Path, files: Sequence[Path]) -> Code:
    """What `files` of the package `root` are made of: they, the modules that they import, and what those import.

    Imports within functions count, comments and docstrings do not. Of other packages those count that a module imports
    beside numpy or torch: it may hand them a sample's numbers.
    """
    todo = list(files)
    sources: dict[str, str] = {}
    packages: set[str] = set()
    while todo:
        file = todo.pop()
        name = file.relative_to(root).as_posix()
        if name in sources:
            continue
        sources[name], names = _read_source(file.read_text(encoding="utf-8"))
        outside = {each.partition(".")[0] for each in names} - {"hba"}
        if outside & {"numpy", "torch"}:
            packages |= outside
        todo += [path for each in names if (path := _module_file(root, each)) is not None]
    known = packages_distributions()
    versions = {known[name][0]: version(known[name][0]) for name in sorted(packages) if name in known}
    return Code(json_sha256(sources), versions)


@cache
def _read_source(text: str) -> tuple[str, tuple[str, ...]]:
    """A module without comments and docstrings; the modules that it imports, and names in them that may be modules.

    What it imports for type checkers is left out.
    """
    tree = ast.parse(text)
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in skipped:
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and id(node) not in skipped:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree), tuple(found)


def _module_file(root: Path, name: str) -> Path | None:
    """The file of a module of ours, None for anything else."""
    package, *parts = name.split(".")
    if package != root.name:
        return None
    path = root.joinpath(*parts)
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


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
    base: FrozenBase, atlas: Atlas, config: FeatureConfig, progress: Callable[[int, int], None], ranks: Ranks
) -> dict[str, FeatureCache]:
    """The cache of every dataset of `atlas`, filled where it is not, by all ranks and whoever else shares the folder.

    `progress` is told of the rows that are done, as far as this rank knows, and of all. Raises StorageError when the
    folder cannot be written, InputError for a damaged shard.
    """
    root = Path(config.folder) if config.folder is not None else base.path / "features"
    datasets = sorted({atlas.columns.datasets[code] for code in set(atlas.columns.dataset_codes.tolist())})
    views = {name: atlas.filter(datasets=[name]) for name in datasets}
    folders = {name: root / atlas.split / name for name in datasets}
    plans = {name: _shard_plan(view, config.batch_size) for name, view in views.items()}
    keys: dict[str, str] = {}
    if ranks.is_first:
        for name, view in views.items():
            # Before the folder is locked: hashing a backbone takes long, and a sweep starts many commands at once.
            identity = base.identity(view, config.batch_size)
            with locked_folder(folders[name]):
                keys[name] = start_cache(folders[name], identity)
    keys = ranks.told(keys)

    done = 0
    missing = [(name, index) for name in datasets for index in range(len(plans[name]))]
    with ExitStack() as stack:
        claims = {name: stack.enter_context(Claims(folders[name])) for name in datasets}
        while missing:
            elsewhere = []
            for name, index in missing:
                path = shard_path(folders[name], index)
                if not path.is_file():
                    if not claims[name].take(index):
                        elsewhere.append((name, index))
                        continue
                    if not path.is_file():  # another may have finished it before the claim was free
                        write_shard(path, _computed(base, views[name], plans[name][index], config), keys[name])
                    claims[name].free(index)
                done += sum(map(len, plans[name][index]))
                progress(done, len(atlas))
            if len(elsewhere) == len(missing):
                time.sleep(POLL_SECONDS)
            missing = elsewhere
    return {name: FeatureCache(folders[name], len(plans[name]), keys[name]) for name in datasets}


def _shard_plan(rows: Atlas, batch_size: int) -> list[list[Indices]]:
    """The batches of each shard. A small dataset has many small shards: it, too, is work for all ranks."""
    plan = evaluation_plan(rows, np.arange(len(rows)), batch_size)
    size = min(max(1, len(plan) // FEWEST_SHARDS), SHARD_BATCHES)
    return [plan[start : start + size] for start in range(0, len(plan), size)]


def _computed(base: FrozenBase, rows: Atlas, batches: Sequence[Indices], config: FeatureConfig) -> Shard:
    answers = is_free_form(rows, rows[0].dataset)
    encoder = Encoder(base.processor, base.encode, rows.taxonomy, answers=answers)
    found: dict[int, Feature] = {}
    quarantined: list[Quarantined] = []
    for batch in load_batches(rows, encoder, batches, config.loader):
        quarantined += batch.quarantined
        computed = extract(base.model, batch.to(base.model.device)) if len(batch) else []
        for sample, feature in zip(batch.samples, computed, strict=True):
            tokens = None if feature.tokens_L is None else feature.tokens_L.cpu()
            found[sample.number] = Feature(feature.states_LH.cpu(), tokens)
    return Shard(found, quarantined)


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
    numbers, pinned = atlas.numbers, torch.cuda.is_available()
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
        made = assemble(samples, found, atlas.taxonomy, vectors, refused)
        yield made.pinned() if pinned else made


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
