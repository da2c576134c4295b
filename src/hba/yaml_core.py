"""YAML as configuration needs it: the scalars of its core schema alone, one place for every key.

PyYAML follows YAML 1.1, where `1e-4` is text, `no` is false, `010` is eight and `12:30` is 750. Here `1e-4` is a
float and the others are texts. Dates, sets and binary values do not exist, a key is always a text, and a key
that stands twice is an error instead of the last one winning.

Invariant: what `dump` writes, `loads` reads back equal.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

import yaml

from hba.errors import ConfigError

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", list("-+.0123456789")),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in {*_SCALARS, "str", "seq", "map"}
    }


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})\Z"), _first)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # YAML folds these line breaks into spaces wherever they stand unescaped.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def read(path: Path, places: dict[str, str] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file; `places` receives 'file:line' for every dotted key.

    Raises ConfigError naming file and line when the file cannot be read or is not a mapping of texts.
    """
    try:
        loader = _Loader(path.read_bytes())
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError("expected 'key: value' lines", where=str(path), fix="Write one key a line.")
        _mark(node, path, "", {} if places is None else places, set())
        data: dict[str, Any] = loader.construct_document(node)
    except OSError as error:
        raise ConfigError(f"cannot read ({error.strerror})", where=str(path), fix="Check the path.") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"not valid YAML ({what})", where=where, fix="Repair the line.") from None
    return data


def _mark(node: yaml.MappingNode, path: Path, prefix: str, places: dict[str, str], seen: set[int]) -> None:
    """Note where each key stands, and refuse one that stands twice: YAML would silently keep the last."""
    seen.add(id(node))
    here: set[str] = set()
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError("a key must be a word", where=where, fix="Write 'key: value'.")
        # `1:` and `"1":` would be two keys; a config has only texts.
        key_node.tag = "tag:yaml.org,2002:str"
        key = f"{prefix}{key_node.value}"
        if key in here:
            raise ConfigError(f"key {key!r} stands twice", where=where, fix="Remove one of the two.")
        here.add(key)
        places[key] = where
        if isinstance(value_node, yaml.MappingNode) and id(value_node) not in seen:
            _mark(value_node, path, f"{key}.", places, seen)


def loads(text: str) -> Any:
    """The value that a YAML text holds. Raises ValueError."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 -- a SafeLoader with fewer tags
    except yaml.YAMLError as error:
        raise ValueError(getattr(error, "problem", None) or str(error)) from None


def dump(value: Any) -> str:
    """A plain value as YAML lines, in the order of its keys."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def dump_inline(value: Any) -> str:
    """A value as YAML in one line; tuples as lists, paths as texts."""
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, PurePath) else value
    text: str = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
