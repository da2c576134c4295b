"""What an RL step is said to have been, and when its reward is said to have collapsed."""

import json

import pytest

from hba.rl.advantages import Harpo
from hba.rl.evaluation_log import collapsed_tasks, summary
from hba.rl.telemetry import CollapseWatch, Outcome, step_record, table


def outcome(group, score, task="emotion_cls", dataset="cremad", **more):
    parts = {"score": score, "format_score": float(score > 0.5)}
    fixed = {"id": f"train/{group}", "prompt": "p", "target": "t", "response": "r", "answer": "t", "tokens": 4}
    return Outcome(task=task, dataset=dataset, group=group, parts=parts, **(fixed | more))


def test_means_by_task_and_dataset_with_silent_groups_and_factors():
    outcomes = [
        outcome("a", 1.0, entropy=1.0, advantage=1.0), outcome("a", 0.0, entropy=3.0, advantage=-1.0),
        outcome("b", 0.2, dataset="tess", tokens=8), outcome("b", 0.2, dataset="tess", tokens=8),
        outcome("c", 0.4, task="siq_qa", dataset="siq2"), outcome("c", 0.6, task="siq_qa", dataset="siq2"),
    ]  # fmt: skip
    harpo = Harpo()
    harpo([o.parts["score"] for o in outcomes], [o.group for o in outcomes], [o.task for o in outcomes])
    record = step_record(outcomes, harpo, 5)
    assert record["dropped_groups"] == 2 and record["tasks"]["siq_qa"]["top_answer"] == 1
    assert record["score"] == pytest.approx(2.4 / 6) and record["silent_groups"] == pytest.approx(1 / 3)
    emotion = record["tasks"]["emotion_cls"]
    assert emotion["silent_groups"] == 0.5 and emotion["entropy"] == 2.0 and emotion["tokens"] == 6
    assert emotion["abs_advantage"] == 0.5 and emotion["format_score"] == 0.25 and "kl" not in emotion
    assert {"signal", "task_factor", "sample_factor"} <= emotion.keys()
    assert record["datasets"]["tess"]["silent_groups"] == 1 and "task_factor" not in record["datasets"]["tess"]
    json.dumps(record, allow_nan=False)


def test_the_table_shows_whole_groups_of_different_tasks_first():
    outcomes = [outcome(g, 0.1, task=t) for g, t in (("a", "x"), ("b", "x"), ("c", "y")) for _ in range(2)]
    lines = table(7, outcomes, groups=2)
    assert [line["group"] for line in lines] == ["a", "a", "c", "c"] and lines[0]["step"] == 7
    assert lines[0]["kl"] is None
    json.dumps(lines, allow_nan=False)


def test_a_collapse_is_warned_of_once_and_again_after_recovery_also_when_resumed():
    watch, said = CollapseWatch(), []
    for step in range(80):
        reward = 0.8 if step < 20 or 45 <= step < 60 else 0.2
        rollouts = [outcome(step, reward, task="x"), outcome(step, 0.5, task="steady")]
        said += [(step, sentence) for sentence in watch.update(rollouts)]
        resumed = CollapseWatch()
        resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
        watch = resumed
    before = {name: kept for name, kept in watch.state_dict().items() if name in ("recent", "best", "low")}
    resumed.load_state_dict(before)  # of a run that an earlier version began
    assert resumed.state_dict() == {**before, "answers": {}, "same": {}}
    assert len(said) == 2 and all("the reward of x has collapsed" in sentence for _, sentence in said)
    assert 20 < said[0][0] < 30 and 60 < said[1][0] < 70


def test_answers_that_are_all_one_are_warned_of_though_the_reward_rises_also_when_resumed():
    """Not where the targets are that one, too, and again after the policy has answered otherwise."""
    watch, said = CollapseWatch(), []
    for step in range(60):
        own = [
            outcome(step, step / 60, task="x", target="ab"[i % 2], answer="b" if 30 <= step < 35 else "a")
            for i in range(4)
        ]
        rare = [outcome(step, 1.0, task="rare", target="no", answer="no") for _ in range(4)]
        said += [(step, sentence) for sentence in watch.update([*own, *rare])]
        resumed = CollapseWatch()
        resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
        watch = resumed
    assert [step for step, _ in said] == [9, 44]
    what = "over the last 10 steps 100% of 40 answers are 'a', which 50% of the targets are"
    assert said[0][1] == f"the answers to x have collapsed: {what}"


def test_an_evaluation_stands_beside_chance_and_says_which_answers_have_collapsed():
    def record(i, dataset, target, answer):
        parts = {"score": 0.5, "right": float(answer == target), "format": 1.0, "tokens": 3}
        fixed = {"id": f"{dataset}/{i}", "number": i, "task": f"{dataset}_cls", "dataset": dataset}
        return {**fixed, "target": target, "answer": answer, "sampled": parts, "greedy": parts}

    same = [record(i, "mmsd", "yes" if i < 12 else "no", "yes") for i in range(20)]
    other = [record(i, "urfunny", "yes" if i < 5 else "no", "yes" if i < 7 else "no") for i in range(10)]
    figures = summary([*same, *other])
    of_tasks = [figures[f"{name}/{task}_cls"] for task in ("mmsd", "urfunny") for name in ("greedy_right", "chance")]
    assert of_tasks == pytest.approx([0.6, 0.6, 0.8, 0.5])
    assert figures["chance"] == pytest.approx((20 * 0.6 + 10 * 0.5) / 30)
    (sentence,) = collapsed_tasks([*same, *other])
    assert "mmsd_cls have collapsed: 100% of 20 answers are 'yes', which 60% of the targets are" in sentence
    assert collapsed_tasks(same[:9]) == [] and collapsed_tasks(same[:12]) == [], "too few, and as the targets are"
