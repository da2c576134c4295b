"""Every switch of a config or command can be turned both ways. (What each key changes: integration/test_keys.py.)"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import typing
from pathlib import Path

import pytest
import typer

import hba
from hba.cli import app
from hba.config import load_config

SOURCE = Path(hba.__file__).parent


def config_classes():
    """Every dataclass of the package with a field made by `option`, by its name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            fields = [field.value for field in getattr(node, "body", ()) if isinstance(field, ast.AnnAssign)]
            calls = [value.func for value in fields if isinstance(value, ast.Call)]
            if isinstance(node, ast.ClassDef) and any(isinstance(f, ast.Name) and f.id == "option" for f in calls):
                module = ".".join(("hba", *path.relative_to(SOURCE).with_suffix("").parts))
                found[node.name] = getattr(importlib.import_module(module), node.name)
    return found


CONFIGS = config_classes()


def test_all_configs_are_found():
    assert len(CONFIGS) >= 18
    assert set(CONFIGS) >= {"SftConfig", "QaConfig", "BamConfig", "LmConfig", "RlConfig", "PredictConfig"}


def switches(config):
    hints = typing.get_type_hints(config)
    return [field.name for field in dataclasses.fields(config) if hints[field.name] is bool]


SWITCHES = [(config, name) for config in CONFIGS.values() for name in switches(config)]


@pytest.mark.parametrize(("config", "name"), SWITCHES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("value", ["true", "false"])
def test_every_switch_of_a_config_can_be_turned_off_and_on(config, name, value):
    needed = [f.name for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING]
    loaded = load_config(config, None, [*(f"{key}=x" for key in needed), f"{name}={value}"])
    assert getattr(loaded, name) is (value == "true")


def test_every_flag_that_is_on_can_be_turned_off():
    todo, seen = [typer.main.get_command(app)], 0
    while todo:
        command = todo.pop()
        todo += getattr(command, "commands", {}).values()
        for param in command.params:
            if getattr(param, "is_flag", False) and isinstance(param.default, bool):
                seen += 1
                assert not param.default or param.secondary_opts, (command.name, param.name)
    assert seen >= 20
