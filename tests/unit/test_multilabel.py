"""Rows with several labels: reading them from text, their metrics against scikit-learn, and the six zero-shot sets."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, hamming_loss

from hba.atlas import open_atlas
from hba.errors import InputError, TaxonomyError
from hba.evaluate import score as scoring
from hba.evaluate.answers import to_label
from hba.evaluate.compare import paired_difference
from hba.evaluate.metrics import encode, score
from hba.evaluate.predictions import Prediction, PredictionLog
from hba.evaluate.statistics import bootstrap, chance
from hba.taxonomy import BUILTIN, NONE, PUBLISHED, bundled, of_folder, read_labels, save_beside


def score_run(*arguments: Any, **options: Any) -> dict[str, Any]:
    """The metrics of a run as metrics.json has them."""
    return scoring.score_run(*arguments, **options).record()


ZERO_SHOT = BUILTIN.extended({"extends": "zero_shot"})
LABELS = ZERO_SHOT.dataset("av_asd").labels
EYES, ANGER, TALK, LIMBS = LABELS[0], LABELS[1], LABELS[3], LABELS[8]
steady = settings(deadline=None, derandomize=True)
sets = st.lists(st.sampled_from(LABELS), unique=True, max_size=5)


def spelled(labels: list[str] | tuple[str, ...]) -> str:
    return ", ".join(label for label in LABELS if label in labels) or NONE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{ANGER}, {EYES}", f"{EYES}, {ANGER}"),
        (f"1. {EYES.title()}\n2. {LIMBS.upper()}.", f"{EYES}, {LIMBS}"),
        (f"- {TALK}\n- {LIMBS}", f"{TALK}, {LIMBS}"),
        (f"{EYES} and {LIMBS}", f"{EYES}, {LIMBS}"),
        (f"<think>{TALK}?</think>\\boxed{{{ANGER}; {LIMBS}}}", f"{ANGER}, {LIMBS}"),
        (f'["{ANGER}", "{LIMBS}"]', f"{ANGER}, {LIMBS}"),
        (f"{ANGER}, {ANGER}", ANGER),
        ("Aggressive behaviour", ANGER),
        (f"{ANGER}, dancing", ANGER),
        ("None of the above.", NONE),
        ("background", NONE),
        (f"not {ANGER}", None),
        ("the child is happy", None),
        ("", None),
    ],
)
def test_several_labels_are_read_from_an_answer_or_it_is_none(text: str, expected: str | None) -> None:
    assert to_label("av_asd", text, ZERO_SHOT) == expected


@steady
@given(sets, st.sampled_from([", ", "; ", "\n", " | ", "，", "\n- "]))
def test_every_set_is_read_back_from_every_way_of_listing_it(labels: list[str], separator: str) -> None:
    assert read_labels(separator.join(labels) or "none", LABELS, {}) == spelled(labels)


@steady
@given(st.text())
def test_any_text_is_a_set_or_none(text: str) -> None:
    found = read_labels(text, LABELS, {})
    assert found is None or read_labels(found, LABELS, {}, strict=True) == found


def made(count: int, seed: int = 0, skill: float = 0.6) -> tuple[list[str | None], list[str]]:
    rng = random.Random(seed)
    truth = [spelled(rng.sample(LABELS[:6], rng.choice([0, 1, 1, 2, 3]))) for _ in range(count)]
    guesses = [
        t if rng.random() < skill else rng.choice([None, spelled(rng.sample(LABELS, rng.choice([0, 1, 2])))])
        for t in truth
    ]
    return guesses, truth


def indicators(spellings: list[str | None]) -> np.ndarray:
    return np.array([[label in (s or "").split(", ") for label in LABELS] for s in spellings])


def test_the_figures_are_those_of_scikit_learn() -> None:
    guesses, truth = made(300)
    found = score(guesses, truth, ["av_asd"] * 300, taxonomy=ZERO_SHOT)
    y, p = indicators(list(truth)), indicators(guesses)
    present = np.flatnonzero(y.any(0))
    entry = found["datasets"]["av_asd"]
    assert entry["macro_f1"] == pytest.approx(f1_score(y, p, average="macro", labels=present, zero_division=0))
    assert entry["micro_f1"] == pytest.approx(f1_score(y, p, average="micro", zero_division=0))
    assert entry["hamming_loss"] == pytest.approx(hamming_loss(y, p))
    read_ = np.array([guess is not None for guess in guesses])
    assert entry["subset_accuracy"] == pytest.approx(accuracy_score(y, p) - ((y == p).all(1) & ~read_).mean())
    example = f1_score(y[read_], p[read_], average="samples", zero_division=1)
    assert entry["example_f1"] == pytest.approx(example * read_.mean())
    assert entry["n_invalid"] == (~read_).sum()
    each = f1_score(y, p, average=None, zero_division=0)
    assert {f"{LABELS[i]}/class_f1": pytest.approx(each[i]) for i in present}.items() <= entry.items()
    assert found["tasks"]["AVASD"]["score"] == entry["macro_f1"]
    assert found["aggregate"]["mean"]["score"] == entry["macro_f1"]


def test_intervals_chance_and_comparison_hold_for_label_sets() -> None:
    guesses, truth = made(400)
    better = [t if i % 10 else g for i, (g, t) in enumerate(zip(guesses, truth, strict=True))]
    keys = ["av_asd"] * 400
    a, b = encode(guesses, truth, keys, ZERO_SHOT), encode(better, truth, keys, ZERO_SHOT)
    low, high = bootstrap(a).tasks["AVASD"] or (1, 0)
    value = score(guesses, truth, keys, taxonomy=ZERO_SHOT)["tasks"]["AVASD"]["score"]
    assert low < value < high
    level = chance(a).tasks["AVASD"]
    assert level is not None and 0 < level < low
    line = paired_difference(a, b).tasks["AVASD"]
    assert line.p_holm is not None and line.p_holm < 0.01 and line.lost == 0
    assert line.gained == sum(g != h for g, h in zip(guesses, better, strict=True))
    with pytest.raises(InputError, match="same rows"):
        paired_difference(a, encode(guesses, truth[::-1], keys, ZERO_SHOT))


def test_the_order_of_rows_changes_no_interval() -> None:
    guesses, truth = made(200)
    order = random.Random(0).sample(range(200), 200)
    rows = encode(guesses, truth, ["av_asd"] * 200, ZERO_SHOT)
    mixed = encode([guesses[i] for i in order], [truth[i] for i in order], ["av_asd"] * 200, ZERO_SHOT)
    assert bootstrap(mixed) == bootstrap(rows)
    groups = [str(i // 4) for i in range(200)]
    assert bootstrap(mixed, clusters=[groups[i] for i in order]) == bootstrap(rows, clusters=groups)


def test_blind_answers_do_not_beat_the_chance_level() -> None:
    rng = random.Random(3)
    _, truth = made(2000)
    for blind in (rng.sample(truth, 2000), [spelled(LABELS)] * 2000, [LABELS[0]] * 2000):
        rows = encode(blind, truth, ["av_asd"] * 2000, ZERO_SHOT)
        level = chance(rows).tasks["AVASD"]
        found = score(blind, truth, ["av_asd"] * 2000, taxonomy=ZERO_SHOT)["tasks"]["AVASD"]["score"]
        assert level is not None and found <= level + 0.02


def test_the_six_sets_of_the_protocol_are_there_and_change_nothing_published() -> None:
    wanted = {entry["dataset"]: entry for entry in PUBLISHED["zero_shot"]}
    added = bundled("zero_shot")
    assert set(added["datasets"]) == set(wanted) and len(wanted) == 6
    assert {key for key, entry in wanted.items() if entry.get("multilabel")} == {
        key for key in wanted if ZERO_SHOT.dataset(key).multilabel
    }
    for key in wanted:
        assert ZERO_SHOT.dataset(key).task in added["tasks"]
    for key, task in BUILTIN.tasks.items():
        assert ZERO_SHOT.tasks[key] == task
    assert ZERO_SHOT.class_names[:25] == BUILTIN.class_names


def row(dataset: str, answer: str, **media: Any) -> dict[str, Any]:
    signature = "_".join(["text", *(kind for kind in ("image", "video", "audio") if media.get(f"{kind}s"))])
    return {
        "problem": "?",
        "answer": answer,
        "dataset": dataset,
        "task": "x_cls",
        "modality_signature": signature,
    } | media


def zero_shot_atlas(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "taxonomy.yaml").write_text("extends: zero_shot\n")
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_a_zero_shot_atlas_goes_from_rows_to_metrics(tmp_path: Path) -> None:
    answers = {
        "eatd": "no depression", "mvsa": "positive", "av_asd": f"{LIMBS}, {EYES}", "iemocap": "angry",
        "dreaddit": "stressed", "sarcnet": "sarcasm",
    }  # fmt: skip
    atlas = open_atlas(zero_shot_atlas(tmp_path / "a", [row(k, v) for k, v in answers.items()] * 2), split="test")
    assert atlas.columns.label_codes.tolist()[2] == -1  # no head has several labels
    run = tmp_path / "run"
    run.mkdir()
    save_beside(atlas.taxonomy, run)
    assert of_folder(run).datasets == atlas.taxonomy.datasets
    with PredictionLog(run / "predictions.jsonl", atlas.taxonomy) as log:
        for sample in atlas:
            label = to_label(sample.dataset, sample.answer, atlas.taxonomy)
            log.append(
                Prediction(
                    id=sample.id, dataset=sample.dataset, task=sample.task, split="test", target=sample.target,
                    output=sample.answer, answer=sample.answer, label=label, error=None,
                )
            )  # fmt: skip
    metrics = score_run(run)
    assert {key: task["score"] for key, task in metrics["tasks"].items()} == dict.fromkeys(
        ("EATD", "MVSA", "AVASD", "IEMOCAP", "DREADDIT", "SARCNET"), 1.0
    )
    assert metrics["aggregate"].get("free_form") is None


def test_a_row_with_an_unknown_label_among_its_labels_is_refused(tmp_path: Path) -> None:
    bad = zero_shot_atlas(tmp_path / "a", [row("av_asd", f"{LIMBS}, dancing")])
    with pytest.raises(InputError, match=r"test\.jsonl:1.*no list of labels of dataset 'av_asd'"):
        open_atlas(bad, split="test")


def test_the_entries_of_the_page_are_taken_as_they_stand(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "zero_shot.md").read_text()
    entries = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(entries) == 2
    for entry in entries:
        (tmp_path / "taxonomy.yaml").write_text(entry)
        taxonomy = of_folder(tmp_path)
        assert any(dataset.multilabel for dataset in taxonomy.datasets.values())


def test_a_taxonomy_of_ones_own_may_have_several_labels_too(tmp_path: Path) -> None:
    entries = {
        "tasks": {"X": {"name": "x", "metric": "multilabel_macro_f1", "datasets": ["mine"]}},
        "datasets": {"mine": {"domain": "multilabel", "labels": ["a", "b"]}},
        "synonyms": {"mine": {"alpha": "a"}},
    }
    mine = BUILTIN.extended(entries)
    assert mine.canonical_label("mine", "b, Alpha") == "a, b"
    for labels in ([], ["a, b"]):
        with pytest.raises(TaxonomyError, match="needs labels that can be listed"):
            BUILTIN.extended({"datasets": {"mine": {"domain": "multilabel", "labels": labels}}})
