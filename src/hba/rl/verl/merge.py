"""`hba merge` of a run on verl: its best checkpoint as one full model, which predict, score and report take.

verl writes the weights of a checkpoint in Hugging Face form beside its own shards (`actor/huggingface`); nothing here
needs verl, and nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hba.errors import InputError
from hba.model import checkpoint
from hba.model.merge import Parts, require_free, write_full
from hba.rl.verl.launch import best_step
from hba.rl.verl.rows import run_config
from hba.storage import atomic_folder

FOLDER = "verl"


def is_verl_run(path: Path) -> bool:
    """Whether a folder is a run of `hba train rl --engine verl`."""
    return (path / FOLDER / "hba.yaml").is_file()


def merge_verl_run(run: Path, out: Path, *, dtype: torch.dtype) -> int:
    """Write the model into the new folder `out`; gives the step that it is from.

    Raises InputError when no checkpoint is whole or `out` is taken.
    """
    require_free(out)
    config, step = run_config(str(run)), best_step(run)
    weights = run / FOLDER / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"
    if not step or not list(weights.glob("*.safetensors")):
        raise InputError("no whole checkpoint", where=str(run / FOLDER), fix="Run the command of the run again.")
    place = checkpoint.place_of(config.model.name)
    card = checkpoint.new_card(place, "full", config.encode, formats=(config.format,))
    with atomic_folder(out) as new:
        write_full(Parts(base=str(weights), processor=str(weights)), new, dtype=dtype, card=card)
    return step
