"""The error family: one message with what, where and fix; exit codes; pickling; suggestions."""

from __future__ import annotations

import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import hba
from hba.atlas.names import find_files, present_splits
from hba.errors import ConfigError, HbaError, InputError, MediaError, TaxonomyError, nearest
from hba.storage import StorageError, plural
from hba.taxonomy import BUILTIN

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
    assert nearest("cremat", ["tess", "cremad"]) == "Did you mean 'cremad'? Choose one of: cremad, tess."
    assert nearest("xyz", ["tess", "cremad"]) == "Choose one of: cremad, tess."
    assert nearest("x", []) == "Leave it out: there is none."
    assert nearest("x", ["tess"]) == "Write 'tess'."
    assert nearest("val", ["test", "validation"]) == "Did you mean 'validation'? Choose one of: test, validation."
    assert nearest("t", ["tess", "test"]) == "Choose one of: tess, test."  # it begins both
    assert nearest("epoch", ["epochs"], prefix="train.") == "Did you mean 'train.epochs'? Write 'train.epochs'."


def test_no_fix_only_lists_what_is_known() -> None:
    """A fix says what to do or to type; a list of names is none."""
    bare = re.compile(r"""fix=f?["'](Known|Present|There (is|are))\b""")
    package = Path(hba.__file__).parent
    found = [
        f"{path.name}:{number}"
        for path in package.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if bare.search(line)
    ]
    assert found == []


def test_three_messages_that_newcomers_meet_say_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown dataset 'friends'.*declared in taxonomy\.yaml beside the rows"):
        BUILTIN.dataset("friends")
    with pytest.raises(InputError, match=r"holds no split\. Fix: Write one JSON object a line into test\.jsonl"):
        present_splits(tmp_path)
    (tmp_path / "test.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"no split 'validation'\. Fix: Write 'test'\. It is --split of a command, "):
        find_files(tmp_path, "validation")


def test_a_number_agrees_with_its_noun_and_its_verb() -> None:
    assert [plural(number, "step") for number in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
    assert plural(1, "medium|media", "is|are") == "1 medium is" and plural(3, "medium|media", "is|are") == "3 media are"
