"""Parity of HARPO's advantages with the released ones over sequences of steps, and where the default differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hba.rl.advantages import Harpo

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


@pytest.mark.parametrize("name", ["harpo_mixed", "h02_4tasks_degenerate", "h03_all_degenerate"])
def test_a_group_without_signal_changes_no_other_group(name):
    """The release lets it pull the others' factors to the clamp: it halves their weight."""
    default, without, released = Harpo(), Harpo(published=True), Harpo(published=True)
    changed = False
    for rewards, groups, tasks, _ in steps(name):
        kept = informative(rewards, groups)
        found = default(rewards, groups, tasks)
        wanted = without(*(np.array(values, object)[kept] for values in (rewards, groups, tasks)))
        np.testing.assert_allclose(found[kept], wanted.astype(float), atol=1e-12)
        assert not found[~kept].any()
        changed |= not np.allclose(released(rewards, groups, tasks)[kept], found[kept], atol=1e-3)
    assert changed
