"""Typed configuration: a frozen, keyword-only dataclass, a YAML file over its defaults, `key=value` on top.

Sections are nested dataclasses and keys are dotted (`train.learning_rate=1e-4`). Values have the types that
their fields say: nothing is coerced, except that a whole number is a fine float, a list a tuple and a text a
path. Refused, with file, line and key: unknown, repeated and missing keys, wrong types, numbers that are not
finite.

Invariant: what `to_yaml` writes loads to an equal config.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePath
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import yaml

from hba.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pydantic import ValidationError


# YAML as configuration needs it: the scalars of its core schema alone, one place for every key. PyYAML follows YAML
# 1.1, where `1e-4` is text, `no` is false, `010` is eight and `12:30` is 750. Here `1e-4` is a float and the others are
# texts. Dates, sets and binary values do not exist, a key is always a text, and a key that stands twice is an error
# instead of the last one winning. Invariant: what `dump_yaml` writes, `parse_yaml` reads back equal.

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


def read_yaml(path: Path, places: dict[str, str] | None = None) -> dict[str, Any]:
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds. Raises ValueError."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 -- a SafeLoader with fewer tags
    except yaml.YAMLError as error:
        raise ValueError(getattr(error, "problem", None) or str(error)) from None


def dump_yaml(value: Any) -> str:
    """A plain value as YAML lines, in the order of its keys."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def inline_yaml(value: Any) -> str:
    """A value as YAML in one line; tuples as lists, paths as texts."""
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, PurePath) else value
    text: str = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


# --- configurations ---------------------------------------------------------------------------------------------------


T = TypeVar("T")
COMMAND_LINE = "command line"


class Key(NamedTuple):
    """One key of a config, for people. `default` is YAML, or None where the user must choose."""

    key: str
    type: str
    default: str | None
    doc: str


class _Field(NamedTuple):
    field: dataclasses.Field[Any]
    hint: Any
    section: type[Any] | None  # the dataclass that this field nests


@overload
def option(default: T, doc: str, *, affects_result: bool = True) -> T: ...
@overload
def option(*, doc: str, affects_result: bool = True) -> Any: ...
def option(default: Any = dataclasses.MISSING, doc: str = "", *, affects_result: bool = True) -> Any:
    """A config field with one line of documentation, required when it has no default.

    `affects_result=False` marks a key (log interval, worker count) that a resumed run may change. Raises
    TypeError without `doc`.
    """
    if not doc:
        raise TypeError("a config field needs one line of documentation")
    metadata = {"doc": doc, "affects_result": affects_result}
    return dataclasses.field(default=default, metadata=metadata)


