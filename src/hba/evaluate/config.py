"""How predictions are made: the config of `hba predict`, and what a backend is opened with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hba.atlas import Atlas
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.prompt import AnswerFormat
from hba.config import flat, inline_yaml, option, read_yaml
from hba.errors import ConfigError, nearest
from hba.model.config import ATTENTION, AsTrained, Attention, Dtype
from hba.remote import ClientConfig
from hba.remote.request import check_extra
from hba.storage import json_sha256

DEFAULT_FORMAT = "boxed"


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a model that answers in words is asked, and how its answer is drawn."""

    format: str | None = option(
        None,
        "how prompts ask for the answer: plain, boxed, think, or a .jinja file. null: as the run was trained; "
        "boxed for other models",
    )
    temperature: Annotated[float, Field(ge=0)] | None = option(
        0.0, "temperature of sampling. 0: always the most probable token; null: what the server chooses"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = option(
        1.0, "sample from the most probable tokens that make up this share of the probability, 0..1"
    )
    max_tokens: Annotated[int, Field(ge=1)] = option(1024, "longest answer in tokens, thinking included")
    seed: Annotated[int, Field(ge=0)] = option(0, "random seed of sampling, and of the random baseline")
    constrain: Literal["none", "labels"] = option(
        "none", "labels: the model can say nothing but a label of the row's dataset"
    )
    constrain_by: Literal["json_schema", "choice", "guided_choice", "grammar"] = option(
        "json_schema",
        "how a server is told to constrain: json_schema (most), choice (vLLM; guided_choice before 0.12), grammar "
        "(llama.cpp)",
    )
    read: Literal["words", "likelihood"] = option(
        "words", "words: the model writes its answer; likelihood: the answer is the label that it finds most probable"
    )
    extra: dict[str, Any] | None = option(
        None, "more fields of a remote request, such as {reasoning_effort: low} or vLLM's chat_template_kwargs"
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a key in `extra`, since that is written into the run folder, and for thinking where
        nothing but labels may be said."""
        if self.bound and AnswerFormat(self.asked).shows_reasoning:
            key = "constrain=labels" if self.constrain == "labels" else "read=likelihood"
            what = f"the format {self.asked} asks for thinking, for which {key} leaves no room"
            raise ConfigError(what, where="generation.format", fix="Use generation.format=boxed or plain.")
        check_extra(self.extra, "generation.extra")

    @property
    def asked(self) -> str:
        """The format in which rows are asked."""
        return self.format or DEFAULT_FORMAT

    def identity(self) -> dict[str, Any]:
        """What decides an answer, by name; the format by the words of its file."""
        sampled = {"top_p": self.top_p, "seed": self.seed} if self.temperature != 0 else {}
        words = json_sha256(AnswerFormat(self.asked).source)[:16]
        kept = {"format": f"{self.asked} {words}", "temperature": self.temperature, "max_tokens": self.max_tokens}
        more: dict[str, Any] = {"extra": self.extra} if self.extra else {}
        more |= {} if self.constrain == "none" else {"constrain": self.constrain}
        more |= {} if self.read == "words" else {"read": self.read}
        return kept | sampled | more

    @property
    def bound(self) -> bool:
        """Whether labels are all that a labelled row may be answered with."""
        return self.constrain == "labels" or self.read == "likelihood"


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """How vLLM's offline engine uses the GPUs."""

    tensor_parallel_size: Annotated[int, Field(ge=1)] = option(1, "GPUs that share the model", affects_result=False)
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = option(
        0.9, "share of each GPU's memory that vLLM takes, 0..1", affects_result=False
    )
    max_model_len: Annotated[int, Field(ge=1)] | None = option(
        None, "most tokens of a prompt and its answer together. null: the model's own limit", affects_result=False
    )


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How predictions are made. Samples are encoded as in the checkpoint's training unless `encode` is given."""

    batch_size: Annotated[int, Field(ge=1)] = option(16, "samples in a batch")
    dtype: Dtype = option(
        "auto", "number format of the weights. auto: bfloat16 on a GPU that computes in it, else float32"
    )
    attention: Attention = option("sdpa", ATTENTION)
    quantization: AsTrained = option(
        "auto", "load the backbone in 8 bits (int8), 4 bits (nf4) or neither (none). auto: as it was trained"
    )
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    encode: EncodeConfig | None = option(None, "how samples become tokens, frames and patches")
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    remote: ClientConfig = field(default_factory=ClientConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    video: Literal["frames", "file"] = option(
        "frames",
        "how a remote model gets a clip. frames: encode.num_frames pictures; file: the file itself (video_url)",
    )
    fit_split: str = option("train", "split that the baselines majority and random learn from")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of a suite: a model and how it is asked. `overrides` are KEY=VALUE of PredictConfig."""

    name: str
    model: str
    backend: str | None = None
    modalities: tuple[str, ...] | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What `hba eval suite.yaml` evaluates: settings on the same rows, each compared with the `baseline`."""

    atlas: str
    split: str = "test"
    run: str | None = None
    per_dataset: int | None = None
    judge: str | None = None
    judge_url: str | None = None
    baseline: str
    settings: tuple[Setting, ...]


def read_suite(path: Path) -> Suite:
    """The suite of a YAML file. Raises ConfigError naming file, line and key."""
    places: dict[str, str] = {}
    data = read_yaml(path, places)
    known = ("atlas", "split", "run", "per_dataset", "judge", "judge_url", "baseline", "set", "settings")

    def checked(said: Any, name: str, kind: type[Any], key: str = "") -> Any:
        if said is not None and (not isinstance(said, kind) or isinstance(said, bool)):
            what = f"key {key + name!r}: expected {kind.__name__}, found {type(said).__name__}"
            raise ConfigError(what, where=places.get(key + name, str(path)), fix="See docs/evaluate.md.")
        return said

    def only(said: Mapping[str, Any], names: Sequence[str], key: str = "") -> None:
        for name in said:
            if name not in names:
                raise ConfigError(f"unknown key {key + name!r}", where=places[key + name], fix=nearest(name, names))

    only(data, known)
    kinds = dict.fromkeys(("atlas", "split", "run", "judge", "judge_url", "baseline"), str) | {"per_dataset": int}
    plain = {name: checked(data[name], name, kind) for name, kind in kinds.items() if data.get(name) is not None}
    shared = _overrides(checked(data.get("set"), "set", dict) or {})
    settings = []
    for name, said in (checked(data.get("settings"), "settings", dict) or {}).items():
        key = f"settings.{name}."
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            what = f"{name!r} is no name of a folder"
            raise ConfigError(what, where=places[key[:-1]], fix="Use letters, digits, - and _.")
        if re.match(r"(?i)(suite|leaderboard)\.", name):
            what = f"{name!r} is the name of a file that hba eval writes beside the settings"
            raise ConfigError(what, where=places[key[:-1]], fix="Name the setting otherwise.")
        about = checked(said, name, dict, "settings.") or {}
        only(about, ("model", "backend", "modalities", "base_url", "set"), key)
        said = {field: checked(about.get(field), field, str, key) for field in ("model", "backend", "base_url")}
        if not said["model"]:
            raise ConfigError(f"required key '{key}model' is missing", where=places[key[:-1]], fix="Name a model.")
        modalities = checked(about.get("modalities"), "modalities", str, key)
        server = {} if said["base_url"] is None else {"remote": {"base_url": said["base_url"]}}
        own = (*_overrides(server), *_overrides(checked(about.get("set"), "set", dict, key) or {}))
        settings.append(
            Setting(
                name=name,
                model=said["model"],
                backend=said["backend"],
                modalities=None if modalities is None else tuple(each.strip() for each in modalities.split(",")),
                overrides=(*shared, *own),
            )
        )
    if "atlas" not in plain or len(settings) < 2:
        what = "a suite has an atlas, and two settings or more"
        raise ConfigError(what, where=str(path), fix="Write atlas: PLACE, and settings: {NAME: {model: MODEL}, ...}.")
    names = [setting.name for setting in settings]
    baseline = plain.setdefault("baseline", names[0])
    if baseline not in names:
        raise ConfigError(f"no setting {baseline!r}", where=places["baseline"], fix=nearest(baseline, names))
    return Suite(settings=tuple(settings), **plain)


def _overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={inline_yaml(value)}" for key, value in flat(values).items()]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a backend is opened with: a model, the rows that it will answer, and the settings.

    `place` is where the atlas lies, for a backend that looks at another of its splits. `encode` says which media
    reach the model, and in which form. `selection` says which rows of the split `atlas` holds. `note` is what the user
    should know of the format that was chosen.
    """

    model: str
    backend: str
    place: str
    atlas: Atlas
    config: PredictConfig
    encode: EncodeConfig
    note: str | None = None
    selection: Mapping[str, Any] | None = None
