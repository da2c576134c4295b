"""What a training run shows and records: log.jsonl and TensorBoard always, W&B when asked, a live line in a terminal.

Log lines carry the step, so that a resumed run can cut those beyond its checkpoint; wall-clock values (seconds,
throughput) are the only ones that differ between two equal runs.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from hba.config import read_yaml
from hba.errors import ConfigError
from hba.run import Pulse, RunFolder, wandb_run
from hba.storage import plural
from hba.train.state import Progress

if TYPE_CHECKING:
    from hba.train.config import TrainConfig


class TrainingDisplay:
    """Context manager around a training loop. `enabled` is false on all ranks but the first: they record nothing."""

    def __init__(
        self, run: RunFolder, total_steps: int, start: Progress, config: TrainConfig, *, enabled: bool
    ) -> None:
        self._run, self._config, self._enabled = run, config, enabled
        self._total = total_steps
        self._seconds = 0.0  # of the steps since the last line, as far as this session ran them
        self._samples = 0
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=start.step, figures="")
        self._pulse = Pulse(self._bar.console)
        self._board: Any = None
        self._wandb: Any = None

    def __enter__(self) -> TrainingDisplay:
        if self._enabled:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run.path / "tensorboard"))  # type: ignore[no-untyped-call]
            if self._config.wandb_project is not None:
                self._wandb = _start_wandb(self._config.wandb_project, self._run)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._board is not None:
            # What the board cannot write any more must not hide the error that is on its way.
            with suppress(OSError) if error is not None else nullcontext():
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def step(
        self, progress: Progress, *, grad_norm: float, learning_rate: float, count: int, seconds: float
    ) -> Progress:
        """Record one optimizer step of `count` samples; a line is logged every `log_every` steps, with the mean loss
        since the last. Returns `progress`, which counts the loss anew after a line.

        A step of which every sample was quarantined was skipped; it gets a line of its own.
        """
        self._samples += count
        self._seconds += seconds
        if not count:
            self.record({"step": progress.step, "kind": "skipped", "why": "every sample is quarantined"}, {})
        periods = (self._config.log_every, self._config.validate_every, self._total)
        if all(progress.step % period for period in periods) or not progress.loss_samples:
            self.advance(progress.step)
            return progress
        speed = self._samples / max(self._seconds, 1e-9)
        mean = progress.loss_sum / progress.loss_samples
        record = {
            "step": progress.step,
            "kind": "train",
            "samples_seen": progress.samples_seen,
            "loss": mean,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm if count else None,
            "samples_per_second": round(speed, 2),
        }
        drawn = ("loss", "learning_rate", "grad_norm", "samples_per_second")
        self.record(record, {k: record[k] for k in drawn if record[k] is not None})
        figures = f"loss {mean:.3f}  {speed:.1f} samples/s  {progress.samples_seen} seen"
        self.advance(progress.step, figures)
        self._seconds, self._samples = 0.0, 0
        return replace(progress, loss_sum=0.0, loss_samples=0)

    def advance(self, step: int, figures: str | None = None) -> None:
        """Move the bar to `step`, with a few words on how it goes; without them the last ones stay."""
        said = self._bar.tasks[self._task].fields["figures"] if figures is None else figures
        self._bar.update(self._task, completed=step, figures=said)
        if self._enabled:
            self._pulse.beat(lambda: f"training: step {step:,} of {self._total:,}  {said}".rstrip())

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False) if self._enabled else None

    def validation(self, progress: Progress, metrics: dict[str, Any]) -> None:
        """Record the metrics of a validation, None where a task has no score; a `loss` is not one of the scores."""
        scores = {key: value for key, value in metrics.items() if key != "loss"}
        record = {"step": progress.step, "kind": "validation", "metrics": scores}
        if "loss" in metrics:
            record["loss"] = metrics["loss"]
        numbers = {f"validation/{k}": v for k, v in metrics.items() if v is not None}
        self.record(record, numbers)

    def stopped_early(self, progress: Progress) -> None:
        """Record and say that no validation was better for long enough."""
        what = f"no better validation than that of step {progress.best_step} (train.early_stopping)"
        self.record({"step": progress.step, "kind": "stopped", "why": what}, {})
        self.say(f"Stopped after {progress.step} of {plural(self._total, 'step')}: {what}.")

    def record(self, record: dict[str, Any], numbers: dict[str, Any]) -> None:
        """Log a line, and draw `numbers` on the boards at its step."""
        if not self._enabled:
            return
        self._run.log(record)
        for name, value in numbers.items():
            self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])


def _start_wandb(project: str, run: RunFolder) -> Any:
    """The W&B run of this run folder, the same after a resume; every folder has one of its own, whatever its name."""
    try:
        import wandb
    except ImportError:
        fix = "pip install 'human-behavior-atlas[wandb]', or leave wandb_project unset."
        raise ConfigError("wandb is not installed", where="wandb_project", fix=fix) from None
    config, folder = read_yaml(run.config), str(run.path.resolve())
    return wandb.init(project=project, resume="allow", config=config, dir=folder, **wandb_run(run.path))
