"""Pooling by the standard definitions, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hba.descriptors import flatten_landmarks, pool, sequence, stack
from hba.errors import InputError

MODES = ["none", "mean", "meanstd", "meanstdp25p75"]


@given(frames=st.integers(1, 40), seed=st.integers(0, 1000))
def test_percentiles_are_those_of_numpy(frames: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(frames, 3))
    expected = np.concatenate([x.mean(0), x.std(0), np.percentile(x, 25, axis=0), np.percentile(x, 75, axis=0)])
    np.testing.assert_allclose(pool(x, "meanstdp25p75"), expected, atol=1e-6)


def test_two_frames_have_two_quartiles_unless_published() -> None:
    x = [[0.0], [1.0]]
    assert pool(x, "meanstdp25p75").tolist() == [0.5, 0.5, 0.25, 0.75]
    assert pool(x, "meanstdp25p75", published=True).tolist() == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", [None, "l2", "zscore"])
def test_norms_act_on_the_pooled_vector(mode: str, norm: str | None) -> None:
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(1 if mode == "none" else 9, 5))
    pooled = pool(x, mode, norm).astype(np.float64)
    assert len(pooled) == 5 * {"none": 1, "mean": 1, "meanstd": 2, "meanstdp25p75": 4}[mode]
    if norm == "l2":
        assert np.linalg.norm(pooled) == pytest.approx(1, abs=1e-6)
    if norm == "zscore":
        assert (pooled.mean(), pooled.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        ([], "empty"),
        (np.zeros((0, 4)), "empty"),
        (np.zeros((3, 0)), "empty"),
        (5.0, r"\[T, D\]"),
        (np.zeros((1, 1, 1)), r"\[T, D\]"),
        ([[1.0, float("nan")]], "NaN"),
        ([[1.0, float("inf")]], "NaN or infinite"),
        (None, "NaN|found"),
        ([[1.0], [2.0, 3.0]], "numbers"),
    ],
)
@pytest.mark.parametrize("published", [False, True])
def test_what_cannot_be_pooled_is_refused_and_never_zeros(x: object, reason: str, published: bool) -> None:
    with pytest.raises(InputError, match=reason):
        pool(x, "meanstd", published=published)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="'meanstd'"):
        pool([[1.0]], "meanstdd")
    with pytest.raises(InputError, match="zscore"):
        pool([[1.0]], "mean", "z-score")


def test_none_needs_one_frame() -> None:
    with pytest.raises(InputError, match="one frame, found 2"):
        pool([[1.0], [2.0]], "none")


def test_tensors_of_any_type_are_taken() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16, requires_grad=True)
    assert pool(x, "mean").tolist() == [2.0, 3.0]


def landmarks(frames: int = 2, **changed: object) -> dict[str, object]:
    parts = {name: torch.rand(frames, points, 3) for name, points in [("pose", 3), ("face", 2), ("left_hand", 2)]}
    return {**parts, "right_hand": torch.rand(frames, 2, 3), **changed}


def test_a_landmark_part_that_is_missing_or_odd_is_named() -> None:
    without = landmarks()
    del without["face"]
    with pytest.raises(InputError, match="'face' is missing"):
        flatten_landmarks(without)
    with pytest.raises(InputError, match=r"'pose' has shape \[2, 3, 2\]"):
        flatten_landmarks(landmarks(pose=torch.rand(2, 3, 2)))
    with pytest.raises(InputError, match="number of frames"):
        flatten_landmarks(landmarks(pose=torch.rand(4, 3, 3)), published=True)
    assert flatten_landmarks(without, published=True).shape == (2, 21)


def test_landmarks_of_two_columns_are_never_dropped_in_silence() -> None:
    """Where no confidence is asked for nothing is missing; the release takes them as they are in any case."""
    bare = {name: torch.rand(2, 3, 2) for name in ("pose", "face", "left_hand", "right_hand")}
    expected = np.concatenate([bare[name].reshape(2, 6).numpy() for name in bare], axis=1)
    np.testing.assert_array_equal(flatten_landmarks(bare, confidence=False), expected)
    for confidence in (True, False):
        np.testing.assert_array_equal(flatten_landmarks(bare, confidence=confidence, published=True), expected)
    with pytest.raises(InputError, match=r"train.jsonl:3.*'pose' has shape \[2, 3, 2\].*descriptors.confidence=false"):
        sequence(bare, where="train.jsonl:3, ext_video_feats")
    mixed = landmarks(pose=bare["pose"])
    assert flatten_landmarks(mixed, confidence=False).shape == (2, 18)
    assert flatten_landmarks(mixed, published=True).shape == (2, 24)


def test_sequence_takes_every_stored_layout() -> None:
    assert sequence({"features": torch.rand(6)}).shape == (1, 6)
    assert sequence(torch.rand(4, 6)).shape == (4, 6)
    assert sequence(landmarks(), confidence=False).shape == (2, 18)
    with pytest.raises(InputError, match=r"train.jsonl:3, ext_audio_feats: .*NaN"):
        sequence(torch.tensor([float("nan")]), where="train.jsonl:3, ext_audio_feats")


def test_stack_names_the_vector_of_another_length() -> None:
    assert stack([np.ones(3), np.zeros(3)], 3).shape == (2, 3)
    with pytest.raises(InputError, match="descriptor 1 has 2 values, expected 3"):
        stack([np.ones(3), np.ones(2)], 3)
