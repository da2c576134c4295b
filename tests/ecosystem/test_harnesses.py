"""Exports to lmms-eval and Inspect: what is written, that it scores as hba does, and each run in the installed harness.

The harnesses' own environments are made by `make harnesses`; without one its tests are skipped and say so.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from hba.atlas import open_atlas
from hba.atlas.convert import convert_atlas
from hba.errors import InputError
from hba.evaluate.answers import read
from hba.evaluate.metrics import mean_of, score
from hba.export.harnesses import (
    doc_to_messages,
    doc_to_text,
    doc_to_visual,
    export_inspect,
    export_lmms_eval,
    read_answer,
    task_score,
    write_documents,
)
from hba.export.wandb_table import tables_of

HERE = Path(__file__).parent
HARNESSES = Path(os.environ.get("HBA_HARNESSES", HERE.parents[1] / ".harnesses"))
ROWS = 60
TASKS = ("EMO", "SOC", "SEN")


def scripted(sample_id: str, target: str) -> str:
    """As tiny_chat.py has it, which imports torch."""
    number = int(sample_id.split("/")[-1])
    return ["no label at all", "anger", "neutral"][number % 3] if number % 4 == 0 else f"\\boxed{{{target}}}"


@pytest.fixture(scope="module")
def exported(mini_atlas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    export_lmms_eval(str(mini_atlas), f"test[:{ROWS}]", folder / "lmms")
    export_inspect(str(mini_atlas), f"test[:{ROWS}]", folder / "inspect")
    return folder


def expected(atlas: Path, tasks: tuple[str, ...]) -> dict[str, float]:
    """The scores of the scripted answers by hba's own path."""
    rows = list(open_atlas(atlas, split=f"test[:{ROWS}]"))
    texts = [scripted(s.id, s.target) for s in rows]
    readings = [read(text, s.dataset, prompt=s.problem) for s, text in zip(rows, texts, strict=True)]
    labels = [each.answer if s.label is None else each.label for s, each in zip(rows, readings, strict=True)]
    found = score(labels, [s.target for s in rows], [s.dataset for s in rows])
    free = {"SOC": {"score": mean_of([found["datasets"]["siq2"]["exact_match"]])}}
    return {task: (found["tasks"] | free)[task]["score"] for task in tasks}


