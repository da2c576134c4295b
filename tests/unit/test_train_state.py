"""When a checkpoint is due, which ones are kept, and which of them counts as the best."""

import json
import os
import signal
import threading

import pytest

from hba.config import load_config
from hba.errors import ConfigError
from hba.train.config import TrainConfig
from hba.train.state import NOTHING, SAVE, STOP, Progress, Saving, settle


@pytest.mark.parametrize("given", ["1", "500", "30min", "0.5min", "1.25min"])
def test_steps_and_minutes_are_taken(given):
    assert str(load_config(TrainConfig, None, [f"save_every={given}"]).save_every) == given


@pytest.mark.parametrize("given", ["0", "-1", "0min", "0.0min", "30", "5 h", "min", "1.5"])
def test_what_is_neither_is_refused(given):
    value = f'"{given}"' if given == "30" else given
    with pytest.raises(ConfigError, match=r"save_every.*every N optimizer steps, or every so many minutes"):
        load_config(TrainConfig, None, [f"save_every={value}"])


def test_a_checkpoint_is_due_by_steps_or_by_time_since_the_last(monkeypatch):
    with Saving(None) as never:
        assert [never.wish(step) for step in range(1, 5)] == [NOTHING] * 4
    with Saving(2) as by_steps:
        assert [by_steps.wish(step) for step in range(1, 5)] == [NOTHING, SAVE, NOTHING, SAVE]
    now = 100.0
    monkeypatch.setattr("hba.train.state.time.monotonic", lambda: now)
    with Saving("0.5min") as by_time:
        now += 29
        assert by_time.wish(1) == NOTHING
        now += 1
        assert by_time.wish(2) == SAVE
        by_time.saved()
        now += 29
        assert by_time.wish(3) == NOTHING


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_wish_within_and_what_it_was_before_without(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(1))
    try:
        with Saving(None) as saving:
            os.kill(os.getpid(), number)
            assert saving.wish(1) == STOP and not heard
            error = saving.stopped(Progress(step=7), 9)
            assert (error.exit_code, number.name in str(error), "7 of 9 steps" in str(error)) == (75, True, True)
        os.kill(os.getpid(), number)
        assert heard == [1]
    finally:
        signal.signal(number, before)


def test_a_worker_that_inherits_the_handler_wishes_nothing_and_threads_are_let_alone():
    with Saving(None) as saving:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(saving.wish(1))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == NOTHING
    wishes = []

    def train():
        with Saving(1) as saving:
            wishes.append(saving.wish(1))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert wishes == [SAVE]


def test_the_last_step_is_best_until_one_has_a_score():
    progress = Progress(step=2).validated(None)
    assert (progress.best_step, progress.best_score) == (2, None)
    progress = Progress(step=4, best_step=2).validated(0.1)
    assert (progress.best_step, progress.best_score) == (4, 0.1)
    for score in (None, 0.1, 0.0):
        assert Progress(step=6, best_step=4, best_score=0.1).validated(score).best_step == 4
    assert Progress(step=6, best_step=4, best_score=0.1).validated(0.2).best_step == 6


def test_the_last_and_the_best_are_kept_and_nothing_is_named_best_before_a_validation(tmp_path):
    for step in (2, 3, 4):
        (tmp_path / f"step_{step}").mkdir()
    settle(tmp_path, Progress(step=4))
    assert [path.name for path in tmp_path.iterdir()] == ["step_4"]
    (tmp_path / "step_6").mkdir()
    settle(tmp_path, Progress(step=6, best_step=4, best_score=0.5))
    assert {path.name for path in tmp_path.iterdir()} == {"step_4", "step_6", "best.json"}
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 4, "score": 0.5}
