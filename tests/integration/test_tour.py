"""The tour tells the truth: a tiny prediction and a tiny training step pass the files that it names, in its order.

Functions of hba are watched while they run. A file handles data when one of its functions is given or returns a row, a
sample, an encoded sample, a batch or a prediction. Files that handle data and are named by no walk must be in SUPPORT,
with the reason why a reader can do without them.
"""

import re
import sys
from pathlib import Path

import pytest

import hba
from hba.atlas.batch import Batch, Encoded
from hba.atlas.sample import Row, Sample
from hba.config import load_config
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import predict_run
from hba.evaluate.predictions import Prediction
from hba.evaluate.score import score_run
from hba.run import RunFolder
from hba.train.config import SftConfig
from hba.train.sft import train_sft

SOURCE = Path(hba.__file__).parent
TOUR = SOURCE.parents[1] / "docs" / "tour.md"
WALKS = {"One sample, from disk to metric": "predict", "One training step": "run_training"}
MOST_FILES = 6

# Files that handle samples or batches without deciding anything about them.
SUPPORT = {
    "atlas/__init__.py": "an atlas is a view: it passes the call on to its store",
    "atlas/rows.py": "the checks of a row, called by every store",
    "atlas/sample.py": "the types themselves",
    "atlas/workers.py": "what the loader does in its processes: ask for a sample, encode it",
    "evaluate/backends/heads.py": "a softmax over what the model gives, in a form that every backend shares",
    "evaluate/backends/interface.py": "the types of what a backend says",
    "evaluate/tally.py": "counts for the display",
    "evaluate/predictions.py": "the file of predictions, written and read",
    "atlas/prompt.py": "the question in words, for every way of asking",
    "evaluate/groups.py": "which rows are no independent evidence; only the intervals ask",
    "evaluate/calibration.py": "what the probabilities of predictions are worth",
    "evaluate/judge/scores.py": "verdicts on free-form answers, where a judge was asked",
    "evaluate/unmapped.py": "a report of the answers that mean no label",
    "evaluate/runs.py": "a run folder, read back",
    "train/ranks.py": "which micro-batches this process runs; of one process all of them",
    "evaluate/score.py": "reads predictions, calls the metrics, writes metrics.json",
    "evaluate/answers.py": "the text of a prediction",
}
DATA = (Row, Sample, Encoded, Batch, Prediction)


def walk(title):
    """The files of a walk in the document, in its order."""
    section = TOUR.read_text().split(f"## {title}")[1].split("\n## ")[0]
    return re.findall(r"(?m)^\d+\. `([\w/]+\.py)`", section)


def is_data(value):
    if isinstance(value, (list, tuple)) and not isinstance(value, DATA):
        return any(isinstance(item, DATA) for item in value[:4])
    return isinstance(value, DATA)


class Trace:
    """Which files of hba are entered, in which order from the first call of `driver`, and which handle data."""

    def __init__(self, driver):
        self.driver = driver
        self.entered = []
        self.handlers = {}

    def __call__(self, frame, event, arg):
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(str(SOURCE)):
            return
        file = Path(frame.f_code.co_filename).relative_to(SOURCE).as_posix()
        code = frame.f_code
        if (self.entered or code.co_name == self.driver) and file not in self.entered:
            self.entered.append(file)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = [frame.f_locals.get(name) for name in names] if event == "call" else [arg]
        if any(map(is_data, values)):
            self.handlers.setdefault(file, set()).add(code.co_name)

    def of(self, work):
        sys.setprofile(self)
        try:
            work()
        finally:
            sys.setprofile(None)
        return self


@pytest.fixture(scope="module")
def traces(tmp_path_factory, mini_atlas, backbone):
    run = tmp_path_factory.mktemp("tour") / "run"
    changes = [
        *("model.strategy=full", "train.max_steps=1", "train.batch_size=4", "train.validate_every=1"),
        *("encode.num_frames=2", "encode.max_pixels=3136", "validation_split=validation[:4]", "loader.workers=0"),
    ]
    config = load_config(SftConfig, None, [f"atlas={mini_atlas}", f"model.name={backbone}", *changes])

    def train():
        with RunFolder.open(run, config=config, command="train sft", seed=0) as folder:
            train_sft(config, folder)

    def predict():
        options = load_config(PredictConfig, None, ["loader.workers=0"])
        said = predict_run(
            str(run), run, atlas=str(mini_atlas), split="test", config=options, progress=lambda tally: None
        )
        assert said.predicted
        score_run(run, resamples=100)

    # In this order: the prediction needs the checkpoint.
    training = Trace("run_training").of(train)
    return {"One training step": training, "One sample, from disk to metric": Trace("predict").of(predict)}


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_is_short_and_names_files_that_are_there(title):
    files = walk(title)
    assert 3 <= len(files) <= MOST_FILES
    assert len(set(files)) == len(files)
    assert [file for file in files if not (SOURCE / file).is_file()] == []


@pytest.mark.parametrize("title", WALKS)
def test_the_files_of_a_walk_are_entered_in_its_order(traces, title):
    named, entered = walk(title), traces[title].entered
    assert entered, f"{WALKS[title]} was never called"
    if title == "One training step":
        stage, *named = named  # the stage starts the loop, which then calls it back for the loss
        assert stage in entered
    assert [file for file in entered if file in named] == named


@pytest.mark.parametrize("title", WALKS)
def test_no_other_file_handles_samples_or_batches(traces, title):
    # What one walk names needs no second place in the other: predictions take the loader's batches, training validates.
    known = {*SUPPORT, *(file for other in WALKS for file in walk(other))}
    others = {file: names for file, names in traces[title].handlers.items() if file not in known}
    assert others == {}, "name these files in docs/tour.md, or add them to SUPPORT with the reason"


def test_the_trace_sees_what_it_should(traces):
    """A trace that saw nothing would pass every test above."""
    handlers = traces["One training step"].handlers
    assert {"encode", "collate"} <= handlers["atlas/batch.py"]
    assert "forward" in handlers["model/omni.py"]
    assert len(traces["One sample, from disk to metric"].handlers) >= 6


def test_where_things_lie_is_there():
    """Every place in the table of the tour is there, and every folder of the package is in it."""
    places = re.findall(r"(?m)^\| `src/hba/([\w./]+)`", TOUR.read_text())
    assert [place for place in places if not (SOURCE / place).exists()] == []
    folders = {f"{path.name}/" for path in SOURCE.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders - set(places) == set()
