"""Batches of features for the stages that stand on a frozen backbone: from its cache, or from the backbone itself.

`FrozenBase` is the checkpoint that a stage starts from; its backbone is loaded only when features are missing, and
does not stay once they are cached. `features` fills the caches of the datasets that a stage uses and opens them. Cached
or not, the same plan gives the same `FeatureBatch`es to float tolerance, and the loop cannot tell them apart.

Shapes: B samples, L states of all samples in a row, H hidden size.
"""

from __future__ import annotations

import ast
import fcntl
import gc
import inspect
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from importlib.metadata import packages_distributions, version
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hba.atlas import Atlas
from hba.atlas.rows import Quarantined, Sample
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import IGNORED, Batch, Encoder, collate
from hba.batch.loader import load_batches
from hba.batch.pool import ALIKE, SOURCES, DescriptorConfig, missing, pooled_descriptors, unlike
from hba.batch.sampler import Indices
from hba.errors import InputError, MediaError
from hba.evaluate.backends.interface import evaluation_plan
from hba.model import checkpoint
from hba.model.config import AsTrained, require_bitsandbytes
from hba.model.heads import head_loss
from hba.model.omni import OmniSapiens, behind_head
from hba.run import locked_folder
from hba.storage import (
    StorageError,
    atomic_write,
    halved,
    json_sha256,
    plural,
    read_json,
    remove_abandoned,
    room,
    write_json,
)
from hba.taxonomy import Taxonomy
from hba.train.config import FeatureConfig
from hba.train.ranks import Ranks

# What a frozen backbone says about each sample, computed once and read by every epoch, stage, seed and sweep after.
#
# A cache is a folder: `card.json` says what the features were computed with (weights, data, encoding, code), then come
# `shard_00000.safetensors`, .... Shards appear whole or not at all, so that a killed computation goes on with those
# that are missing; they are memory-mapped, never read whole. A card that says anything else than it should is named in
# a warning, and everything is computed again: stale features are never read, nor those that a process wrote which had
# begun before the card changed.
#
# Processes share the work by claims: whoever locks a shard's byte in `.claims` computes it. The system frees the lock
# of a process that ends, however it ends, so that another computes its shard; nobody waits for the dead.
#
# Shapes: N samples, L states of all samples in a row, H hidden size.


FORMAT = 2
CARD = "card.json"
_log = logging.getLogger(__name__)


class Feature(NamedTuple):
    """One sample: its pooled state [1, H], or the states that predict the tokens of its answer, and these."""

    states_LH: Tensor
    tokens_L: Tensor | None


class Shard(NamedTuple):
    """What one shard holds: features by the number of their row in the split, and what could not be read."""

    features: Mapping[int, Feature]
    quarantined: Sequence[Quarantined]


class _Place(NamedTuple):
    shard: int
    start: int
    length: int


