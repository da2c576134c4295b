"""A function of the user's own, named `module:function` or `file.py:function`: a reward, or advantages.

Whatever it raises, when it is imported and when it is called, ends the run with the user's own traceback, on every
engine: an HbaError whose text ends where the user's code did.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

from hba.errors import HbaError, InputError, nearest


def load_function(name: str, *, key: str, known: Iterable[str]) -> Callable[..., Any]:
    """The function that the config key `key` names, with its errors as HbaErrors that name the line.

    Raises InputError with the `known` names when there is none, and when its module cannot be imported.
    """
    module_name, colon, function_name = name.rpartition(":")
    names = list(known)
    fix = f"Use {', '.join(names)}, module:function or file.py:function."
    if not colon:
        close = get_close_matches(name, names, n=1)
        raise InputError(f"no function {name!r}", where=key, fix=f"Did you mean {close[0]!r}? {fix}" if close else fix)
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise InputError(f"cannot import {module_name!r} ({error})", where=key, fix=fix) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a module of the user's own does when it is run
        raise InputError(f"{module_name!r} {raised(error)}", where=key, fix="Mend it.") from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        there = [found for found, value in vars(module).items() if callable(value) and not found.startswith("_")]
        what = f"{module_name!r} has no function {function_name!r}"
        raise InputError(what, where=key, fix=nearest(function_name, there))
    return _Guarded(function, f"{key}={name}")


class _Guarded:
    """Calls a function of the user's own. A third boundary beside command and sample: what it raises is its own."""

    def __init__(self, function: Callable[..., Any], where: str) -> None:
        self._function, self._where = function, where

    def __call__(self, **given: Any) -> Any:
        try:
            return self._function(**given)
        except (HbaError, KeyboardInterrupt):
            raise
        except BaseException as error:  # asyncio's CancelledError is no Exception, nor is sys.exit()'s
            fix = "Mend it; the last checkpoint stands, and the same command goes on from there."
            raise HbaError(raised(error), where=self._where, fix=fix) from error


def raised(error: BaseException) -> str:
    """The error with the lines of the traceback that are not ours, the last of which is where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    lines = "".join(traceback.format_list(frames)).rstrip()
    said = "".join(traceback.format_exception_only(error)).strip()
    return f"raised {said}\n{lines}\n" if lines else f"raised {said}"


def _load_file(path: Path) -> Any:
    # Dataclasses look their module up by name. A file that is named twice, for reward and advantages, is one module.
    name = f"hba_own_{path.stem}_{sha256(bytes(path.resolve()) + path.read_bytes()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
