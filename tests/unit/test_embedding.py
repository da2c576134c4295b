"""The sentence encoder is the published one, whatever the batch, and embeds a text once."""

import numpy as np
import pytest

from hba import embedding
from hba.embedding import Embedder
from hba.errors import InputError

TEXTS = ["anger", "He is angry with his brother.", "", "A cat sleeps. " * 90, "Ärger \U0001f620", "joy"]


@pytest.fixture(scope="module")
def embedder():
    return Embedder()


def test_it_equals_the_reference_implementation(embedder):
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(embedding._resolve(embedding.MINILM), device="cpu").encode(
        TEXTS, normalize_embeddings=True
    )
    np.testing.assert_allclose(embedder.embed(TEXTS), reference, atol=2e-6)


def test_similarity_is_meaning(embedder):
    near, far, same = embedder.similarity(
        ["she is angry", "she is angry", "anger"], ["she is furious", "the sky is blue", "anger"]
    )
    assert same == 1.0 and near > 0.6 > far
    assert embedder.similarity([], []).shape == (0,)
    with pytest.raises(ValueError, match="1 texts against 0"):
        embedder.similarity(["a"], [])


def test_a_text_is_embedded_once_and_in_batches(monkeypatch):
    small = Embedder(batch_size=2, cached=3)
    seen = []
    encode = Embedder._encode
    monkeypatch.setattr(Embedder, "_encode", lambda self, texts: seen.append(list(texts)) or encode(self, texts))
    first = small.embed(["a", "bb", "a", "ccc"])
    assert seen == [["a", "bb"], ["ccc"]]
    assert np.array_equal(first[0], first[2])
    assert np.array_equal(small.embed(["ccc", "a"]), first[[3, 0]]) and len(seen) == 2
    small.embed(["d"])  # the cache holds three: "bb" has gone
    small.embed(["bb"])
    assert seen[2:] == [["d"], ["bb"]]


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot load the sentence encoder"):
        Embedder(str(tmp_path))


def test_altered_weights_of_the_package_are_refused(monkeypatch):
    monkeypatch.setattr(embedding, "MINILM_SHA256", "0" * 64)
    with pytest.raises(InputError, match="not those of the released model"):
        Embedder()
