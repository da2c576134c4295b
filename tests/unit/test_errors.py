"""The error family: one message with what, where and fix; exit codes; pickling; suggestions."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from hba.errors import ConfigError, HbaError, InputError, MediaError, TaxonomyError, nearest
from hba.storage import StorageError

KINDS = [HbaError, InputError, ConfigError, TaxonomyError, MediaError, StorageError]


def test_message_holds_place_reason_and_remedy() -> None:
    error = InputError("expected str, found int", where="a.jsonl:3, label", fix="Write a string.")
    assert str(error) == "a.jsonl:3, label: expected str, found int. Fix: Write a string."
    assert (error.what, error.where, error.fix) == ("expected str, found int", "a.jsonl:3, label", "Write a string.")
    assert str(HbaError("failed")) == "failed"


@pytest.mark.parametrize("kind", KINDS)
def test_exit_code_tells_bad_input_from_failed_work(kind: type[HbaError]) -> None:
    assert kind("x").exit_code == (1 if kind is HbaError else 2)
    assert issubclass(kind, HbaError)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickling(kind: type[HbaError]) -> None:
    error = kind("what", where="where", fix="fix")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.what, copy.where, copy.fix, str(copy)) == ("what", "where", "fix", str(error))


def fail() -> None:
    raise MediaError("zero bytes", where="test.jsonl:2, audios", fix="Restore the file.")


def test_an_error_of_a_worker_reaches_the_main_process() -> None:
    with ProcessPoolExecutor(1) as pool, pytest.raises(MediaError) as caught:
        pool.submit(fail).result()
    assert caught.value.where == "test.jsonl:2, audios"


def test_nearest_suggests_and_lists() -> None:
    assert nearest("cremat", ["tess", "cremad"]) == "Did you mean 'cremad'? Known: cremad, tess."
    assert nearest("xyz", ["tess", "cremad"]) == "Known: cremad, tess."
    assert nearest("x", []) == "Known: ."
    assert nearest("val", ["test", "validation"]) == "Did you mean 'validation'? Known: test, validation."
    assert nearest("t", ["tess", "test"]) == "Known: tess, test."  # it begins both
    assert nearest("epoch", ["epochs"], prefix="train.") == "Did you mean 'train.epochs'? Known: train.epochs."
