"""`hba train rl --engine verl`: write verl's config into the run folder, start verl, follow it, go on where it was.

verl runs in processes of its own, so that its failures cannot take hba's records along. Everything it reads and writes
is in RUN/verl: `hba.yaml` (its config), `model/` (what it starts from, as the release is laid out), `checkpoints/` (the
last and the best), `verl.log`. The steps are in RUN/log.jsonl, in the local engine's form.

What ends a run for a reason of ours, a reward that raises say, lies in `failure.json` (`note_failure`): verl would drop
the rollout that it is about and go on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from hba.atlas import data_record
from hba.config import dump_yaml
from hba.errors import HbaError, InputError
from hba.model import checkpoint
from hba.model.merge import Parts, merge_checkpoint, require_free, write_full
from hba.rl.advantages import build_advantage
from hba.rl.config import RlConfig
from hba.rl.evaluation_log import read_evaluations, summary
from hba.rl.prompts import training_rows, validation_rows
from hba.rl.rewards import Scorer
from hba.rl.telemetry import in_words
from hba.rl.verl.config import Place, modules, nested, translate
from hba.rl.verl.dataset import run_config, step_rows
from hba.run import RunFolder, wandb_run
from hba.storage import atomic_folder, read_json, write_data, write_json

CONFIG = "hba"
FAILURE = "failure.json"
LATEST = "latest_checkpointed_iteration.txt"
POLL_SECONDS = 0.5
TAIL_LINES = 30
INSTALL = "pip install 'human-behavior-atlas[verl]' into an environment without TRL (docs/scale.md)."


def place_of(config: RlConfig, run: Path) -> Place:
    """Files and length of a run. Raises InputError for rows that cannot be opened."""
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


def train_on_verl(
    config: RlConfig, run: RunFolder, told: Callable[[int, int], None], said: Callable[[str], None]
) -> int:
    """Run (or resume) it to its end; gives the number of steps. `told` hears of each, with the number in all, `said`
    what evaluations and warnings say.

    Raises InputError for another model than a Qwen2.5-Omni and without verl, HbaError with the end of verl's log when
    it fails.
    """
    known = checkpoint.resolve(config.model.name)
    model = checkpoint.read_config(config.model.name if known is None else checkpoint.base_of(known))
    if not checkpoint.is_thinker(model):
        found = f"verl's engine takes Qwen2.5-Omni alone, and this is a model of type {model.model_type}"
        raise InputError(found, where=config.model.name, fix="Use the local engine (leave --engine out).")
    if find_spec("verl") is None:
        raise InputError("verl is not installed", where="--engine verl", fix=INSTALL)
    place = place_of(config, run.path)
    build_advantage(config.resolved_algorithm().advantage)  # a function of one's own that is not there is said at once
    Scorer(config.reward)
    run.record_data(data_record(config.atlas, training_rows(config)))
    place.folder.mkdir(parents=True, exist_ok=True)
    _release(config, place)
    keys = translate(config, place)
    if config.train.wandb_project is not None:
        at = "ray_kwargs.ray_init.runtime_env.env_vars"
        keys[at] |= {"WANDB_RUN_ID": wandb_run(run.path)["id"], "WANDB_RESUME": "allow"}
    settings = {"defaults": ["ppo_trainer", "_self_"], **nested(keys)}
    write_data(place.folder / f"{CONFIG}.yaml", dump_yaml(settings))
    run.truncate_log(latest_step(place.folder))
    _run(config, place, told, said)
    return latest_step(place.folder)


def latest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint below RUN/verl; 0 without one."""
    file = folder / "checkpoints" / LATEST
    return int(file.read_text()) if file.is_file() else 0