class FeatureCache:
    """The features of one dataset in one split, by row number."""

    def __init__(self, folder: Path, num_shards: int, key: str) -> None:
        """Map the shards of a finished cache that were computed under `key`, as `start_cache` gave it.

        Raises InputError naming a shard that is missing, damaged, or of another key.
        """
        self._key = key
        self.quarantined: dict[str, Quarantined] = {}
        self._states: list[Tensor] = []
        self._tokens: list[Tensor | None] = []
        self._places: dict[int, _Place] = {}
        for index in range(num_shards):
            self._map(shard_path(folder, index))

    def _map(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:  # type: ignore[no-untyped-call]
                header = shard.metadata() or {}
                about, key = json.loads(header["quarantined"]), header["key"]
                numbers, lengths = shard.get_tensor("numbers").tolist(), shard.get_tensor("lengths").tolist()
                self._states.append(shard.get_tensor("states"))
                self._tokens.append(shard.get_tensor("tokens") if "tokens" in shard.keys() else None)  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            fix = "Remove the file; it is computed again."
            raise InputError(f"not a shard of features ({error})", where=str(path), fix=fix) from error
        if key != self._key:
            what = "features of another command, which shares the folder"
            raise InputError(what, where=str(path), fix="Remove the file, or give each command a features.folder.")
        start = 0
        for number, length in zip(numbers, lengths, strict=True):
            self._places[number] = _Place(len(self._states) - 1, start, length)
            start += length
        self.quarantined |= {record["id"]: Quarantined(**record) for record in about}

    def __len__(self) -> int:
        return len(self._places)

    def get(self, number: int) -> Feature | None:
        """The features of row `number` of the split, None where its media could not be read."""
        place = self._places.get(number)
        if place is None:
            return None
        span, tokens = slice(place.start, place.start + place.length), self._tokens[place.shard]
        return Feature(self._states[place.shard][span], None if tokens is None else tokens[span])


def shard_path(folder: Path, index: int) -> Path:
    """Where shard `index` of a cache lies."""
    return folder / f"shard_{index:05d}.safetensors"


def start_cache(folder: Path, identity: Mapping[str, Any]) -> str:
    """Make the folder of a cache with its card, or keep it where the card says the same; gives the key of its shards.

    Where it says something else, name in a warning what has changed and remove the shards.
    """
    card = json.loads(json.dumps({"format": FORMAT, **identity}))  # as it reads from the file
    path = folder / CARD
    remove_abandoned(folder)
    before = read_json(path) if path.is_file() else None
    if before == card:
        return json_sha256(card)
    if before is not None:
        changed = ", ".join(sorted(key for key in {*before, *card} if before.get(key) != card.get(key)))
        _log.warning("features in %s were computed with another %s: computing them again", folder, changed)
    for shard in folder.glob("shard_*.safetensors"):
        shard.unlink()
    write_json(path, card)
    return json_sha256(card)


def write_shard(path: Path, shard: Shard, key: str) -> None:
    """Write a shard, whole or not at all."""
    features = list(shard.features.values())
    tensors = {
        "numbers": torch.tensor(list(shard.features), dtype=torch.long),
        "lengths": torch.tensor([len(feature.states_LH) for feature in features], dtype=torch.long),
        "states": torch.cat([feature.states_LH for feature in features]) if features else torch.zeros(0, 1),
    }
    tokens = [feature.tokens_L for feature in features if feature.tokens_L is not None]
    if tokens:
        tensors["tokens"] = torch.cat(tokens)
    about = {"quarantined": json.dumps([record._asdict() for record in shard.quarantined]), "key": key}
    with atomic_write(path, "wb") as handle:
        handle.write(save(tensors, about))


class Claims:
    """The shards of a cache that this process computes. A context manager; closing it frees them all.

    Record locks belong to a process and not to an open file: forked workers do not hold them, and a process of which
    nothing is left holds none, on other machines that share the folder, too.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ".claims"
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"cannot write ({error.strerror})", where=str(path), fix="Check the folder.") from None

    def take(self, shard: int) -> bool:
        """Whether the shard is this process's now: no other is at it."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            fix = "Choose a folder on a file system with locks (features.folder)."
            raise StorageError(f"cannot lock ({error.strerror})", where="features", fix=fix) from None
        return True

    def free(self, shard: int) -> None:
        """Let others have it."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, shard)

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


# --- batches of features ----------------------------------------------------------------------------------------------


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
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> FeatureBatch:
        """The same batch with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> FeatureBatch:
        named = ("class_index_B", "states_LH", "lengths_B", "tokens_L")
        changed: dict[str, Any] = {name: change(held) for name in named if (held := getattr(self, name)) is not None}
        return replace(self, **changed)


class LanguageHead(nn.Linear):
    """A language head alone, with what the forward of its model does to logits behind it, as `config` says."""

    config: Any

    def forward(self, states_LH: Tensor, tokens_L: Tensor | None = None, lengths_B: Tensor | None = None) -> Tensor:
        """Logits [L, V] of states; or with the answers' tokens their `token_loss`, for which logits of all of them are
        never there at once."""
        if tokens_L is None or lengths_B is None:
            return behind_head(super().forward(states_LH.to(self.weight.dtype)), self.config)
        return head_loss(states_LH, self.weight, tokens_L, lengths_B, partial(behind_head, config=self.config))


class FrozenBase:
    """The checkpoint that a stage starts from, with its backbone frozen."""

    def __init__(
        self, path: str, *, dtype: str, attention: str, taxonomy: Taxonomy, quantization: AsTrained = "auto"
    ) -> None:
        """Raises InputError when `path` is a backbone without trained heads, ConfigError for a quantisation that cannot
        be had."""
        folder = checkpoint.resolve(path)
        if folder is None:
            fix = "Give the run folder of `hba train sft`, or a checkpoint of it."
            raise InputError("has no trained heads, which this stage needs", where=path, fix=fix)
        self.path, self.folder, self.card = Path(path), folder, checkpoint.read_card(folder)
        self.dtype, self.attention, self.taxonomy = dtype, attention, taxonomy
        self.quantization = checkpoint.quantization_of(self.card) if quantization == "auto" else quantization
        require_bitsandbytes(self.quantization, of_it=self.quantization != "none", where="quantization")
        self.encode: EncodeConfig = checkpoint.encode_config(folder) or EncodeConfig()

    @cached_property
    def model(self) -> OmniSapiens:
        """The whole model in evaluation mode; nothing of it trains."""
        how: dict[str, Any] = {"dtype": self.dtype, "attention": self.attention, "quantization": self.quantization}
        model = OmniSapiens.from_pretrained(self.folder, taxonomy=self.taxonomy, **how)
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
        """The backbone's, which is not loaded for it."""
        return checkpoint.read_backbone_config(checkpoint.base_of(self.folder))

    def lm_head(self) -> LanguageHead:
        """The layer that says what a last hidden state is as tokens, frozen; nothing else of the model is read."""
        shape, read = self.stored_lm_head()
        lm_head = LanguageHead(shape[1], shape[0], bias=False, device="meta")
        lm_head.config = self.config
        lm_head.weight = nn.Parameter(read().to(checkpoint.resolve_dtype(self.dtype)), requires_grad=False)
        return lm_head

    def stored_lm_head(self) -> tuple[tuple[int, ...], Callable[[], Tensor]]:
        """The shape [V, H] of lm_head's weight, and what reads it. Costs little.

        Raises InputError where no file holds one that fits: for a stage to ask before it makes features."""
        base = checkpoint.base_of(self.folder)
        name, shape = checkpoint.language_head(base)
        if (self.folder / checkpoint.LM_HEAD).is_file():
            return shape, partial(checkpoint.stored_lm_head(self.folder, shape).read, "weight")
        return shape, partial(checkpoint.fit_backbone(base).read, name)

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
            "quantization": self.quantization,
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
    found = code_from(Path(__file__).parents[1], begin)
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
    """The features of each sample: the pooled state of a row with classes, else the normed states of its answer.

    Raises MachineError where the device of the model has no room for them.
    """
    with room(batch, halved("features.batch_size", batch)):
        batch = batch.to(model.device)
        output = model(batch)
    assert output.pooled_BH is not None
    found = [Feature(pooled_H.unsqueeze(0), None) for pooled_H in output.pooled_BH]
    if batch.labels_BT is not None and output.answer_states_NH is not None:
        said_BT = batch.labels_BT != IGNORED
        counts = said_BT.sum(1).tolist()
        tokens, states = (torch.split(each, counts) for each in (batch.labels_BT[said_BT], output.answer_states_NH))
        for row, domain in enumerate(batch.domain_names):
            if domain is None:
                found[row] = Feature(states[row], tokens[row])
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
        computed = extract(base.model, batch) if len(batch) else []
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
            found = extract(model, batch) if len(batch) else []
            yield assemble(batch.samples, found, atlas.taxonomy, batch.descriptors, batch.quarantined)

    return batches()


# The descriptors that stage 3 trains on: which datasets have some, one pooled vector a sample and modality.
#
# Refused by name: a dataset without any descriptor, and rows that have a medium but no descriptor of it, unless that is
# allowed. A descriptor that cannot be read quarantines its sample, as a medium would.


NAMED = 10  # samples in a message


def described_datasets(atlas: Atlas, wanted: Sequence[str] | None) -> list[str]:
    """The datasets to adapt: those `wanted`, or all that have descriptors; the others are named in a warning.

    Raises InputError for a wanted dataset without rows or descriptors, and when no dataset has any.
    """
    with_some: set[str] = set()
    present: set[str] = set()
    for index in range(len(atlas)):
        row = atlas.row(index)
        present.add(row.dataset)
        if row.ext_video_feats or row.ext_audio_feats:
            with_some.add(row.dataset)
    keys = sorted(present) if wanted is None else [atlas.taxonomy.dataset(key).key for key in wanted]
    without = [key for key in keys if key not in with_some]
    fix = "Run `hba atlas describe` on the atlas."
    if without and (wanted is not None or len(without) == len(keys)):
        raise InputError(f"no descriptors in {', '.join(without)}", where=f"{atlas.root}, {atlas.split}", fix=fix)
    if without:
        _log.warning("without descriptors, hence without adapters: %s", ", ".join(without))
    return [key for key in keys if key in with_some]


def read_descriptors(rows: Atlas, config: DescriptorConfig) -> Descriptors:
    """The pooled descriptors of every row by its number in the split, or why a sample has to be left out.

    Raises InputError naming the samples that lack a descriptor, unless `allow_missing`.
    """
    lacking = [] if config.allow_missing else [sample for sample in rows if missing(sample)]
    if lacking:
        names = ", ".join(f"{s.id} ({' and '.join(missing(s))})" for s in lacking[:NAMED])
        more = f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
        what = f"{plural(len(lacking), 'sample', 'has|have')} a medium but no descriptor of it: {names}{more}"
        fix = "Run `hba atlas describe`, or leave such samples unchanged with --allow-missing."
        raise InputError(what, where=f"{rows.root}, {rows.split}", fix=fix)
    found: dict[int, Mapping[str, Tensor] | Quarantined] = {}
    for sample, number in zip(rows, rows.numbers.tolist(), strict=True):
        try:
            found[number] = pooled_descriptors(sample, config)
        except MediaError as error:
            found[number] = sample.quarantined(error)
    return found


def training_matrix(rows: Atlas, vectors: Descriptors, dataset: str) -> dict[str, Tensor]:
    """{'video': [N, F], 'audio': [N, F]} of the rows of a dataset, without a modality that none of them has.

    F is the size that most have; rows of another are left out (see `fitting`). Raises InputError naming a sample where
    more than a tenth of the rows have another size.
    """
    found: dict[str, Tensor] = {}
    own = rows.filter(datasets=[dataset]).numbers.tolist()
    for modality in SOURCES:
        parts = {
            number: vector[modality]
            for number, vector in ((number, vectors[number]) for number in own)
            if not isinstance(vector, Quarantined) and modality in vector
        }
        if not parts:
            continue
        (size, count), *_ = Counter(map(len, parts.values())).most_common()
        if len(parts) - count > len(parts) // 10:
            number = next(number for number, part in parts.items() if len(part) != size)
            sample = next(sample for sample, each in zip(rows, rows.numbers.tolist(), strict=True) if each == number)
            what = f"{unlike(len(parts[number]), size)}; so have {len(parts) - count} of {len(parts)} samples"
            raise InputError(what, where=sample.place(SOURCES[modality].field), fix=ALIKE)
        found[modality] = torch.stack([part for part in parts.values() if len(part) == size])
    return found


def fitting(rows: Atlas, vectors: Descriptors, dims: Mapping[str, Mapping[str, int]]) -> Descriptors:
    """The descriptors that their adapters can read; a sample with another is left out, named."""
    fit = dict(vectors)
    for sample, number in zip(rows, rows.numbers.tolist(), strict=True):
        vector, expected = vectors[number], dims[sample.dataset]
        for name, values in vector.items() if not isinstance(vector, Quarantined) else ():
            if len(values) != expected.get(name, len(values)):
                error = MediaError(
                    unlike(len(values), expected[name]), where=sample.place(SOURCES[name].field), fix=ALIKE
                )
                fit[number] = sample.quarantined(error)
    return fit
