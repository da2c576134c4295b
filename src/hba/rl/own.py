"""A function of the user's own, named `module:function` or `file.py:function`: a reward, or advantages."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hba.errors import InputError


def load_function(name: str, *, key: str, known: Iterable[str]) -> Callable[..., Any]:
    """The function that the config key `key` names. Raises InputError with the `known` names when there is none."""
    module_name, colon, function_name = name.rpartition(":")
    fix = f"Use {', '.join(known)}, module:function or file.py:function."
    if not colon:
        raise InputError(f"no function {name!r}", where=key, fix=fix)
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise InputError(f"cannot import {module_name!r} ({error})", where=key, fix=fix) from None
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{module_name!r} has no function {function_name!r}", where=key, fix=fix)
    return function


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
