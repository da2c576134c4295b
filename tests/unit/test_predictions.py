"""predictions.jsonl: what is refused, with which place; the log and its resume after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from hba.errors import InputError, TaxonomyError
from hba.evaluate.predictions import Prediction, PredictionLog, read_predictions

WHOLE: dict[str, Any] = {
    "id": "test/1", "dataset": "cremad", "task": "emotion_cls", "split": "test", "target": "anger",
    "output": "\\boxed{anger}", "answer": "anger", "label": "anger", "latency_s": 0.5, "tokens_in": 10, "tokens_out": 3,
    "error": None,
}  # fmt: skip


def prediction(number: int = 1, **changes: Any) -> Prediction:
    return Prediction(**{**WHOLE, "id": f"test/{number}", **changes})


def written(folder: Path, *records: dict[str, Any] | str) -> Path:
    path = folder / "predictions.jsonl"
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    free = {"dataset": "siq2", "task": "x_qa", "target": "Er lächelt.", "answer": "他笑了", "label": None}
    sent = [
        prediction(1, probs={"anger": 0.75, "sad": 0.25}, group="speaker 3"),
        prediction(2, label=None, output=None, answer=None, error="timed out"),
        prediction(3, **free),
    ]
    with PredictionLog(tmp_path / "run" / "predictions.jsonl") as log:
        for each in sent:
            log.append(each)
    assert read_predictions(tmp_path / "run" / "predictions.jsonl") == sent
    lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(json.loads(lines[1])) == set(WHOLE)
    assert set(json.loads(lines[0])) == {*WHOLE, "probs", "group"}
    assert "他笑了" in lines[2]


def test_unknown_fields_and_blank_lines_are_ignored(tmp_path: Path) -> None:
    path = written(tmp_path, {**WHOLE, "cost": 3}, "", {**WHOLE, "id": "test/2"})
    assert [p.id for p in read_predictions(path)] == ["test/1", "test/2"]


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in WHOLE.items() if key != name}


@pytest.mark.parametrize(
    ("record", "place", "message"),
    [
        (without("label"), "label", "missing required field `label`"),
        (without("id"), "id", "missing required field"),
        ({**WHOLE, "id": 7}, "id", "Expected `str`, got `int`"),
        ({**WHOLE, "label": ["anger"]}, "label", "Expected `str | null`"),
        ({**WHOLE, "latency_s": "fast"}, "latency_s", "Expected `float | null`"),
        ({**WHOLE, "probs": {"anger": "high"}}, "probs", "Expected `float`"),
        ({**WHOLE, "id": "test/0"}, "id", r"'test/0' occurs twice \(first in line 1\)"),
        ({**WHOLE, "dataset": "cremat"}, "dataset", "Did you mean 'cremad'"),
        ({**WHOLE, "target": "angst"}, "target", "unknown label 'angst'"),
        ({**WHOLE, "label": "sarcasm"}, "label", "unknown label 'sarcasm'"),
        ("[1, 2]", None, "Expected `object`, got `array`"),
        ('{"id": "test/1", "datas', None, "not valid JSON"),
        ('{"id": NaN}', None, "not valid JSON"),
    ],
)
def test_a_wrong_line_is_refused_with_file_line_and_field(
    tmp_path: Path, record: dict[str, Any] | str, place: str | None, message: str
) -> None:
    path = written(tmp_path, {**WHOLE, "id": "test/0"}, record)
    with pytest.raises(InputError, match=message) as caught:
        read_predictions(path)
    assert caught.value.where == f"{path}:2" + (f", {place}" if place else "")
    assert caught.value.fix
    assert caught.value.exit_code == 2


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b'{"id": "\xff\xfe"}\n')
    with pytest.raises(InputError, match="not valid JSON") as caught:
        read_predictions(path)
    assert caught.value.where == f"{path}:1"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_predictions(tmp_path / "none.jsonl")


def test_an_id_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    with PredictionLog(path) as log:
        assert log.done_ids() == set()
        log.append(prediction(1))
        with pytest.raises(InputError, match="already predicted"):
            log.append(prediction(1))
    with PredictionLog(path) as log:
        assert log.done_ids() == {"test/1"}
        with pytest.raises(InputError, match="already predicted"):
            log.append(prediction(1))
        log.append(prediction(2))
    assert len(read_predictions(path)) == 2


def test_a_torn_last_line_is_cut_when_the_run_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE, {**WHOLE, "id": "test/2"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "test/3", "data')
    with pytest.raises(InputError, match="it cuts it off and resumes"):
        read_predictions(path)
    with PredictionLog(path) as log:
        assert log.done_ids() == {"test/1", "test/2"}
        assert path.read_bytes() == whole


def test_a_file_of_something_else_is_not_appended_to(tmp_path: Path) -> None:
    path = written(tmp_path, {"step": 1, "loss": 0.5})
    before = path.read_bytes()
    with pytest.raises(InputError, match="missing required field"):
        PredictionLog(path)
    assert path.read_bytes() == before


def test_failed_means_an_error_and_nothing_said() -> None:
    assert prediction(label=None, output=" ", answer=None, error="timed out").failed
    assert not prediction(label=None, output=None, answer=None).failed
    assert not prediction(label=None, answer=None, error="cut off").failed
    assert not prediction(output=None, answer=None, error="slow").failed


def test_three_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    """A writer is killed while it writes, and goes on where the file ends."""
    path = tmp_path / "predictions.jsonl"
    script = tmp_path / "writer.py"
    script.write_text(
        textwrap.dedent(
            f"""
            from hba.evaluate.predictions import Prediction, PredictionLog
            with PredictionLog({str(path)!r}) as log:
                done = log.done_ids()
                print("ready", flush=True)
                for i in range(100_000):
                    if f"test/{{i}}" not in done:
                        log.append(Prediction(**{WHOLE | {"output": "long " * 200}!r} | {{"id": f"test/{{i}}"}}))
            """
        )
    )
    seen = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
            target = (path.stat().st_size if path.exists() else 0) + 300_000
            while not path.exists() or path.stat().st_size < target:
                assert writer.poll() is None
                time.sleep(0.001)
            writer.kill()
        with PredictionLog(path) as log:
            done = log.done_ids()
        assert len(done) > seen
        seen = len(done)
        assert done == {f"test/{i}" for i in range(seen)}
        assert [p.id for p in read_predictions(path)] == [f"test/{i}" for i in range(seen)]


def test_an_unknown_dataset_is_a_taxonomy_error(tmp_path: Path) -> None:
    with pytest.raises(TaxonomyError):
        read_predictions(written(tmp_path, {**WHOLE, "dataset": "x"}))
