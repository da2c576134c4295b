"""Each estimator against its formula written out, and the properties that all of them share."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hba.errors import InputError
from hba.rl.advantages import (
    EmaGrpo,
    Harpo,
    build_advantage,
    dr_grpo,
    gpg,
    grpo,
    informative,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
)
from hba.rl.config import ALGORITHMS, LossConfig

REWARDS = [1.0, 0.0, 0.2, 0.2, 1.0, 0.5, 0.5, 0.5, 0.9]
GROUPS = ["a", "b", "a", "b", "a", "c", "c", "c", "d"]  # c has no signal, d a single rollout
TASKS = ["x", "y", "x", "y", "x", "x", "x", "x", "y"]
NAMES = ["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gpg", "harpo", "ema_grpo"]


def by_group(formula):
    """`formula(own reward, rewards of the group)` of each rollout, in plain Python."""
    members = {g: [r for r, h in zip(REWARDS, GROUPS, strict=True) if h == g] for g in GROUPS}
    return [formula(r, members[g]) for r, g in zip(REWARDS, GROUPS, strict=True)]


def mean(values):
    return sum(values) / len(values)


def std(values):
    return mean([(v - mean(values)) ** 2 for v in values]) ** 0.5


def test_the_formulas_without_memory():
    centred = by_group(lambda r, group: r - mean(group))
    np.testing.assert_allclose(
        grpo(REWARDS, GROUPS), by_group(lambda r, g: (r - mean(g)) / max(std(g), 1e-6)), atol=1e-9
    )
    np.testing.assert_allclose(dr_grpo(REWARDS, GROUPS), centred, atol=1e-12)
    others = by_group(lambda r, g: r - (sum(g) - r) / (len(g) - 1) if len(g) > 1 else 0.0)
    np.testing.assert_allclose(rloo(REWARDS, GROUPS), others, atol=1e-12)
    whole = [(r - mean(REWARDS)) / std(REWARDS) for r in REWARDS]
    np.testing.assert_allclose(reinforce_pp(REWARDS, GROUPS), whole, atol=1e-12)
    np.testing.assert_allclose(reinforce_pp_baseline(REWARDS, GROUPS), [c / std(centred) for c in centred], atol=1e-12)
    np.testing.assert_allclose(gpg(REWARDS, GROUPS), [c * 4 / 2 for c in centred], atol=1e-12)
    assert informative(REWARDS, GROUPS).tolist() == [True] * 5 + [False] * 4


def test_ema_grpo_divides_by_the_moving_spread_of_the_task():
    estimator = EmaGrpo(beta=0.9)
    first = estimator([1.0, 0.0, 2.0, 2.0], ["a", "a", "b", "b"], ["x", "x", "y", "y"])
    np.testing.assert_allclose(first, [1.0, -1.0, 0.0, 0.0], atol=1e-9)
    second = estimator([3.0, 1.0], ["c", "c"], ["x", "x"])
    moments = 0.9 * 0.5 + 0.1 * 2.0, 0.9 * 0.5 + 0.1 * 5.0
    np.testing.assert_allclose(second, np.array([1.0, -1.0]) / (moments[1] - moments[0] ** 2) ** 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_json_and_a_resumed_estimator_goes_on_the_same(name):
    rng = np.random.default_rng(0)
    steps = [rng.choice([0.0, 0.2, 1.0], 40) for _ in range(6)]
    groups, tasks = [i // 5 for i in range(40)], ["xyz"[i // 5 % 3] for i in range(40)]
    whole = build_advantage(name)
    expected = [whole(rewards, groups, tasks) for rewards in steps]
    first, second = build_advantage(name), build_advantage(name)
    for rewards in steps[:3]:
        first(rewards, groups, tasks)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for rewards, wanted in zip(steps[3:], expected[3:], strict=True):
        np.testing.assert_array_equal(second(rewards, groups, tasks), wanted)


def test_two_objects_share_nothing():
    one, other = Harpo(), Harpo()
    one([1.0, 0.0], ["a", "a"], ["x", "x"])
    assert other.state_dict() == {"signal": {}, "log_factor": {}}


batches = st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.7, 1.0, 20.0]), st.integers(0, 5)), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(batches, st.sampled_from(NAMES), st.randoms())
def test_order_does_not_matter_and_groups_balance(batch, name, random):
    rewards, groups = [r for r, _ in batch], [g for _, g in batch]
    tasks = ["xy"[g % 2] for g in groups]
    found = build_advantage(name)(rewards, groups, tasks)
    assert found.shape == (len(batch),) and np.isfinite(found).all()
    order = list(range(len(batch)))
    random.shuffle(order)
    shuffled = build_advantage(name)(*([values[i] for i in order] for values in (rewards, groups, tasks)))
    np.testing.assert_allclose(shuffled, found[order], atol=1e-9)
    if name != "reinforce_pp":
        for group in set(groups):
            mine = found[[g == group for g in groups]]
            assert abs(mine.sum()) < 1e-6 * max(1, np.abs(mine).max())


@settings(max_examples=50, deadline=None)
@given(batches, st.floats(0.1, 50))
def test_grpo_and_harpo_do_not_feel_the_scale_of_a_task(batch, scale):
    rewards, groups = np.array([r for r, _ in batch]), [g for _, g in batch]
    tasks = ["xy"[g % 2] for g in groups]
    scaled = np.where([task == "x" for task in tasks], scale, 1.0) * rewards
    for name in ("grpo", "harpo"):
        one, other = build_advantage(name), build_advantage(name)
        np.testing.assert_allclose(one(scaled, groups, tasks), other(rewards, groups, tasks), rtol=1e-6, atol=1e-8)


def test_harpo_amplifies_the_task_and_the_prompt_with_the_weaker_signal():
    harpo = Harpo()
    rewards = [1.0, 0.0, 1.0, 0.0, 1.0] * 2 + [1.0, 0.0, 0.0, 0.0, 0.0] * 2  # y is rarely solved
    groups, tasks = [i // 5 for i in range(20)], ["x"] * 10 + ["y"] * 10
    for _ in range(80):
        harpo(rewards, groups, tasks)
    assert harpo.factors["y"].task_factor > 1 > harpo.factors["x"].task_factor
    mixed = Harpo()(rewards, groups, ["x"] * 20)
    plain = grpo(rewards, groups)
    assert (np.abs(mixed[10:]) > np.abs(plain[10:])).all() and (np.abs(mixed[:10]) < np.abs(plain[:10])).all()


def test_factors_are_clamped():
    harpo = Harpo()
    harpo.load_state_dict({"signal": {"x": 0.8, "y": 0.8}, "log_factor": {"x": -9.0, "y": 9.0}})
    harpo([1.0, 0.0, 1.0, 0.0], ["a", "a", "b", "b"], ["x", "x", "y", "y"])
    assert harpo.factors["x"].task_factor == 0.5 and harpo.factors["y"].task_factor == 4.0


def test_bad_batches_are_named_errors():
    with pytest.raises(InputError, match="reward 1 is nan"):
        grpo([0.0, float("nan")], ["a", "a"])
    with pytest.raises(InputError, match="2 rewards, but 1 groups"):
        rloo([0.0, 1.0], ["a"])
    with pytest.raises(InputError, match="2 rewards, but 1 tasks"):
        Harpo()([0.0, 1.0], ["a", "a"], ["x"])
    with pytest.raises(InputError, match="Did you mean 'harpo'"):
        build_advantage("harppo")
    assert grpo([], []).shape == (0,) and Harpo()([], [], []).shape == (0,)


def test_advantages_of_ones_own(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(
        "def centred(rewards, groups, tasks):\n    return rewards - rewards[tasks == 'a'].mean()\n"
        "def short(rewards, groups, tasks):\n    return rewards[1:]\n"
        "def broken(rewards, groups, tasks):\n    return rewards / 0.0\n"
    )
    chosen = LossConfig(advantage=f"{source}:centred").resolved(ALGORITHMS["gspo"])
    assert (chosen.ratio, chosen.clip_low) == ("sequence", 3e-4)  # the rest of the algorithm stays
    own = build_advantage(chosen.advantage)
    np.testing.assert_array_equal(own([1.0, 3.0, 6.0], ["p", "p", "q"], ["a", "a", "b"]), [-1.0, 1.0, 4.0])
    assert own.state_dict() == {}
    for name, message in {"short": r"shape \(2,\)", "broken": "3 not finite"}.items():
        with pytest.raises(InputError, match=f"{name}: expected 3 finite advantages, found .*{message}"):
            build_advantage(f"{source}:{name}")(np.ones(3), ["p"] * 3, ["a"] * 3)
    with pytest.raises(InputError, match=r"loss.advantage: .* has no function 'nope'"):
        build_advantage(f"{source}:nope")
