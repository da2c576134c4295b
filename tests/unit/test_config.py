"""Typed configuration: what a file and overrides give, what is refused and how, and that nothing is lost on the way."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hba.config import describe, inline_yaml, keys_without_effect, load_config, option, parse_yaml, to_yaml
from hba.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    name: Literal["adamw", "sgd"] = option("adamw", "which one")
    learning_rate: float = option(1e-3, "peak rate")
    betas: tuple[float, float] = option((0.9, 0.98), "moment decays")


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = option(doc="optimizer steps")
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(name="sgd", learning_rate=0.5))
    warm: bool = option(False, "start warm")


@dataclass(frozen=True, kw_only=True)
class Settings:
    train: Train
    folder: Path = option(Path("runs/x"), "where it goes")
    note: str = option("", "free text")
    limit: int | None = option(None, "at most so many rows")
    size: int | str = option(1, "a count, or a name")
    datasets: tuple[str, ...] = option((), "dataset keys")
    extra: Optimiser | None = option(None, "a second optimiser")
    workers: int = option(0, "processes", affects_result=False)


@dataclass(frozen=True, kw_only=True)
class Checked:
    share: float = option(0.5, "a share, 0..1")

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"{self.share} is not within 0..1")


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path | None, *overrides: str, cls: type = Settings) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, list(overrides))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_file_and_overrides_lie_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 5\n  warm: true\nnote: from the file\n")
    overrides = ["train.optimiser.learning_rate=1e-4", "datasets=[a, b]", "folder=out", "note=x"]
    loaded = load_config(Settings, path, overrides)
    optimiser = Optimiser(name="sgd", learning_rate=1e-4)
    train = Train(steps=5, warm=True, optimiser=optimiser)
    assert loaded == Settings(train=train, datasets=("a", "b"), folder=Path("out"), note="x")
    assert isinstance(loaded.train.optimiser.learning_rate, float)


def test_a_section_in_part_keeps_the_default_that_its_parent_gives() -> None:
    loaded = load_config(Settings, None, ["train.steps=1", "train.optimiser.betas=[0.5, 0.5]"])
    assert (loaded.train.optimiser.name, loaded.train.optimiser.learning_rate) == ("sgd", 0.5)
    assert load_config(Settings, None, ["train.steps=1", "extra.name=sgd"]).extra == Optimiser(name="sgd")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("-.5", -0.5), ("7", 7), ("1_000", 1000), ("no", "no"), ("010", "010"), ("~", None)]
    + [("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("true", True), ("yes", "yes"), (".inf", ".inf"), ("", None)],
)
def test_scalars_of_the_core_schema_alone(text: str, value: object) -> None:
    loaded = parse_yaml(text)
    assert loaded == value
    assert type(loaded) is type(value)


def test_unknown_key_names_file_line_key_and_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "note: x\ntrain:\n  steps: 5\n  optimiser:\n    learning_rat: 0.1\n")
    message = refused(path)
    assert f"{path}:5: unknown key 'train.optimiser.learning_rat'" in message
    assert "Did you mean 'train.optimiser.learning_rate'? Choose one of: train.optimiser.betas, " in message


def test_a_key_without_its_section_is_suggested_with_it() -> None:
    message = refused(None, "train.steps=1", "learning_rate=0.1")
    assert "'learning_rate=0.1'" in message
    assert "Did you mean 'train.optimiser.learning_rate'?" in message
    assert "Did you mean" not in refused(None, "train.steps=1", "train.lr=1")


def test_a_value_that_is_none_of_the_names_is_suggested_the_nearest() -> None:
    assert "Did you mean 'adamw'? train.optimiser.name (adamw | sgd)" in refused(
        None, "train.steps=1", "train.optimiser.name=adamww"
    )
    assert "Did you mean" not in refused(None, "train.steps=1", "train.optimiser.name=lion")


def test_missing_key_is_named_with_its_documentation(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  warm: true\n")
    message = refused(path)
    assert f"{path}:1: required key 'train.steps' is missing" in message
    assert "optimizer steps" in message
    assert "required key 'train' is missing" in refused(None)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=1.5", ["'train.steps'", "integer", "float 1.5"]),
        ("train.steps=true", ["'train.steps'", "integer", "bool True"]),
        ("train.steps='3'", ["'train.steps'", "integer", "str '3'"]),
        ("train.warm=yes", ["'train.warm'", "boolean", "str 'yes'"]),
        ("train.warm=1", ["'train.warm'", "boolean", "int 1"]),
        ("note=3", ["'note'", "string", "int 3"]),
        ("size=[1]", ["'size'", "integer", " or ", "string", "list [1]"]),
        ("train.optimiser.name=lion", ["'train.optimiser.name'", "'adamw' or 'sgd'", "str 'lion'"]),
        ("train.optimiser.betas=[1, x]", ["'train.optimiser.betas'", "number", "str 'x'"]),
        ("train.optimiser=5", ["'train.optimiser' is a section", "int 5", "train.optimiser.name"]),
        ("train.optimiser=~", ["'train.optimiser' is a section"]),
        ("note.inner=5", ["'note'", "string", "dict"]),
    ],
)
def test_wrong_type_names_expected_found_and_the_override(override: str, words: list[str]) -> None:
    message = refused(None, "train.steps=1", override)
    assert override in message
    for word in words:
        assert word in message


def test_wrong_type_in_a_file_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: many\n")
    assert f"{path}:2: key 'train.steps': expected a valid integer, found str 'many'" in refused(path)
    assert "command line" in refused(path, "train.steps=few")


@pytest.mark.parametrize("override", ["steps", "=5", "train..steps=5", ".=1"])
def test_an_override_that_is_not_key_value(override: str) -> None:
    assert "expected key=value" in refused(None, override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("note: [1, 2\n", [":2:", "not valid YAML"]),
        ("note: x\nnote: y\n", [":2:", "'note' stands twice"]),
        ("train:\n  steps: 1\n  steps: 2\n", [":3:", "'train.steps' stands twice"]),
        ("- a\n- b\n", ["expected 'key: value' lines"]),
        ("note: !!python/object/apply:os.system ['true']\n", [":1:", "not valid YAML"]),
        ("note: !!timestamp 2024-01-01\n", [":1:", "not valid YAML"]),
        ("? [a, b]\n: 1\n", [":1:", "a key must be a word"]),
        ("train: {steps: 1}\nsize: &a [*a]\n", ["not a plain value"]),
        ("train: {steps: 1, optimiser: {learning_rate: 1e999}}\n", ["not a plain value"]),
    ],
)
def test_a_file_that_cannot_be_a_config(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refused(write(tmp_path, text))
    assert "config.yaml" in message
    for word in words:
        assert word in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "missing.yaml: cannot read" in refused(tmp_path / "missing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"note: \xff\xfe\n")
    assert "bytes.yaml" in refused(tmp_path / "bytes.yaml")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(Checked, write(tmp_path, ""), []) == Checked()


def test_a_check_of_the_class_itself_is_reported_with_its_key() -> None:
    assert "2.0 is not within 0..1" in refused(None, "share=2", cls=Checked)


def test_a_config_class_must_be_frozen_and_keyword_only() -> None:
    @dataclass
    class Loose:
        a: int = 1

    with pytest.raises(TypeError, match="frozen, keyword-only"):
        load_config(Loose, None, [])
    with pytest.raises(TypeError, match="documentation"):
        option(1, "")


def test_not_finite_numbers_are_not_written() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        to_yaml(Optimiser(learning_rate=float("nan")))


def test_describe_lists_every_key_with_its_effective_default() -> None:
    keys = {key.key: key for key in describe(Settings)}
    assert list(keys)[:3] == ["train.steps", "train.optimiser.name", "train.optimiser.learning_rate"]
    assert keys["train.steps"].default is None
    assert keys["train.steps"].doc == "optimizer steps"
    assert keys["train.optimiser.name"] == ("train.optimiser.name", "adamw | sgd", "sgd", "which one")
    assert keys["train.optimiser.betas"].default == "[0.9, 0.98]"
    assert keys["folder"].default == "runs/x"
    assert keys["limit"].type == "int | none"
    assert keys["limit"].default == "null"
    assert keys["datasets"].type == "tuple[str, ...]"


def test_keys_that_change_no_result_are_marked() -> None:
    assert keys_without_effect(Settings) == {"workers"}


def test_the_module_does_not_import_pydantic() -> None:
    code = "import sys, hba.config; sys.exit('pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


finite = st.floats(allow_nan=False, allow_infinity=False)
optimisers = st.builds(
    Optimiser, name=st.sampled_from(["adamw", "sgd"]), learning_rate=finite, betas=st.tuples(finite, finite)
)
awkward = st.sampled_from(
    ["no", "1e-4", "010", "12:30", "~", "", " x ", "a: b", "# c", "- d", "0x1F", "null", "\x00", "é\n"]
    + ["\x85", " a\u2028b"]
)
configs = st.builds(
    Settings,
    train=st.builds(Train, steps=st.integers(), optimiser=optimisers, warm=st.booleans()),
    folder=st.sampled_from([Path("a/b"), Path("/abs"), Path("1e-4"), Path()]),
    note=st.text() | awkward,
    limit=st.none() | st.integers(-(2**70), 2**70),
    size=st.integers() | awkward,
    datasets=st.lists(st.text() | awkward, max_size=3).map(tuple),
    extra=st.none() | optimisers,
    workers=st.integers(),
)


@settings(deadline=None, max_examples=200)
@given(configs)
def test_what_is_written_loads_to_an_equal_config(config: Settings) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8", newline="")
        assert load_config(Settings, path, []) == config


@settings(deadline=None)
@given(st.text() | awkward, finite)
def test_a_value_passes_through_an_override(note: str, rate: float) -> None:
    values = [f"note={inline_yaml(note)}", f"train.optimiser.learning_rate={inline_yaml(rate)}"]
    loaded = load_config(Settings, None, ["train.steps=1", *values])
    assert (loaded.note, loaded.train.optimiser.learning_rate) == (note, rate)
