"""What the name of a model means: a folder on this machine, or an id of the hub such as Qwen/Qwen2.5-Omni-7B.

The rule is that of atlases (`hba.atlas.hub_id`): a path below a folder that exists is never taken for an id, so that a
mistyped run is reported as one instead of being looked up on the hub.
"""

from __future__ import annotations

from pathlib import Path

from hba.atlas.hub_id import hub_id_of
from hba.errors import InputError

ACCEPTED = (
    "a run folder, a checkpoint, a folder with a Hugging Face model, or a hub id such as Qwen/Qwen2.5-Omni-7B (a path"
    " below a folder that exists is none)"
)


def require_place(name: str | Path, *, also: str = "") -> None:
    """Raise InputError when `name` is neither a folder on this machine nor may be an id of the hub.

    `also` is what else would be accepted where it is asked for.
    """
    if not Path(name).is_dir() and hub_id_of(name) is None:
        raise InputError("no such folder", where=str(name), fix=f"Give {ACCEPTED}{also}.")
