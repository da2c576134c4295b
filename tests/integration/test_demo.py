"""The demo end to end at size tiny: what it leaves, that a second call repeats nothing, that a seed decides it all."""

import copy
import io
import json
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from hba.cli import main
from hba.cli.demo import run_demo
from hba.errors import ConfigError
from hba.report.comparison import read_stages, stages_table

FEW_STEPS = ["train.max_steps=12", "train.validate_every=3", "train.batch_size=8", "encode.num_frames=4"]
FEW_STEPS += ["qa.train.max_steps=4", "bam.train.max_steps=8", "speak.train.max_steps=2", "rl.train.max_steps=1"]
FEW_STEPS += ["speak.validation_split=validation[:8]", "rl.validation_rows=8", "rl.rollout.max_new_tokens=4"]
STAGES = ("sft", "qa", "bam")
TASKS = {"SEN", "EMO", "HUM", "SAR", "ANX", "DEP", "PTSD"}


def without_times(metrics):
    metrics = copy.deepcopy(metrics)
    assert metrics["provenance"].pop("created_at")
    return metrics


@pytest.fixture(scope="module")
def demo(tmp_path_factory, mini_atlas):
    """A demo folder and its result; the mini-atlas is the shared one, which the demo finds and keeps."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    shutil.copytree(mini_atlas, folder / "atlas")
    return folder, run_demo(folder, size="tiny", seed=0, overrides=FEW_STEPS)


class References(HTMLParser):
    """Every address that a page would load or link to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "poster", "srcset", "action")]


