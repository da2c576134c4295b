"""What rows are drawn together, sliced by and calibrated on, through atlases and run folders on disk."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hba.atlas import open_atlas
from hba.errors import InputError
from hba.evaluate import score as scoring
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import predict_run, sample_groups
from hba.evaluate.predictions import Prediction, PredictionLog, read_predictions
from hba.evaluate.score import calibration


def score_run(*arguments: Any, **options: Any) -> dict[str, Any]:
    """The metrics of a run as metrics.json has them."""
    return scoring.score_run(*arguments, **options).record()


LABELS = ("anger", "sad", "happy")


def row(
    dataset: str, answer: str, *, audio: str | None = None, video: str | None = None, **extra: Any
) -> dict[str, Any]:
    media = {"audios": [audio] if audio else [], "videos": [video] if video else []}
    signature = "_".join(["text", *(name for name, there in (("video", video), ("audio", audio)) if there)])
    label = {} if dataset == "siq2" else {"class_label": answer}
    return {
        "problem": "?", "answer": answer, "images": [], "texts": [], "dataset": dataset, "task": "x_cls",
        "modality_signature": signature, "ext_video_feats": [], "ext_audio_feats": [], **media, **label, **extra,
    }  # fmt: skip


def atlas_of(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def predicted(atlas: Path, folder: Path, skill: float = 0.6, **extra: Any) -> Path:
    """A run folder as `hba predict` leaves it, with made-up answers."""
    opened, rng = open_atlas(atlas, split="test"), random.Random(0)
    groups = sample_groups(opened)
    folder.mkdir()
    with PredictionLog(folder / "predictions.jsonl") as log:
        for sample in opened:
            label = sample.target if rng.random() < skill else rng.choice(LABELS)
            log.append(
                Prediction(
                    id=sample.id, dataset=sample.dataset, task=sample.task, split="test", target=sample.target,
                    output=label, answer=label, label=label, error=None, group=groups.get(sample.id),
                    modality=sample.modality_signature, **extra,
                )
            )  # fmt: skip
    data = {"path": str(atlas), "fingerprint": opened.fingerprint}
    (folder / "predict.json").write_text(json.dumps({"data": data, "split": "test"}), encoding="utf-8")
    return folder


def test_groups_come_from_fields_file_names_and_shared_media_and_are_never_guessed(tmp_path: Path) -> None:
    rows = [
        row("cremad", "sad", audio="cremad_dataset_audio/1077_DFA_SAD_XX.wav"),
        row("cremad", "anger", audio="cremad_dataset_audio/1077_IEO_ANG_HI.wav"),
        row("cremad", "happy", audio="cremad_dataset_audio/1012_IEO_HAP_HI.wav"),
        row("meld_emotion", "sad", video="meld/dia3_utt1.mp4"),
        row("meld_emotion", "sad", video="meld/dia3_utt2.mp4"),
        row("siq2", "because", video="siq2/a.mp4"),
        row("siq2", "to see", video="siq2/a.mp4"),
        row("siq2", "he left", video="siq2/b.mp4"),
        row("tess", "sad", audio="x/1.wav", speaker_id=7),
        row("tess", "happy", audio="x/2.wav", speaker_id=7),
        row("mosei_emotion", "sad"),
        row("mosei_emotion", "sad", audio="mosei/shared.wav"),
        row("mosei_senti", "neutral", audio="mosei/shared.wav"),
    ]
    groups = sample_groups(open_atlas(atlas_of(tmp_path / "a", rows), split="test"))
    assert groups == {
        "test/1": "file name: 1077", "test/2": "file name: 1077", "test/4": "file name: dia3",
        "test/5": "file name: dia3", "test/6": "siq2/a.mp4", "test/7": "siq2/a.mp4", "test/9": "speaker_id: 7",
        "test/10": "speaker_id: 7",
    }  # fmt: skip


def speakers(count: int, each: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [
        row("cremad", rng.choice(LABELS), audio=f"a/{1000 + i // each}_{i}.wav", gender="fm"[i // each % 2], age=str(i))
        for i in range(count)
    ]


def test_predictions_carry_their_group_and_modality(tmp_path: Path) -> None:
    atlas = atlas_of(tmp_path / "a", speakers(12, 4))
    (atlas / "train.jsonl").write_text((atlas / "test.jsonl").read_text())  # what the baseline counts
    run, nothing = tmp_path / "run", lambda tally: None
    predict_run(
        "majority", run, atlas=str(atlas), split="test", config=PredictConfig(), progress=nothing, backend="majority"
    )
    found = read_predictions(run / "predictions.jsonl")
    assert [p.group for p in found] == [f"file name: {1000 + i // 4}" for i in range(12)]
    assert {p.modality for p in found} == {"text_audio"}
    assert score_run(run)["provenance"]["scoring"]["clusters"]["groups"] == 3


def test_intervals_are_clustered_by_speaker_by_default_and_say_so(tmp_path: Path) -> None:
    run = predicted(atlas_of(tmp_path / "a", speakers(300, 20)), tmp_path / "run")
    # Speakers are all right or all wrong: 15 pieces of evidence, not 300.
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["label"] = line["target"] if i // 20 % 3 else next(x for x in LABELS if x != line["target"])
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    auto, alone = score_run(run), score_run(run, cluster="none")
    wide, narrow = (metrics["tasks"]["EMO"]["ci95"] for metrics in (auto, alone))
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])
    clusters = auto["provenance"]["scoring"]["clusters"]
    assert clusters == {"field": "group", "groups": 15, "rows": 300, "few": []}
    assert alone["provenance"]["scoring"]["clusters"] is None
    by_gender = score_run(run, cluster="gender")["provenance"]["scoring"]["clusters"]
    assert by_gender == {"field": "gender", "groups": 2, "rows": 300, "few": ["cremad"]}


def test_slices_are_scored_as_if_they_were_all_there_is(tmp_path: Path) -> None:
    run = predicted(atlas_of(tmp_path / "a", speakers(300, 20)), tmp_path / "run")
    metrics = score_run(run, by=["gender"], cluster="none", resamples=200)
    found = metrics["aggregate"]["breakdowns"]["gender"]
    assert set(found["slices"]) == {"f", "m"}
    only = [p for i, p in enumerate((run / "predictions.jsonl").read_text().splitlines()) if i // 20 % 2 == 0]
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "predictions.jsonl").write_text("\n".join(only) + "\n")
    expected = score_run(alone, cluster="none", resamples=200)["tasks"]["EMO"]
    assert found["slices"]["f"]["tasks"]["EMO"]["score"] == expected["score"]
    assert found["slices"]["f"]["tasks"]["EMO"]["ci95"] == expected["ci95"]
    scores = [part["tasks"]["EMO"]["score"] for part in found["slices"].values()]
    assert found["gaps"]["EMO"] == pytest.approx(max(scores) - min(scores))
    tiny = score_run(run, by=["age"], resamples=100)["aggregate"]["breakdowns"]["age"]
    assert tiny["gaps"] == {}  # slices of one row make no gap


def test_modality_and_language_are_broken_down_unasked(tmp_path: Path) -> None:
    rows = [
        *(row("cremad", "sad", audio=f"a/{i}.wav") for i in range(5)),
        *(row("chsimsv2", "neutral", video=f"v/{i}.mp4") for i in range(4)),
    ]
    metrics = score_run(predicted(atlas_of(tmp_path / "a", rows), tmp_path / "run", skill=1.0))
    sizes = {f: {k: v["n"] for k, v in b["slices"].items()} for f, b in metrics["aggregate"]["breakdowns"].items()}
    assert sizes == {"modality": {"text_audio": 5, "text_video": 4}, "language": {"en": 5, "zh": 4}}


def test_a_field_that_no_row_has_and_another_atlas_are_refused(tmp_path: Path) -> None:
    run = predicted(atlas_of(tmp_path / "a", speakers(20, 2)), tmp_path / "run")
    with pytest.raises(InputError, match=r"no row has the field 'gendre'.*Did you mean 'gender'"):
        score_run(run, by=["gendre"])
    other = atlas_of(tmp_path / "b", speakers(30, 2))
    with pytest.raises(InputError, match="is not the atlas that was predicted"):
        score_run(run, by=["gender"], atlas=other)
    assert not (run / "metrics.json").exists()


def rated(confidences: list[float], right: list[bool]) -> list[Prediction]:
    base = Prediction(
        id="", dataset="mmsd", task="x_cls", split="test", target="sarcasm", output="", answer="", label="sarcasm",
        error=None,
    )  # fmt: skip
    found = []
    for i, (p, hit) in enumerate(zip(confidences, right, strict=True)):
        target = "sarcasm" if hit else "not sarcasm"
        probs = {"sarcasm": p, "not sarcasm": 1 - p}
        found.append(replace(base, id=f"test/{i}", target=target, probs=probs))
    return found


def test_calibration_by_hand() -> None:
    """Two bins: ten answers at 0.9 of which six are right, ten at 0.6 of which six are right."""
    found = calibration(rated([0.9] * 10 + [0.6] * 10, ([True] * 6 + [False] * 4) * 2))
    assert found is not None
    assert found["all"]["ece"] == pytest.approx(0.5 * 0.3 + 0.5 * 0.0)
    brier = 2 * sum(0.6 * (1 - p) ** 2 + 0.4 * p**2 for p in (0.9, 0.6)) / 2
    assert found["all"]["brier"] == pytest.approx(brier)
    assert [(each["n"], each["accuracy"]) for each in found["all"]["bins"]] == [(10, 0.6), (10, 0.6)]
    assert found["datasets"]["mmsd"]["ece"] == found["all"]["ece"]


def test_probabilities_that_are_right_are_calibrated_and_none_are_not_taken_for_certain() -> None:
    rng = random.Random(0)
    confidences = [rng.uniform(0.5, 1) for _ in range(20_000)]
    found = calibration(rated(confidences, [rng.random() < p for p in confidences]))
    assert found is not None and found["all"]["ece"] < 0.02
    told = rated([0.5, 1.0], [True, True])
    assert calibration([replace(p, probs=None) for p in told]) is None
    mixed = calibration([told[0], replace(told[1], probs=None)])
    assert mixed is not None and mixed["all"]["n"] == 1