def load_config(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """The `cls` that the YAML file `path` and then `key=value` overrides describe, over its defaults.

    A section that is given in part keeps the rest of its default. Raises ConfigError naming file, line, key.
    """
    data: dict[str, Any] = {}
    places: dict[str, str] = {"": COMMAND_LINE if path is None else str(path)}
    if path is not None:
        data = read_yaml(path, places)
    for override in overrides:
        _apply(override, data, places)
    return _validate(cls, _filled(cls, cls, data, {}, places, ""), places)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists, texts and numbers. Raises ConfigError for a number that is not finite."""
    from pydantic import TypeAdapter

    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    try:
        json.dumps(plain, allow_nan=False)
    except ValueError:
        raise ConfigError("a number is not finite", where=type(config).__name__, fix="Use a finite number.") from None
    return plain


def to_yaml(config: Any) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back to an equal config."""
    return dump_yaml(to_dict(config))


def describe(cls: type[Any]) -> list[Key]:
    """Every key of `cls` in its order: dotted name, type, default and documentation."""
    return list(_describe(cls, {}, ""))


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, Mapping) and value
        leaves.update(flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return leaves


def defaults(cls: type[Any]) -> dict[str, Any]:
    """The dotted keys of `cls` with their defaults as plain values; a key that must be chosen has none."""
    found: dict[str, Any] = {}
    for name, field in _fields(cls).items():
        value = _default(field.field)
        if value is not dataclasses.MISSING:
            found |= flat({name: value})
        elif field.section is not None:
            found |= {f"{name}.{key}": inner for key, inner in defaults(field.section).items()}
    return found


def keys_without_effect(cls: type[Any], prefix: str = "") -> set[str]:
    """The dotted keys that are marked as not changing a result, and those of earlier versions that were (RETIRED)."""
    found = {f"{prefix}{name}" for name in getattr(cls, "RETIRED", ())}
    for name, field in _fields(cls).items():
        if not field.field.metadata.get("affects_result", True):
            found.add(f"{prefix}{name}")
        if field.section is not None:
            found |= keys_without_effect(field.section, f"{prefix}{name}.")
    return found


def renamed(cls: type[Any], key: str) -> str:
    """The present name of a dotted key of an earlier version (RENAMED: old -> new, of keys or whole sections)."""
    for old, new in getattr(cls, "RENAMED", {}).items():
        if key == old or key.startswith(f"{old}."):
            return f"{new}{key[len(old) :]}"
    return key


def _fields(cls: type[Any]) -> dict[str, _Field]:
    """The fields of a config class. Raises TypeError when it is not a frozen, keyword-only dataclass."""
    fields = dataclasses.fields(cls)
    if not cls.__dataclass_params__.frozen or not all(field.kw_only for field in fields):
        raise TypeError(f"{cls.__name__} is not a frozen, keyword-only dataclass")
    hints = get_type_hints(cls)
    return {field.name: _Field(field, hints[field.name], _section(hints[field.name])) for field in fields}


def _section(hint: Any) -> type[Any] | None:
    if get_origin(hint) in (Union, UnionType):
        return next((section for arg in get_args(hint) if (section := _section(arg)) is not None), None)
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field as a plain value, MISSING when it is required."""
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def _apply(override: str, data: dict[str, Any], places: dict[str, str]) -> None:
    """Put the value of one `key=value` into `data`."""
    key, equals, text = override.partition("=")
    *sections, name = parts = key.strip().split(".")
    secret = re.search(r"(key|token|secret|password)(_env)?$", name.lower())  # messages end up in logs
    where = f"{COMMAND_LINE}, {f'{key}=...' if secret else override!r}"
    if not equals or not all(parts):
        raise ConfigError("expected key=value", where=where, fix="For example train.learning_rate=1e-4.")
    for depth, section in enumerate(sections, 1):
        inner = data.get(section)
        data[section] = inner = {} if inner is None else inner
        places.setdefault(".".join(sections[:depth]), where)
        if not isinstance(inner, dict):
            fix = f"Write {'.'.join(sections[:depth])}=VALUE, or remove that one before."
            raise ConfigError(f"{section!r} has no keys of its own", where=where, fix=fix)
        data = inner
    try:
        data[name] = parse_yaml(text)
    except ValueError as error:
        fix = "Quote the value: key='\"text: with special characters\"'."
        raise ConfigError(f"the value is not valid YAML ({error})", where=where, fix=fix) from None
    for inside in [place for place in places if place.startswith(f"{key.strip()}.")]:
        del places[inside]  # a section given whole here no longer comes from the file
    places[key.strip()] = where


def _place(key: str, places: Mapping[str, str]) -> str:
    """Where `key`, or the section nearest around it, was given."""
    while key not in places and key:
        key = key.rpartition(".")[0]
    return places[key]


def _filled(
    root: type[Any],
    cls: type[Any],
    data: Mapping[str, Any],
    base: Mapping[str, Any],
    places: dict[str, str],
    prefix: str,
) -> dict[str, Any]:
    """`data` over `base`; a section in part is laid over the default that its parent gives it, not its class's.

    Raises ConfigError for a key that the class, or `root` around it, does not have, and for a value where a section is.
    """
    fields, filled = _fields(cls), dict(base)
    for name, value in data.items():
        key = f"{prefix}{name}"
        where = _place(key, places)
        if name not in fields:
            old = next(iter(flat({key: value})))
            if (now := renamed(root, old)) != old:
                written = f"{now}=..." if where.startswith(COMMAND_LINE) else now
                raise ConfigError(f"{old!r} has another name now", where=where, fix=f"Write {written}")
            elsewhere = [known.key for known in describe(root) if known.key.rpartition(".")[2] == name]
            # Compared without the prefix, whose letters would make any key of the section look near.
            fix = f"Did you mean {elsewhere[0]!r}?" if elsewhere else nearest(name, fields, prefix=prefix)
            raise ConfigError(f"unknown key {key!r}", where=where, fix=fix)
        field, hint, section = fields[name]
        if section is not None and isinstance(value, Mapping):
            start = base[name] if name in base else _default(field)
            start = start if isinstance(start, Mapping) else {}
            value = _filled(root, section, value, start, places, f"{key}.")
        elif section is not None and (value is not None or type(None) not in get_args(hint)):
            fix = f"Set its keys, such as {key}.{next(iter(_fields(section)))}."
            raise ConfigError(f"{key!r} is a section, found {_found(value)}", where=where, fix=fix)
        filled[name] = value
    return filled


def _validate(cls: type[T], data: dict[str, Any], places: Mapping[str, str]) -> T:
    from pydantic import TypeAdapter, ValidationError

    try:
        # Strict JSON is the mode in which a list is a tuple and a text a path, and nothing else is converted.
        return TypeAdapter(cls).validate_json(json.dumps(data, allow_nan=False), strict=True)
    except ValidationError as error:
        raise _translated(cls, error, places) from None
    except ValueError as error:
        fix = "Use finite numbers and no aliases."
        raise ConfigError(f"not a plain value ({error})", where=places[""], fix=fix) from None


def _translated(cls: type[Any], error: ValidationError, places: Mapping[str, str]) -> ConfigError:
    """The first wrong key, as expected and found."""
    details = error.errors(include_url=False)
    first = details[0]
    key = _key(cls, first["loc"])
    where = _place(key, places)
    doc = next((f"{known.key} ({known.type}): {known.doc}." for known in describe(cls) if known.key == key), "")
    if first["type"].startswith("missing"):
        fix = f"Add {_written(key, where)}VALUE. {doc}".strip()
        return ConfigError(f"required key {key!r} is missing", where=where, fix=fix)
    if first["type"] == "value_error":
        return ConfigError(f"key {key!r}: {first['ctx']['error']}", where=where, fix=doc)
    messages = dict.fromkeys(detail["msg"] for detail in details if _key(cls, detail["loc"]) == key)
    expected = " or ".join(message.removeprefix("Input should be ") for message in messages)
    expected = expected.replace("a valid array", "a list")
    if first["type"] == "tuple_type" and isinstance(first["input"], (str, int, float)):
        listed = inline_yaml([first["input"]])
        doc = f"Write {_written(key, where)}{listed}. {doc}"
    choices = [detail for detail in details if detail["type"] == "literal_error" and _key(cls, detail["loc"]) == key]
    if choices and isinstance(first["input"], str):
        names = re.findall(r"'([^']*)'", str(choices[0]["ctx"]["expected"]))
        close = get_close_matches(first["input"].lower(), names, n=1)
        doc = f"Did you mean {close[0]!r}? {doc}" if close else doc
    return ConfigError(f"key {key!r}: expected {expected}, found {_found(first['input'])}", where=where, fix=doc)


def _key(cls: type[Any], loc: Sequence[int | str]) -> str:
    """The dotted key in a pydantic location, without the union members and indices behind it."""
    names: list[str] = []
    current: type[Any] | None = cls
    for part in loc:
        if current is None or part not in (fields := _fields(current)):
            break
        names.append(str(part))
        current = fields[str(part)].section
    return ".".join(names)


def _written(key: str, where: str) -> str:
    """How a key is begun where it stands: `key=` on the command line, `name: ` in a file."""
    return f"{key}=" if where.startswith(COMMAND_LINE) else f"{key.rpartition('.')[2]}: "


def _found(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _describe(cls: type[Any], base: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    for name, (field, hint, section) in _fields(cls).items():
        default = base[name] if name in base else _default(field)
        if section is not None:
            yield from _describe(section, default if isinstance(default, Mapping) else {}, f"{prefix}{name}.")
            continue
        shown = None if default is dataclasses.MISSING else inline_yaml(default)
        yield Key(f"{prefix}{name}", _type_name(hint), shown, field.metadata.get("doc", ""))


def _type_name(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return " | ".join(map(str, arguments))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    name = "none" if hint is type(None) else getattr(hint, "__name__", str(hint))
    inner = ", ".join("..." if argument is Ellipsis else _type_name(argument) for argument in arguments)
    return f"{name}[{inner}]" if inner else name
