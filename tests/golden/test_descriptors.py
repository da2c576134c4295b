"""Parity of pooling, landmark flattening and padding with the released scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hba.descriptors import flatten_landmarks, pool, stack
from hba.errors import InputError

DATA = Path(__file__).with_name("data")
TOLERANCE = 1e-5


def read(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def cases(name: str) -> list[tuple[dict[str, Any], list[float] | None]]:
    golden = read(name)
    values = [case["value"] for case in golden["expected"]["cases"]]
    return list(zip(golden["inputs"]["cases"], values, strict=True))


GOLDEN = read("descriptors.json")
AUDIO, VIDEO = cases("bam/audio_pooling.json"), cases("bam/video_pooling.json")


def norm_of(case: dict[str, Any]) -> str | None:
    return None if case["norm"] in (None, "none") else case["norm"]


@pytest.mark.parametrize("case", GOLDEN["pool"], ids=lambda c: f"{len(c['x'])}-{c['mode']}-{c['norm']}")
def test_pool(case: dict[str, Any]) -> None:
    pooled = pool(case["x"], case["mode"], case["norm"], published=True)
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, case["expected"], atol=TOLERANCE)
    if case["mode"] != "meanstdp25p75":  # what is wrong in the release is the percentiles alone
        np.testing.assert_array_equal(pooled, pool(case["x"], case["mode"], case["norm"]))


@pytest.mark.parametrize(("case", "expected"), AUDIO)
def test_pool_of_audio_features(case: dict[str, Any], expected: list[float] | None) -> None:
    if expected is None:  # the release prints a warning and goes on without
        with pytest.raises(InputError):
            pool(case["features"], case["temporal_mode"], norm_of(case), published=True)
    else:
        pooled = pool(case["features"], case["temporal_mode"], norm_of(case), published=True)
        np.testing.assert_allclose(pooled, expected, atol=TOLERANCE)


@pytest.mark.parametrize(("case", "expected"), VIDEO)
def test_pool_of_landmarks(case: dict[str, Any], expected: list[float] | None) -> None:
    def pooled() -> Any:
        flat_TD = flatten_landmarks(case["openpose"], confidence=case["use_conf"], published=True)
        return pool(flat_TD, case["temporal_mode"], norm_of(case), published=True)

    if expected is None:
        with pytest.raises(InputError):
            pooled()
    else:
        np.testing.assert_allclose(pooled(), expected, atol=TOLERANCE)


@pytest.mark.parametrize("key", ["with_confidence", "without_confidence"])
def test_landmarks_flatten(key: str) -> None:
    landmarks = GOLDEN["landmarks"]
    flat_TD = flatten_landmarks(landmarks["inputs"], confidence=key == "with_confidence")
    np.testing.assert_allclose(flat_TD, landmarks[key], atol=1e-7)


@pytest.mark.parametrize("dim", [3, 5, 7])
def test_padding_and_cutting_is_the_published_way_alone(dim: int) -> None:
    golden = read("bam/batch_pad_truncate.json")
    mode, norm = golden["inputs"]["temporal_mode"], golden["inputs"]["norm"]
    vectors = [pool(x, mode, norm) for x in golden["inputs"]["features"]]
    np.testing.assert_allclose(stack(vectors, dim, published=True), golden["expected"][str(dim)], atol=TOLERANCE)
    with pytest.raises(InputError, match=r"descriptor \d has \d values, expected"):
        stack(vectors, dim)
