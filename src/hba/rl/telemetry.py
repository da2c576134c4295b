"""What an RL step looked like, by task and dataset: for the log, the report and the table of rollouts.

One `Outcome` a rollout is all that is needed; everything here is a mean over some of them. The watch warns when a
task's reward collapses: an average over its last steps that has fallen far below its best one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hba.rl.advantages import Advantage, Harpo
from hba.rl.groups import grouped
from hba.run import RunFolder
from hba.storage import AppendLog
from hba.train.display import TrainingDisplay
from hba.train.state import Progress

if TYPE_CHECKING:
    from hba.rl.config import RlConfig
    from hba.rl.update import Updated

WINDOW_STEPS = 10
FALL_SHARE = 0.3  # of the best average, and at least:
FALL_REWARD = 0.15


@dataclass(kw_only=True)
class Outcome:
    """One rollout, from response to update. The last six are known when its step is done."""

    id: str
    task: str
    dataset: str
    group: str
    prompt: str
    target: str
    response: str
    tokens: int
    parts: dict[str, float]
    advantage: float = 0.0
    entropy: float = math.nan  # mean over the response's tokens, nats
    kl: float = math.nan  # k3 against the reference, mean over the tokens; nan without a reference
    sampler_gap: float = math.nan  # mean |log-probability of the server - of the policy|, nats; nan without a server
    importance: float = math.nan  # mean truncated importance weight; nan where there is none
    clipped: float = math.nan  # share of the tokens whose gradient the clip took away


def step_record(outcomes: Sequence[Outcome], advantage: Advantage) -> dict[str, Any]:
    """Means over all rollouts of a step, and over those of each task and dataset. NaN is left out."""
    by_task, by_dataset = _split(outcomes, "task"), _split(outcomes, "dataset")
    record: dict[str, Any] = {
        **means(outcomes),
        "tasks": {name: means(own) for name, own in by_task.items()},
        "datasets": {name: means(own) for name, own in by_dataset.items()},
    }
    if isinstance(advantage, Harpo):
        for task, factor in advantage.factors.items():
            factors = {"signal": factor.signal, "task_factor": factor.task_factor}
            record["tasks"][task] |= {**factors, "sample_factor": factor.sample_factor}
    return record


def means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Reward parts, |advantage|, entropy, KL, clip share, tokens and share of groups without signal."""
    silent_K = ~grouped([o.parts["score"] for o in outcomes], [o.group for o in outcomes]).informative_K
    names = sorted({name for outcome in outcomes for name in outcome.parts})
    values = {name: [outcome.parts.get(name, math.nan) for outcome in outcomes] for name in names}
    values["abs_advantage"] = [abs(outcome.advantage) for outcome in outcomes]
    for name in ("tokens", "entropy", "kl", "clipped", "sampler_gap", "importance"):
        values[name] = [float(getattr(outcome, name)) for outcome in outcomes]
    found = {name: _mean(each) for name, each in values.items()}
    known = {name: value for name, value in found.items() if not math.isnan(value)}
    return {**known, "silent_groups": float(silent_K.mean()), "rollouts": float(len(outcomes))}


def table(step: int, outcomes: Sequence[Outcome], groups: int) -> list[dict[str, Any]]:
    """Lines of rollouts.jsonl: all rollouts of the first prompts of a step, different tasks first."""
    seen: dict[str, int] = defaultdict(int)
    order: dict[str, tuple[int, int]] = {}
    for outcome in outcomes:
        if outcome.group not in order:
            order[outcome.group] = (seen[outcome.task], len(order))
            seen[outcome.task] += 1
    chosen = sorted(order, key=lambda group: order[group])[:groups]
    return [{"step": step, **_plain(o)} for group in chosen for o in outcomes if o.group == group]


def board_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """What the boards draw of a step's record: its means over all rollouts, and each task's reward."""
    flat = {name: value for name, value in record.items() if isinstance(value, float)}
    by_task = {f"{task}/score": own["score"] for task, own in record["tasks"].items()}
    return {f"rl/{name}": value for name, value in {**flat, **by_task}.items()}


