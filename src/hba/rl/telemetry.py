"""What an RL step looked like, by task and dataset: for the log, the report and the table of rollouts.

One `Outcome` a rollout is all that is needed; everything here is a mean over some of them. The watch warns when a
task's reward collapses, an average over its last steps that has fallen far below its best one, and when its answers do:
nearly all of them are one, which the targets are not. A reward can rise on that.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hba.rl.advantages import Advantage, Harpo, grouped
from hba.rl.evaluation_log import collapsed
from hba.rl.rollout import Key, Place
from hba.run import RunFolder
from hba.storage import AppendLog
from hba.train.display import TrainingDisplay
from hba.train.state import Progress

if TYPE_CHECKING:
    from hba.rl.config import RlConfig

WINDOW_STEPS = 10
FALL_SHARE = 0.3  # of the best average, and at least:
FALL_REWARD = 0.15
FREQUENT = 5  # answers of a step that the watch counts: one that nearly all say is among them


class Updated(NamedTuple):
    """Of a step: its policy loss and the gradient norm before clipping, both means over its updates."""

    loss: float
    grad_norm: float


@dataclass(kw_only=True)
class Outcome:
    """One rollout, from response to update. The last six are known when its step is done.

    `answer` is what the evaluation would read in the response: a canonical label, or the text of its answer.
    """

    id: str
    task: str
    dataset: str
    group: str
    prompt: str
    target: str
    response: str
    answer: str
    tokens: int
    parts: dict[str, float]
    advantage: float = 0.0
    entropy: float = math.nan  # mean over the response's tokens, nats
    kl: float = math.nan  # k3 against the reference, mean over the tokens; nan without a reference
    sampler_gap: float = math.nan  # mean |log-probability of the sampler - of the policy|, nats
    importance: float = math.nan  # mean truncated importance weight; nan where there is none
    clipped: float = math.nan  # share of the tokens whose gradient the clip took away
    key: Key = (Place(0, 0), 0)
    piece: int = 0  # of the step's prompts


def step_record(outcomes: Sequence[Outcome], advantage: Advantage, num_prompts: int) -> dict[str, Any]:
    """Means over all rollouts of a step, and over those of each task and dataset. NaN is left out.

    `num_prompts` were sampled; those of which there are no outcomes were dropped for want of signal (dapo).
    """
    by_task, by_dataset = _split(outcomes, "task"), _split(outcomes, "dataset")
    record: dict[str, Any] = {
        **means(outcomes),
        "dropped_groups": float(num_prompts - len({outcome.group for outcome in outcomes})),
        "tasks": {name: means(own) | {"top_answer": _top_share(own)} for name, own in by_task.items()},
        "datasets": {name: means(own) | {"top_answer": _top_share(own)} for name, own in by_dataset.items()},
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


def is_due(step: int, total: int, config: RlConfig) -> bool:
    """Whether a step has a line in log.jsonl: every `train.log_every`-th, and those that are evaluated."""
    return any(step % period == 0 for period in (config.train.log_every, config.train.validate_every, total))


class RunLog:
    """Writes what a run says of itself: log.jsonl and the boards, rollouts.jsonl, the line in the terminal."""

    def __init__(self, run: RunFolder, display: TrainingDisplay, config: RlConfig, total: int) -> None:
        self._run, self._display, self._config, self._total = run, display, config, total

    def step(
        self,
        progress: Progress,
        outcomes: Sequence[Outcome],
        advantage: Advantage,
        watch: CollapseWatch,
        updated: Updated,
        rate: float,
        num_prompts: int,
        seconds: Mapping[str, float],
    ) -> None:
        """One step: its warnings, every `train.log_every` steps its means, every `table_every` some of its rollouts."""
        step, means_of = progress.step, step_record(outcomes, advantage, num_prompts)
        update = {"loss": updated.loss, "grad_norm": updated.grad_norm}
        rates = {"learning_rate": self._config.train.learning_rate * rate}
        times = {name: round(value, 3) for name, value in seconds.items()}
        record = {"step": step, "kind": "rl", "samples_seen": progress.samples_seen, **update, **rates, **means_of}
        if is_due(step, self._total, self._config):
            self._display.record(record | times, board_figures(record))
        self._warn(step, watch.update(outcomes))
        self._display.advance(step, f"reward {means_of['score']:.3f}  {means_of['tokens']:.0f} tokens")
        if self._run.is_main and (step == 1 or step % self._config.table_every == 0):
            with AppendLog(self._run.rollouts) as log:
                for line in table(step, outcomes, self._config.table_prompts):
                    log.append(line)

    def skipped(self, progress: Progress, why: str) -> None:
        """A step without an update."""
        self._display.record({"step": progress.step, "kind": "skipped", "why": why}, {})
        self._display.advance(progress.step, f"skipped: {why}")

    def evaluation(self, progress: Progress, figures: Mapping[str, float], warnings: Sequence[str]) -> None:
        """Means of an evaluation, and what its answers have against them."""
        record = {"step": progress.step, "kind": "evaluation", "figures": dict(figures)}
        self._display.record(record, {f"evaluation/{name}": value for name, value in figures.items()})
        self._display.say(f"step {progress.step}: {in_words(figures)}")
        self._warn(progress.step, warnings)

    def _warn(self, step: int, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            self._display.record({"step": step, "kind": "warning", "message": sentence}, {})
            self._display.say(f"warning: step {step}: {sentence}")


def in_words(figures: Mapping[str, float]) -> str:
    """An evaluation in one line."""
    beside = f" (chance {figures['chance']:.3f})" if "chance" in figures else ""
    return f"held-out reward {figures['greedy_reward']:.3f}, right {figures['greedy_right']:.3f}{beside}, greedy"


class CollapseWatch:
    """Notes when the mean reward of a task over the last steps falls far below the best such mean so far, and when
    nearly all of its answers in these steps are one answer, which the targets are not.

    A task is warned of once, until it has recovered: half of its fall, or other answers again. State is JSON, for
    checkpoints.
    """

    def __init__(self) -> None:
        self._recent: dict[str, list[float]] = {}
        self._best: dict[str, float] = {}
        self._low: dict[str, bool] = {}
        self._answers: dict[str, list[list[Any]]] = {}  # of each of the last steps: answers, targets, how many
        self._same: dict[str, bool] = {}

    def update(self, outcomes: Sequence[Outcome]) -> list[str]:
        """Take the rollouts of one step; gives a sentence for each task that has collapsed."""
        by_task = _split(outcomes, "task")
        rewards = {task: _mean(o.parts["score"] for o in own) for task, own in by_task.items()}
        answers = {task: [(o.answer, o.target) for o in own] for task, own in by_task.items()}
        return [*self._of_rewards(rewards), *self._of_answers(answers)]

    def _of_answers(self, pairs: Mapping[str, Sequence[tuple[str, str]]]) -> list[str]:
        warnings = []
        for task, own in pairs.items():
            frequent = [dict(Counter(kind).most_common(FREQUENT)) for kind in zip(*own, strict=True)]
            recent = [*self._answers.get(task, []), [*frequent, len(own)]][-WINDOW_STEPS:]
            self._answers[task] = recent
            if len(recent) < WINDOW_STEPS:
                continue
            answers, targets = (sum((Counter(step[kind]) for step in recent), Counter()) for kind in (0, 1))
            said = collapsed(answers, targets, sum(step[2] for step in recent))
            if said is not None and not self._same.get(task):
                warnings.append(f"the answers to {task} have collapsed: over the last {WINDOW_STEPS} steps {said}")
            self._same[task] = said is not None
        return warnings

    def _of_rewards(self, rewards: Mapping[str, float]) -> list[str]:
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
        rewards = {"recent": dict(self._recent), "best": dict(self._best), "low": dict(self._low)}
        return {**rewards, "answers": dict(self._answers), "same": dict(self._same)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; one of before answers were watched has none of them."""
        self._recent = {task: list(map(float, values)) for task, values in state["recent"].items()}
        self._best, self._low = dict(state["best"]), dict(state["low"])
        self._answers, self._same = dict(state.get("answers", {})), dict(state.get("same", {}))


def _split(outcomes: Sequence[Outcome], by: str) -> dict[str, list[Outcome]]:
    parts: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        parts[getattr(outcome, by)].append(outcome)
    return dict(sorted(parts.items()))


def _top_share(outcomes: Sequence[Outcome]) -> float:
    """Share of the most frequent answer."""
    return max(Counter(outcome.answer for outcome in outcomes).values()) / len(outcomes)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _plain(outcome: Outcome) -> dict[str, Any]:
    """As JSON: what is not known is null."""
    values = asdict(outcome)
    del values["key"], values["piece"]  # the group names the prompt
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
