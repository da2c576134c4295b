"""The optimizer's state as safetensors, one file a rank, restored on any number of ranks. Nothing is pickled.

`optimizer-RANK-of-WORLD.safetensors` holds, for every parameter that has had a gradient, `NAME/step` and the rows of
`NAME/exp_avg` and `NAME/exp_avg_sq` that belong to the rank (sharding splits dimension 0); its header says where they
begin. A rank that resumes reads the rows that are its own now, from whichever files hold them. A model that every rank
holds whole is written by the first alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hba.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")
_FILE = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")


class _Rows(NamedTuple):
    first: int
    total: int


def save_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, rank: int, world: int) -> None:
    """Write this rank's part of the state of `optimizer`, whose parameters are those of `model`, into `folder`."""
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if not sharded and rank:
        return
    tensors: dict[str, Tensor] = {}
    first_rows: dict[str, int] = {}
    for name, parameter in _trained(model):
        state = optimizer.state.get(parameter)
        if state:
            first_rows[name] = _own_rows(parameter).first
            tensors[f"{name}/step"] = state["step"].detach().cpu()
            for moment in MOMENTS:
                tensors[f"{name}/{moment}"] = _local(state[moment]).detach().cpu().contiguous()
    file = f"optimizer-{rank:05}-of-{world if sharded else 1:05}.safetensors"
    save_file(tensors, folder / file, metadata={"first_rows": json.dumps(first_rows)})


def restore_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the state of `optimizer` back as `save_optimizer` wrote it, by however many ranks.

    Raises InputError when a file is damaged or missing, or the state is that of other parameters.
    """
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in _files(folder)]
            held = {name for file in files for name in json.loads(file.metadata()["first_rows"])}
            trained = dict(_trained(model))
            _require_known(held - trained.keys(), folder)
            for name in held:
                optimizer.state[trained[name]] = _state(name, trained[name], files, folder)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise _damaged(folder, str(error).splitlines()[0]) from error


def _state(name: str, parameter: nn.Parameter, files: list[Any], folder: Path) -> dict[str, Tensor]:
    state = {"step": next(f.get_tensor(f"{name}/step") for f in files if f"{name}/step" in f.keys())}  # noqa: SIM118
    own = _own_rows(parameter)
    for moment in MOMENTS:
        local = torch.empty_like(_local(parameter), device="cpu")
        found = 0
        for rows, into in _overlaps(f"{name}/{moment}", name, own, files):
            _by_rows(local)[into : into + len(rows)] = rows
            found += len(rows)
        if found != own.total:
            raise _damaged(folder, f"{found} of {own.total} rows of {name}")
        state[moment] = _like(parameter, local.to(_local(parameter).device))
    return state


def _overlaps(key: str, name: str, own: _Rows, files: list[Any]) -> Iterator[tuple[Tensor, int]]:
    """The rows of `own` that each file has, with their place among the own rows."""
    for file in files:
        starts = json.loads(file.metadata()["first_rows"])
        if name not in starts:
            continue
        kept = file.get_slice(key)
        shape = kept.get_shape()
        first, count = starts[name], shape[0] if shape else 1
        start, stop = max(first, own.first), min(first + count, own.first + own.total)
        if start < stop:
            rows = kept[start - first : stop - first] if shape else file.get_tensor(key).reshape(1)
            yield rows, start - own.first


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _own_rows(parameter: Tensor) -> _Rows:
    """Which rows of the whole parameter this rank holds. Sharding deals equal chunks; the last ranks may get fewer."""
    count = parameter.shape[0] if parameter.ndim else 1
    if not isinstance(parameter, DTensor):
        return _Rows(0, count)
    chunk = -(-count // parameter.device_mesh.size())
    first = min(parameter.device_mesh.get_local_rank() * chunk, count)
    return _Rows(first, min(first + chunk, count) - first)


def _by_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim else tensor.reshape(1)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local
    where = (parameter.device_mesh, parameter.placements)
    return DTensor.from_local(local, *where, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _files(folder: Path) -> list[Path]:
    """The files of all ranks that wrote. Raises InputError naming those that are not there."""
    found = {path.name: path for path in folder.iterdir() if _FILE.fullmatch(path.name)}
    worlds = {int(match[2]) for name in found if (match := _FILE.fullmatch(name))}
    if len(worlds) != 1:
        raise _damaged(folder, "no file optimizer-*" if not worlds else "files of several saves")
    (world,) = worlds
    names = [f"optimizer-{rank:05}-of-{world:05}.safetensors" for rank in range(world)]
    missing = [name for name in names if name not in found]
    if missing:
        raise _damaged(folder, f"no file {', '.join(missing)}")
    return [found[name] for name in names]


def _require_known(names: set[str], folder: Path) -> None:
    if names:
        fix = "Resume with the strategy that the run was started with."
        what = f"the optimizer state is of parameters that do not train: {', '.join(sorted(names)[:5])}"
        raise InputError(what, where=str(folder), fix=fix)


def _damaged(folder: Path, what: str) -> InputError:
    fix = f"Remove {folder.name}; the run then goes on from the checkpoint before, or from its start."
    return InputError(f"not the optimizer state of a run, or damaged ({what})", where=str(folder), fix=fix)
