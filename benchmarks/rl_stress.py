"""A heterogeneous stress of the advantage estimators: four tasks share one small policy; the rewards of one are scaled
by 20, another is rarely solved at the start. Which estimator leaves which task behind?

The policy is a softmax over 32 answers from a two-layer network that all tasks share; a prompt is a random vector, its
right answer that of a fixed teacher. Pretraining solves three tasks about half the time and the fourth rarely. Then 32
prompts x 5 responses a step, AdamW, gradients clipped to norm 1, as `hba train rl` does. A task's score is the
probability of the right answer over held-out prompts. A simulation of the estimators, not of a language model.

Run: OMP_NUM_THREADS=1 python benchmarks/rl_stress.py [--seeds 5] [--steps 200] [--svg docs/rl_stress.svg]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hba.rl.advantages import Advantage, Harpo, build_advantage
from hba.rl.losses import surrogate

TASKS = ("plain", "scaled by 20", "noisy", "rarely solved")
SCALES = (1.0, 20.0, 1.0, 1.0)
SOLVED_AT_START = (0.5, 0.5, 0.5, 0.06)
ANSWERS, FEATURES, PROMPTS, ROLLOUTS = 32, 12, 32, 5
NOISE = 0.2  # the share of the noisy task's rewards that are drawn at random
ALGORITHMS = ("grpo", "harpo", "harpo, published", "dr_grpo", "rloo", "reinforce_pp", "gpg", "ema_grpo")


class Policy(nn.Module):
    """Answers from prompts; the first layer is shared by all tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.out = nn.Linear(FEATURES + len(TASKS), 48), nn.Linear(48, ANSWERS)

    def forward(self, prompts_NF: Tensor, tasks_N: Tensor) -> Tensor:
        """Log-probabilities [N, ANSWERS]."""
        inputs = torch.cat([prompts_NF, F.one_hot(tasks_N, len(TASKS)).float()], 1)
        logps: Tensor = torch.log_softmax(self.out(torch.tanh(self.shared(inputs))), 1)
        return logps


class World:
    """Prompts and their right answers."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.teacher_TFA = torch.randn(len(TASKS), FEATURES, ANSWERS, generator=self.rng)

    def draw(self, tasks_N: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts of the given tasks and their right answers."""
        prompts_NF = torch.randn(len(tasks_N), FEATURES, generator=self.rng)
        return prompts_NF, torch.einsum("nf,nfa->na", prompts_NF, self.teacher_TFA[tasks_N]).argmax(1)

    def solved(self, policy: Policy, count: int = 512) -> list[float]:
        """Probability of the right answer, by task, over fresh prompts."""
        scores = []
        for task in range(len(TASKS)):
            tasks_N = torch.full((count,), task)
            prompts_NF, right_N = self.draw(tasks_N)
            with torch.no_grad():
                scores.append(float(policy(prompts_NF, tasks_N).exp().gather(1, right_N[:, None]).mean()))
        return scores