def documents(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows" / f"{task}.jsonl").read_text().splitlines()]


def test_every_row_is_exported_once_with_its_media_in_order(mini_atlas: Path, exported: Path) -> None:
    atlas = open_atlas(mini_atlas, split=f"test[:{ROWS}]")
    tasks = [path.stem for path in (exported / "lmms" / "rows").iterdir()]
    found = {d["id"]: d for task in tasks for d in documents(exported / "lmms", task)}
    assert set(found) == {sample.id for sample in atlas}
    for sample in atlas:
        parts = found[sample.id]["parts"]
        kinds = [part["type"] for part in parts]
        assert (kinds.count("video"), kinds.count("audio"), kinds.count("image")) == (
            sample.videos,
            sample.audios,
            sample.images,
        )
        assert all(Path(part["path"]).is_file() for part in parts if part["type"] != "text")
        assert found[sample.id]["target"] == sample.target


def test_the_scores_are_those_of_hba(mini_atlas: Path, exported: Path) -> None:
    for task, value in expected(mini_atlas, TASKS).items():
        rows = [read_answer(d, scripted(d["id"], d["target"])) for d in documents(exported / "lmms", task)]
        assert task_score(rows) == pytest.approx(value)


def test_lmms_eval_files_name_functions_that_are_there(exported: Path) -> None:
    class Loader(yaml.SafeLoader):
        pass

    functions: list[str] = []
    Loader.add_constructor("!function", lambda loader, node: functions.append(node.value) or node.value)
    group = yaml.load((exported / "lmms" / "hba.yaml").read_text(), Loader)
    for name in group["task"]:
        config = yaml.load((exported / "lmms" / f"{name}.yaml").read_text(), Loader)
        assert config["task"] == name and Path(config["dataset_kwargs"]["data_files"]["test"]).is_file()
    written = (exported / "lmms" / "utils.py").read_text()
    assert {name.removeprefix("utils.") for name in functions} <= set(written.replace(",", "").split())
    document = next(d for d in documents(exported / "lmms", "EMO") if len(d["parts"]) > 1)
    media = [part for part in document["parts"] if part["type"] != "text"]
    assert len(doc_to_visual(document)) == len(media)
    content = doc_to_messages(document)[0]["content"]
    assert [item["type"] for item in content] == [part["type"] for part in document["parts"]]
    assert doc_to_text(document) == "".join(item["text"] for item in content if item["type"] == "text")


def test_an_atlas_in_shards_is_refused_with_the_way_out(mini_atlas: Path, tmp_path: Path) -> None:
    convert_atlas(mini_atlas, tmp_path / "shards", to="parquet", splits=["validation"])
    with pytest.raises(InputError, match=r"media in shards.*hba atlas convert"):
        write_documents(str(tmp_path / "shards"), "validation", tmp_path / "out")


def scored_run(folder: Path) -> Path:
    metrics = {
        "tasks": {
            "EMO": {"score": 0.8, "metric": "mean_weighted_accuracy", "ci95": [0.7, 0.9], "n": 40, "chance": 0.5},
            "SOC": {"score": None, "metric": "llm_judge_accuracy", "ci95": None, "n": 4},
        },
        "datasets": {"tess": {"macro_f1": 0.7, "n": 40, "chance": None}},
        "aggregate": {"mean": {"score": 0.8, "ci95": [0.7, 0.9]}, "n": 44},
        "provenance": {"synthetic": True, "model": "tiny", "split": "test"},
    }
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_tables_for_wandb_hold_the_figures_and_leave_out_none(tmp_path: Path) -> None:
    tables = tables_of(scored_run(tmp_path / "run"))
    rows = {row[0]: dict(zip(tables["tasks"].columns, row, strict=True)) for row in tables["tasks"].rows}
    assert rows["EMO"]["score"] == 0.8 and (rows["EMO"]["low"], rows["EMO"]["high"]) == (0.7, 0.9)
    assert rows["SOC"]["score"] is None and rows["mean"]["score"] == 0.8
    assert ("tess", "macro_f1", 0.7) in tables["datasets"].rows


@pytest.mark.slow
def test_the_installed_wandb_takes_the_tables_offline(tmp_path: Path) -> None:
    python = HARNESSES / "lmms-eval" / "bin" / "python"  # which brings wandb
    if not python.is_file():
        pytest.skip("no environment of lmms-eval: run `make harnesses`")
    run_folder = scored_run(tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src"), "HOME": str(tmp_path)}
    command = [python, "-m", "hba", "export", "wandb", run_folder, "--project", "atlas", "--offline", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (table,) = run_folder.glob("wandb/offline-run-*/files/media/table/tasks_*.table.json")
    logged = json.loads(table.read_text())
    assert logged["columns"][0] == "task" and logged["data"][0][3] == 0.8 and logged["data"][1][3] is None


def run(harness: str, script: str, export: Path, model: str, tasks: list[str], home: Path) -> dict:
    python = HARNESSES / harness / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no environment of {harness}: run `make harnesses`")
    paths = os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [python, HERE / script, export, model, *tasks]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harness", "script", "folder"),
    [("lmms-eval", "run_lmms_eval.py", "lmms"), ("inspect-ai", "run_inspect.py", "inspect")],
)
def test_the_installed_harness_gives_hbas_scores_and_runs_a_tiny_model(
    harness: str, script: str, folder: str, mini_atlas: Path, exported: Path, backbone: Path, tmp_path: Path
) -> None:
    names = [f"hba_{task.lower()}" for task in TASKS]
    found = run(harness, script, exported / folder, "scripted", names, tmp_path)
    metrics = {"EMO": "mean_weighted_accuracy", "SOC": "exact_match", "SEN": "binary_weighted_f1"}
    for task, value in expected(mini_atlas, TASKS).items():
        assert found[f"hba_{task.lower()}"][metrics[task]] == pytest.approx(value)
    said = run(harness, script, exported / folder, str(backbone), ["hba_anx"], tmp_path)
    assert 0 <= said["hba_anx"]["weighted_f1"] <= 1 and 0 <= said["hba_anx"]["invalid"] <= 1


def test_words_that_hold_other_ends_of_lines_are_exported(tmp_path: Path) -> None:
    """A line of JSONL ends with a newline alone: not with U+2028 and the like, which stand in words as they are."""
    row = {"problem": "Is it\u2028a joke?\x85", "answer": "true", "dataset": "mmsd", "task": "sarcasm_cls"}
    row |= {"class_label": "sarcasm", "modality_signature": "text"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert export_inspect(str(tmp_path), "test", tmp_path / "out") == {"SAR": 1}