def best_step(run: Path) -> int:
    """The step of the checkpoint with the best greedy reward on held-out rows, the newest if none was evaluated."""
    latest = latest_step(run / "verl")
    scores = {step: summary(records)["greedy_reward"] for step, records in read_evaluations(run).items()}
    kept = [step for step, _ in checkpoints(run) if step in scores and step <= latest]
    return max(kept, key=lambda step: (scores[step], -step), default=latest)


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run on verl, oldest first; the last of them may be one that is being written."""
    found = (run / "verl" / "checkpoints").glob("global_step_*")
    return sorted((int(path.name.removeprefix("global_step_")), path) for path in found)


def keep_last_and_best(run: Path) -> None:
    """Remove the checkpoints that are neither, nor being written. To be called after a save and an evaluation."""
    latest, best = latest_step(run / "verl"), best_step(run)
    for step, path in checkpoints(run):
        if step < latest and step != best:
            shutil.rmtree(path)


def note_failure(run: Path, error: HbaError) -> None:
    """Let the command of `run` end with `error`; the first one that is noted counts."""
    file = run / "verl" / FAILURE
    if not file.is_file():
        write_json(file, {"what": error.what, "where": error.where, "fix": error.fix})


def noted_failure(run: Path) -> HbaError | None:
    """What a process of verl has noted since the command was started."""
    file = run / "verl" / FAILURE
    if not file.is_file():
        return None
    noted = read_json(file)
    return HbaError(noted["what"], where=noted["where"], fix=noted["fix"])


def _release(config: RlConfig, place: Place) -> None:
    """Lay the model out as the release is, where it is a run, a checkpoint or a bare thinker."""
    out = Path(place.model)
    if out != place.folder / "model":
        checkpoint.fit_backbone(place.model)  # verl would draw what is missing at random, as transformers does
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


def _run(config: RlConfig, place: Place, told: Callable[[int, int], None], said: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(place.folder)]
    command += ["--config-name", CONFIG, f"hydra.run.dir={place.folder / 'hydra'}", *config.verl.overrides]
    environment = {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": modules(config),
        "VERL_FILE_LOGGER_PATH": str(place.folder / f"metrics-from-{latest_step(place.folder)}.jsonl"),
        "TOKENIZERS_PARALLELISM": "false",
        "HYDRA_FULL_ERROR": "1",
    }
    log, lines = place.folder / "verl.log", _Lines(place)
    (place.folder / FAILURE).unlink(missing_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            while process.poll() is None and noted_failure(place.run) is None:
                lines.tell(told, said)
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    lines.tell(told, said)
    failed = noted_failure(place.run)
    if failed is not None:
        raise failed
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        fix = "Run the same command again to go on from the last checkpoint."
        raise HbaError(f"verl ended with code {process.returncode}; its last lines:\n{tail}\n", where=str(log), fix=fix)


class _Lines:
    """What verl's processes add to log.jsonl, which they may be writing; a line that was told is not told again."""

    def __init__(self, place: Place) -> None:
        self._file, self._total = place.run / "log.jsonl", place.steps
        self._at = self._file.stat().st_size if self._file.is_file() else 0
        self._step = latest_step(place.folder)

    def tell(self, told: Callable[[int, int], None], said: Callable[[str], None]) -> None:
        """Tell of the step that was reached, and say evaluations and warnings."""
        if self._file.is_file():
            with self._file.open("rb") as file:
                file.seek(self._at)
                whole = file.read().rpartition(b"\n")[0]
            self._at += len(whole) + bool(whole)
            for record in map(json.loads, whole.splitlines()):
                self._step = max(self._step, int(record["step"]))
                if record["kind"] == "evaluation":
                    said(f"step {record['step']}: {in_words(record['figures'])}")
                elif record["kind"] == "warning":
                    said(f"warning: step {record['step']}: {record['message']}")
        told(self._step, self._total)


# `hba merge` of a run on verl: its best checkpoint as one full model, which predict, score and report take.
#
# verl writes the weights of a checkpoint in Hugging Face form beside its own shards (`actor/huggingface`); nothing here
# needs verl, and nothing is unpickled.


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
