"""`hba train rl --engine verl`: write verl's config into the run folder, start verl, follow it, go on where it was.

verl runs in processes of its own, so that its failures cannot take hba's records along. Everything it reads and writes
is in RUN/verl: `hba.yaml` (its config), `model/` (what it starts from, as the release is laid out), `checkpoints/`,
`verl.log`. The steps are in RUN/log.jsonl, in the local engine's form.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from hba import yaml_core
from hba.errors import HbaError, InputError
from hba.model import checkpoint
from hba.process import data_record
from hba.rl.config import RlConfig
from hba.rl.rows import training_rows, validation_rows
from hba.rl.verl.config import Place, modules, nested, translate
from hba.rl.verl.dataset import step_rows
from hba.run import RunFolder
from hba.storage import atomic_folder, atomic_write, read_json

CONFIG = "hba"
LATEST = "latest_checkpointed_iteration.txt"
POLL_SECONDS = 0.5
TAIL_LINES = 30
INSTALL = "pip install 'human-behavior-atlas[verl]' into an environment without TRL (docs/scale.md)."


def place_of(config: RlConfig, run: Path) -> Place:
    """Files and length of a run. Raises InputError for rows that cannot be opened, ConfigError for too few of them."""
    run = run.resolve()
    steps = len(step_rows(training_rows(config), config))
    validation_rows(config)
    model = config.model.name
    if Path(model).is_dir():
        model = str(Path(model).resolve() if _is_release(Path(model)) else run / "verl" / "model")
    return Place(run, model, steps)


def _is_release(folder: Path) -> bool:
    """Whether a folder is a whole Qwen2.5-Omni, as published and as `hba merge` writes it."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "qwen2_5_omni"


def train_on_verl(config: RlConfig, run: RunFolder, told: Callable[[int, int], None]) -> int:
    """Run (or resume) it to its end; gives the number of steps. `told` hears of each, with the number in all.

    Raises InputError without verl, HbaError with the end of verl's log when it fails.
    """
    if find_spec("verl") is None:
        raise InputError("verl is not installed", where="--engine verl", fix=INSTALL)
    place = place_of(config, run.path)
    run.record_data(data_record(config.atlas, training_rows(config)))
    place.folder.mkdir(parents=True, exist_ok=True)
    _release(config, place)
    settings = {"defaults": ["ppo_trainer", "_self_"], **nested(translate(config, place))}
    with atomic_write(place.folder / f"{CONFIG}.yaml") as file:
        file.write(yaml_core.dump(settings))
    run.truncate_log(latest_step(place.folder))
    _run(config, place, told)
    return latest_step(place.folder)


def latest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint below RUN/verl; 0 without one."""
    file = folder / "checkpoints" / LATEST
    return int(file.read_text()) if file.is_file() else 0


def _release(config: RlConfig, place: Place) -> None:
    """Lay the model out as the release is, where it is a run, a checkpoint or a bare thinker."""
    from hba.model.merge import Parts, merge_checkpoint, write_full

    out = Path(place.model)
    if out != place.folder / "model":
        checkpoint.fit_thinker(place.model)  # verl would draw what is missing at random, as transformers does
        return
    if out.is_dir():
        return
    if checkpoint.resolve(config.model.name) is not None:
        merge_checkpoint(config.model.name, out, dtype="float32")
        return
    name = checkpoint.place_of(config.model.name)
    card = checkpoint.new_card(name, "full", config.encode)
    with atomic_folder(out) as new:
        write_full(Parts(base=name, processor=name), new, dtype=torch.float32, card=card)


def _run(config: RlConfig, place: Place, told: Callable[[int, int], None]) -> None:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(place.folder)]
    command += ["--config-name", CONFIG, f"hydra.run.dir={place.folder / 'hydra'}", *config.verl.overrides]
    environment = {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": modules(config),
        "VERL_FILE_LOGGER_PATH": str(place.folder / f"metrics-from-{latest_step(place.folder)}.jsonl"),
        "TOKENIZERS_PARALLELISM": "false",
        "HYDRA_FULL_ERROR": "1",
    }
    log = place.folder / "verl.log"
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            while process.poll() is None:
                told(_steps(place), place.steps)
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    told(_steps(place), place.steps)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        fix = "Run the same command again to go on from the last checkpoint."
        raise HbaError(f"verl ended with code {process.returncode}; its last lines:\n{tail}\n", where=str(log), fix=fix)


def _steps(place: Place) -> int:
    """Steps in the log, which verl's process may be writing."""
    file = place.run / "log.jsonl"
    return file.read_text(errors="replace").count('"kind": "rl"') if file.is_file() else 0