def pretrain(world: World, seed: int) -> Policy:
    """Supervised until each task is solved as often as it should be at the start."""
    torch.manual_seed(seed)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), 5e-3)
    for step in range(4000):
        if step % 20 == 0:
            short = [s < wanted for s, wanted in zip(world.solved(policy), SOLVED_AT_START, strict=True)]
            if not any(short):
                break
            open_tasks = torch.tensor([i for i, each in enumerate(short) if each])
        tasks_N = open_tasks[torch.randint(len(open_tasks), (64,), generator=world.rng)]
        prompts_NF, right_N = world.draw(tasks_N)
        loss = F.nll_loss(policy(prompts_NF, tasks_N), right_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def rewards_of(world: World, answers_N: Tensor, right_N: Tensor, tasks_N: Tensor) -> Tensor:
    """1 for a right answer, times the task's scale; the noisy task's are sometimes drawn."""
    rewards_N = (answers_N == right_N).float()
    drawn_N = torch.rand(len(rewards_N), generator=world.rng) < NOISE
    coin_N = (torch.rand(len(rewards_N), generator=world.rng) < 0.5).float()
    rewards_N = torch.where((tasks_N == TASKS.index("noisy")) & drawn_N, coin_N, rewards_N)
    return rewards_N * torch.tensor(SCALES)[tasks_N]


def train(world: World, policy: Policy, advantage: Advantage, steps: int) -> list[float]:
    """RL of the policy; the scores of the tasks at the end."""
    optimizer = torch.optim.AdamW(policy.parameters(), 2e-3, weight_decay=0.0)
    for _ in range(steps):
        tasks_N = torch.arange(PROMPTS) % len(TASKS)
        prompts_NF, right_N = world.draw(tasks_N)
        tasks_N, right_N, prompts_NF = (each.repeat_interleave(ROLLOUTS, 0) for each in (tasks_N, right_N, prompts_NF))
        logps_NA = policy(prompts_NF, tasks_N)
        answers_N = torch.multinomial(logps_NA.detach().exp(), 1, generator=world.rng)[:, 0]
        rewards_N = rewards_of(world, answers_N, right_N, tasks_N)
        groups = np.arange(PROMPTS).repeat(ROLLOUTS)
        advantages = advantage(rewards_N.numpy(), groups, [TASKS[int(task)] for task in tasks_N])
        logps_N1 = logps_NA.gather(1, answers_N[:, None])
        weights_N = torch.from_numpy(advantages).float()
        loss = surrogate(logps_N1, logps_N1.detach(), weights_N, torch.ones_like(logps_N1)).loss_NL.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return world.solved(policy, 2048)


def run(seeds: int, steps: int) -> dict[str, np.ndarray]:
    """Scores [seed, task] of each algorithm, and of the start."""
    scores: dict[str, list[list[float]]] = {name: [] for name in ("start", *ALGORITHMS)}
    for seed in range(seeds):
        start = pretrain(World(seed), seed)
        state = {name: tensor.clone() for name, tensor in start.state_dict().items()}
        scores["start"].append(World(seed).solved(start, 2048))
        for name in ALGORITHMS:
            start.load_state_dict(state)
            world = World(seed)
            world.rng.manual_seed(1000 + seed)
            advantage = Harpo(published=True) if "published" in name else build_advantage(name)
            scores[name].append(train(world, start, advantage, steps))
    return {name: np.array(values) for name, values in scores.items()}


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and bootstrap interval over the seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (10_000, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def svg(scores: dict[str, np.ndarray]) -> str:
    """Worst task of each algorithm with its interval; dots are the seeds."""
    left, width, row = 150, 420, 26
    ticks = np.arange(0, 0.05 * np.ceil(max(v.min(1).max() for v in scores.values()) / 0.05) + 0.01, 0.05)
    scale = width / ticks[-1]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{row * len(scores) + 60}"'
        ' font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18">Score of the worst task (mean, 95 % over seeds; dots: seeds)</text>',
    ]
    for tick in ticks:
        x, bottom = left + scale * tick, row * len(scores) + 34
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="28" y2="{bottom}" stroke="#ddd"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for number, (name, values) in enumerate(scores.items()):
        y = 46 + row * number
        mean, low, high = interval(values.min(1))
        lines.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{name}</text>')
        lines += [
            f'<circle cx="{left + scale * v:.1f}" cy="{y}" r="2.5" fill="#9bb7d4"/>' for v in values.min(1).tolist()
        ]
        ends = f'x1="{left + scale * low:.1f}" x2="{left + scale * high:.1f}"'
        lines.append(f'<line {ends} y1="{y}" y2="{y}" stroke="#1f5f9e" stroke-width="2"/>')
        lines.append(f'<circle cx="{left + scale * mean:.1f}" cy="{y}" r="4.5" fill="#1f5f9e"/>')
        lines.append(f'<text x="{left + width + 12}" y="{y + 4}">{mean:.3f}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Print a table, write the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    scores = run(options.seeds, options.steps)
    print(f"{'':18}{''.join(f'{task:>15}' for task in TASKS)}{'worst':>10}  95 % over {options.seeds} seeds")
    for name, values in scores.items():
        mean, low, high = interval(values.min(1))
        print(f"{name:18}{''.join(f'{v:15.3f}' for v in values.mean(0))}{mean:10.3f}  {low:.3f} to {high:.3f}")
    for name in ("harpo", "harpo, published"):
        mean, low, high = interval(scores[name].min(1) - scores["grpo"].min(1))
        print(f"{name} minus grpo, worst task, paired by seed: {mean:+.3f} ({low:+.3f} to {high:+.3f})")
    if options.svg is not None:
        options.svg.write_text(svg(scores), encoding="utf-8")


if __name__ == "__main__":
    main()