class RunLog:
    """Writes what a run says of itself: log.jsonl and the boards, rollouts.jsonl, the line in the terminal."""

    def __init__(self, run: RunFolder, display: TrainingDisplay, config: RlConfig) -> None:
        self._run, self._display, self._config = run, display, config

    def step(
        self,
        progress: Progress,
        outcomes: Sequence[Outcome],
        advantage: Advantage,
        watch: CollapseWatch,
        updated: Updated,
        rate: float,
        seconds: Mapping[str, float],
    ) -> None:
        """One step: its means, its warnings, and every `table_every` steps some of its rollouts."""
        step, means_of = progress.step, step_record(outcomes, advantage)
        update = {"loss": updated.loss, "grad_norm": updated.grad_norm}
        rates = {"learning_rate": self._config.train.learning_rate * rate}
        times = {name: round(value, 3) for name, value in seconds.items()}
        record = {"step": step, "kind": "rl", "samples_seen": progress.samples_seen, **update, **rates, **means_of}
        self._display.record(record | times, board_figures(record))
        for sentence in watch.update({task: own["score"] for task, own in means_of["tasks"].items()}):
            self._display.record({"step": step, "kind": "warning", "message": sentence}, {})
            self._display.say(f"warning: step {step}: {sentence}")
        self._display.advance(step, f"reward {means_of['score']:.3f}  {means_of['tokens']:.0f} tokens")
        if self._run.is_main and (step == 1 or step % self._config.table_every == 0):
            with AppendLog(self._run.rollouts) as log:
                for line in table(step, outcomes, self._config.table_prompts):
                    log.append(line)

    def evaluation(self, progress: Progress, figures: Mapping[str, float]) -> None:
        """Means of an evaluation."""
        record = {"step": progress.step, "kind": "evaluation", "figures": dict(figures)}
        self._display.record(record, {f"evaluation/{name}": value for name, value in figures.items()})


class CollapseWatch:
    """Notes when the mean reward of a task over the last steps falls far below the best such mean so far.

    A task is warned of once, until it has recovered half of its fall. State is JSON, for checkpoints.
    """

    def __init__(self) -> None:
        self._recent: dict[str, list[float]] = {}
        self._best: dict[str, float] = {}
        self._low: dict[str, bool] = {}

    def update(self, rewards: Mapping[str, float]) -> list[str]:
        """Take the mean reward of each task of one step; gives a sentence for each task that has collapsed."""
        warnings = []
        for task, reward in rewards.items():
            recent = [*self._recent.get(task, []), reward][-WINDOW_STEPS:]
            self._recent[task] = recent
            if len(recent) < WINDOW_STEPS:
                continue
            now, best = float(np.mean(recent)), max(self._best.get(task, -math.inf), float(np.mean(recent)))
            self._best[task] = best
            limit = max(FALL_REWARD, FALL_SHARE * abs(best))
            if best - now > limit and not self._low.get(task):
                self._low[task] = True
                fall = f"{now:.2f} over the last {WINDOW_STEPS} steps, it was {best:.2f}"
                warnings.append(f"the reward of {task} has collapsed: {fall}")
            elif best - now < limit / 2:
                self._low[task] = False
        return warnings

    def state_dict(self) -> dict[str, Any]:
        """The windows and what has been warned of."""
        return {"recent": dict(self._recent), "best": dict(self._best), "low": dict(self._low)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._recent = {task: list(map(float, values)) for task, values in state["recent"].items()}
        self._best, self._low = dict(state["best"]), dict(state["low"])


def _split(outcomes: Sequence[Outcome], by: str) -> dict[str, list[Outcome]]:
    parts: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        parts[getattr(outcome, by)].append(outcome)
    return dict(sorted(parts.items()))


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _plain(outcome: Outcome) -> dict[str, Any]:
    """As JSON: what is not known is null."""
    values = asdict(outcome)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
