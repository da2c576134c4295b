"""Parity of HARPO's advantages with the released ones over sequences of steps, and where the default differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hba.rl.advantages import Harpo, build_advantage, grpo

DATA = Path(__file__).with_name("data") / "harpo"
DOUBLE = ["harpo_mixed", "harpo_nondegenerate"]
SINGLE = [  # the reference computed these in float32
    "h01_3tasks_8steps",
    "h02_4tasks_degenerate",
    "h03_all_degenerate",
    "h04_single_task_interleaved",
]


def steps(name):
    golden = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    if "steps" in golden:
        return [(s["rewards"], s["groups"], s["tasks"], s["advantages"]) for s in golden["steps"]]
    pairs = zip(golden["inputs"]["steps"], golden["expected"]["steps"], strict=True)
    return [(s["rewards"], s["uids"], s["tasks"], expected["advantages"]) for s, expected in pairs]


def informative(rewards, groups):
    values = {g: {r for r, h in zip(rewards, groups, strict=True) if h == g} for g in set(groups)}
    return np.array([len(values[g]) > 1 for g in groups])


@pytest.mark.parametrize("name", [*DOUBLE, *SINGLE])
def test_published_harpo_over_steps(name):
    harpo = Harpo(published=True)
    for rewards, groups, tasks, expected in steps(name):
        np.testing.assert_allclose(harpo(rewards, groups, tasks), expected, atol=1e-6 if name in DOUBLE else 2e-6)


def test_the_default_equals_it_where_no_group_is_without_signal():
    harpo = Harpo()
    for rewards, groups, tasks, expected in steps("harpo_nondegenerate"):
        np.testing.assert_allclose(harpo(rewards, groups, tasks), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["harpo_mixed", "h02_4tasks_degenerate", "h04_single_task_interleaved"])
def test_a_group_without_signal_changes_no_other_group_of_its_task(name):
    """The release lets it pull the others' factors to the clamp: it halves their weight.

    Here each group's share of its task is what it would be without it; of the task as a whole it lowers the signal.
    """
    changed = False
    for rewards, groups, tasks, _ in steps(name):
        kept = informative(rewards, groups)
        found, released = Harpo()(rewards, groups, tasks), Harpo(published=True)(rewards, groups, tasks)
        alone = Harpo()(*(np.array(values, object)[kept] for values in (rewards, groups, tasks))).astype(float)
        assert not found[~kept].any()
        for task in set(np.array(tasks)[kept]):
            mine = np.array(tasks)[kept] == task
            shares, wanted = found[kept][mine], alone[mine]
            scale = np.abs(shares).sum() / np.abs(wanted).sum()
            assert 0.9 < scale < 1.2, "one step moves a task by a twentieth of what its signal says"
            np.testing.assert_allclose(shares, scale * wanted, atol=1e-12)
            changed |= not np.allclose(
                released[kept][mine] / np.abs(released[kept][mine]).max(), shares / np.abs(shares).max()
            )
        if len(set(tasks)) == 1:
            np.testing.assert_allclose(found[kept], alone, atol=1e-12)
    assert changed


def test_a_group_without_signal_halves_the_others_only_as_published():
    rewards, groups = [1.0, 0.0, 1.0, 0.0, 0.2, 0.2], ["a", "a", "b", "b", "c", "c"]
    plain = [1.0, -1.0, 1.0, -1.0, 0.0, 0.0]
    np.testing.assert_allclose(Harpo()(rewards, groups, ["x"] * 6), plain)
    np.testing.assert_allclose(Harpo(published=True)(rewards, groups, ["x"] * 6), np.array(plain) / 2)


def test_groups_of_one_keep_their_reward_only_as_published():
    """Of HARPO scaled to 0..1 over the batch, where it counts as a signal like any other."""
    rewards, groups = [0.3, 1.5, -0.5, 0.9, 0.9], ["a", "b", "c", "d", "d"]
    np.testing.assert_allclose(grpo(rewards, groups, published=True), [0.3, 1.5, -0.5, 0.0, 0.0])
    np.testing.assert_allclose(build_advantage("grpo", published=True)(rewards, groups, groups), [0.3, 1.5, -0.5, 0, 0])
    assert not grpo(rewards, groups).any() and not Harpo()(rewards, groups, ["x"] * 5).any()
    scaled = np.array([0.4, 1.0, 0.0])
    released = Harpo(published=True)([0.3, 1.5, -0.5], ["a", "b", "c"], ["x", "y", "z"])
    logs = np.log(np.maximum(scaled, 1e-6))
    np.testing.assert_allclose(released, scaled * np.exp(0.05 * (logs.mean() - logs)))
    together = Harpo(published=True)([0.3, 1.5, -0.5], ["a", "b", "c"], ["x"] * 3)
    np.testing.assert_allclose(together, scaled * np.clip(np.exp(logs.mean() - logs), 0.5, 3.0))


def test_a_task_without_any_signal_moves_no_average():
    harpo = Harpo()
    harpo([1.0, 0.0, 1.0, 0.0], ["a", "a", "b", "b"], ["x", "x", "y", "y"])
    before = harpo.state_dict()
    harpo([1.0, 0.0, 0.2, 0.2], ["a", "a", "b", "b"], ["x", "x", "y", "y"])
    assert harpo.state_dict()["signal"]["y"] == before["signal"]["y"] and harpo.factors["x"].task_factor == 1


def test_a_rarely_solved_task_is_amplified_through_its_silent_groups():
    harpo = Harpo()
    rewards = [1.0, 0.0] * 4 + [1.0, 0.0] + [0.0] * 6  # both tasks: pairs; of y three in four are never solved
    groups, tasks = [i // 2 for i in range(16)], ["x"] * 8 + ["y"] * 8
    for _ in range(100):
        found = harpo(rewards, groups, tasks)
    assert abs(found[8]) > 1.5 * abs(found[0]) and harpo.factors["y"].task_factor > 1.5