def test_the_demo_leaves_every_file_of_the_contract(demo):
    folder, result = demo
    assert result.report == folder / "bam" / "report.html"
    expected = {
        *("config.yaml", "environment.json", "log.jsonl", "checkpoints", "tensorboard"),
        *("predictions.jsonl", "predict.json", "metrics.json", "report.html"),
    }
    for run in STAGES:
        there = {path.name for path in (folder / run).iterdir()} - {".lock", "quarantine.jsonl", "taxonomy.yaml"}
        assert there == expected | ({"stages.json"} if run == "bam" else set()), run
    assert result.quarantined == []
    predicted = {f"predict {run}" for run in STAGES}
    rl = {"speak", "rl grpo", "rl harpo"}
    assert set(result.seconds) == {"mini-atlas", "backbone", *STAGES, *predicted, "score", "compare", "report", *rl}
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_metrics_are_as_the_contract_says(demo):
    folder, result = demo
    metrics = json.loads((folder / "bam" / "metrics.json").read_text())
    assert metrics == result.metrics.record()
    assert set(metrics) >= {"tasks", "datasets", "aggregate", "provenance"}
    scored = {key: task for key, task in metrics["tasks"].items() if task["score"] is not None}
    assert set(scored) >= TASKS
    for task in scored.values():
        low, high = task["ci95"]
        assert 0 <= low <= task["score"] <= high <= 1
        assert 0 <= task["chance"] <= 1
        assert task["n"] > 0
        assert task["n_quarantined"] == 0
    said = metrics["provenance"]
    assert said["synthetic"] is True
    assert (said["seed"], said["split"], said["model"]) == (0, "test", "bam")
    lines = (folder / "bam" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == metrics["aggregate"]["n"]


def test_the_report_needs_nothing_but_itself(demo):
    page = demo[1].report.read_text()
    references = References()
    references.feed(page)
    assert references.found
    assert [address[:60] for address in references.found if not address.startswith(("data:", "#"))] == []
    assert not re.search(r"<script|@import|url\((?!['\"]?(data:|#))", page)
    assert "synthetic" in page.lower()


def test_a_second_call_trains_and_predicts_nothing(demo):
    folder, first = demo
    files = [folder / run / name for run in STAGES for name in ("log.jsonl", "predictions.jsonl")]
    files += sorted((folder / "features").rglob("*.safetensors"))
    before = [(file.read_bytes(), file.stat().st_ino) for file in files]
    again = run_demo(folder, size="tiny", seed=0, overrides=FEW_STEPS)
    assert without_times(again.metrics.record()) == without_times(first.metrics.record())
    assert [(file.read_bytes(), file.stat().st_ino) for file in files] == before


def test_each_stage_is_compared_with_the_one_before(demo):
    folder, result = demo
    found = result.stages
    assert found.names == STAGES
    assert read_stages(folder / "bam") == found
    for name, (_, qa, _) in found.rows.items():
        assert qa.same or name in ("SOC (exact match)", "INT (exact match)", "NVC (exact match)"), "heads stay alone"
    shown = Console(width=120, record=True, file=io.StringIO())
    shown.print(stages_table(found))
    text, page = shown.export_text(), result.report.read_text()
    assert re.search(r"SEN +[\d.]+ +[\d.]+ += ", text)
    assert re.search(r"sft +qa +difference +bam +difference", text)
    assert "Stage by stage" in page and "SOC (exact match)" in page


def test_two_algorithms_start_from_the_model_that_speaks_and_say_what_they_changed(demo):
    folder, result = demo
    assert list(result.rl) == ["grpo", "harpo"]
    before = [[change.before for change in changes] for changes in result.rl.values()]
    assert before[0] == before[1], "the same model, prompts and draws"
    for name in result.rl:
        assert {c.name for c in result.rl[name]} >= {"reward, sampled", "format, sampled", "right answers, greedy"}
        assert f"Reinforcement learning: {name}" in (folder / f"rl-{name}" / "report.html").read_text()
        assert (folder / f"rl-{name}" / "checkpoints" / "step_1" / "rl_state.json").is_file()


def test_one_seed_gives_one_result_wherever_it_runs(demo, tmp_path, mini_atlas, monkeypatch, capfd):
    """The second demo runs through the command line, in another folder, named by a relative path."""
    shutil.copytree(mini_atlas, tmp_path / "again" / "atlas")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hba", "demo", *FEW_STEPS, "--run", "again", "--size", "tiny", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    said = json.loads(capfd.readouterr().out)
    assert without_times(said["metrics"]) == without_times(demo[1].metrics.record())
    page = (tmp_path / said["report"]).read_text()
    assert len(page) == pytest.approx(len(demo[1].report.read_text()), rel=0.05)

    def losses(folder):
        lines = [json.loads(line) for run in STAGES for line in (folder / run / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    assert losses(tmp_path / "again") == losses(demo[0])


def test_what_the_demo_sets_cannot_be_overridden(tmp_path):
    for key in ("atlas=x", "model.name=x", "train.seed=1", "qa.base=x", "bam.train.seed=1"):
        with pytest.raises(ConfigError, match="the demo itself sets"):
            run_demo(tmp_path / "new", size="tiny", seed=0, overrides=[key])
    assert not (tmp_path / "new").exists()


def typed(section):
    """The commands of a part of the quickstart that need no model from the hub, in their order."""
    page = Path(__file__).parents[2].joinpath("docs", "quickstart.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page.split(f"\n## {section}\n")[1].split("\n## ")[0], re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [line[1:] for line in lines if not any("/Qwen" in word or word.startswith("Qwen/") for word in line)]


def test_the_quickstart_of_a_clip_and_of_a_folder_can_be_typed(demo, mini_atlas, hba, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/demo").symlink_to(demo[0])
    shutil.copy(next(mini_atlas.rglob("*.mp4")), "clip.mp4")
    sounds = sorted(mini_atlas.rglob("*.wav"))
    for number, label in enumerate(("happy", "sad") * 4):
        Path("recordings", label).mkdir(parents=True, exist_ok=True)
        shutil.copy(sounds[number], f"recordings/{label}/{number}.wav")
    (ask,) = typed("Your clip")
    code, out, err = hba(*ask)
    assert code == 0 and "clip.mp4" in out, err
    folder = typed("Your folder")
    assert [line[0] for line in folder] == ["atlas", "atlas", "tiny", "train", "eval"]
    for line in folder:
        code, out, err = hba(*line)
        assert code == 0, (line, out, err)
    assert "happy" in Path("data/mine/taxonomy.yaml").read_text() and list(Path("runs").rglob("report.html"))
