"""Bad input as its user meets it: exit code 2, one message with file, row and field, and nothing half-written.

Everything goes through the entry point of the command line, in this process where that is possible (a start of torch
costs seconds). `expect` checks what all refusals share.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file, save_file

from hba import open_atlas
from hba.cli import main
from hba.errors import MediaError
from hba.taxonomy import BUILTIN as TAXONOMY

SMALL = [
    "model.strategy=full", "train.max_steps=2", "train.batch_size=4", "train.validate_every=1", "encode.num_frames=2",
    "encode.max_pixels=3136", "loader.workers=0", "validation_split=validation[:12]",
]  # fmt: skip
CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"],
        capture_output=True,
    ).returncode
    == 0
)


def snapshot(folder):
    """Every file below a folder with its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} if folder.exists() else {}


def unfinished(folder):
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".old"))]


def errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture
def expect(hba):
    """Call a command that must be refused, with `message` (a pattern) in its one error; returns standard error."""

    def call(message, *arguments):
        code, out, err = hba(*arguments)
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        (error,) = errors(err)
        assert re.search(message, error), error
        assert "Fix: " in error
        return err

    return call


def sft(run, atlas, backbone, *overrides):
    return ["train", "sft", "--run", run, f"atlas={atlas}", f"model.name={backbone}", *SMALL, *overrides]


@pytest.fixture
def atlas(tmp_path, mini_atlas):
    """A mini-atlas of this test alone; its media are links into the shared one until a test replaces them."""
    copy = tmp_path / "atlas"
    shutil.copytree(mini_atlas, copy, copy_function=os.link)
    for rows in copy.glob("*.jsonl"):
        text = rows.read_bytes()
        rows.unlink()
        rows.write_bytes(text)
    return copy


def replace(path, data):
    path.unlink()
    path.write_bytes(data)


def edit(atlas, number, *, split="train", **changes):
    """Change fields of row `number` (1-based); ... removes one."""
    path = atlas / f"{split}.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[number - 1]) | changes
    lines[number - 1] = json.dumps({key: value for key, value in row.items() if value is not ...})
    path.write_text("\n".join(lines) + "\n")


def rows_with(atlas, name, *, split="train", **fields):
    """Line numbers and rows that have media of a field."""
    lines = map(json.loads, (atlas / f"{split}.jsonl").read_text().splitlines())
    return [
        (number, row)
        for number, row in enumerate(lines, 1)
        if row[name] and all(row[key] == value for key, value in fields.items())
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, mini_atlas, backbone):
    """A finished run of two steps with predictions and scores; tests copy it."""
    run = tmp_path_factory.mktemp("bad") / "run"
    for arguments in (sft(run, mini_atlas, backbone), ["predict", run, "--atlas", mini_atlas, "--split", "test[:16]"]):
        sys.argv = ["hba", *map(str, arguments)]
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
    return run


@pytest.fixture
def run(tmp_path, trained):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    return copy


# --- the atlas -------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "wrong type": ({"answer": 3}, r"train\.jsonl:2: field 'answer': expected str, found int"),
    "no signature": ({"modality_signature": ...}, r"train\.jsonl:2: field 'modality_signature': is missing"),
    "unknown dataset": ({"dataset": "cremadd"}, r"train\.jsonl:2: field 'dataset'.*Did you mean 'cremad'"),
    "unknown label": ({"dataset": "tess", "class_label": "angre"}, r"train\.jsonl:2: field 'class_label'.*'angre'"),
    "absolute path": ({"texts": ["/etc/passwd"]}, r"train\.jsonl:2, texts: path '/etc/passwd' leaves"),
    "parent path": ({"ext_audio_feats": ["../x.pt"]}, r"train\.jsonl:2, ext_audio_feats: path '\.\./x\.pt' leaves"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row(tmp_path, atlas, backbone, expect, name):
    changes, message = BAD_ROWS[name]
    edit(atlas, 2, **changes)
    expect(message, *sft(tmp_path / "runs" / "new", atlas, backbone))
    assert not (tmp_path / "runs").exists()


def test_a_truncated_line(tmp_path, atlas, backbone, expect):
    path = atlas / "validation.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[: -len(lines[-1]) // 2])
    expect(rf"validation\.jsonl:{len(lines)}: not valid JSON.*cut off", *sft(tmp_path / "new", atlas, backbone))
    assert not (tmp_path / "new").exists()


def test_an_empty_and_a_missing_split(tmp_path, atlas, backbone, expect):
    (atlas / "validation.jsonl").write_bytes(b"")
    expect(r"validation\.jsonl: split 'validation' has no rows", *sft(tmp_path / "new", atlas, backbone))
    (atlas / "validation.jsonl").unlink()
    named = r"has no split 'validation'.*Choose one of: test, train.*train_split and validation_split of a training"
    expect(named, *sft(tmp_path / "new", atlas, backbone))
    expect("selects none", *sft(tmp_path / "new", atlas, backbone, "train_split=train[:0]"))
    assert not (tmp_path / "new").exists()


def test_an_atlas_or_a_backbone_that_is_not_there(tmp_path, mini_atlas, backbone, expect):
    new = tmp_path / "new"
    expect("nowhere: no such file or folder", *sft(new, tmp_path / "nowhere", backbone))
    expect("no/such-model: cannot load backbone", *sft(new, mini_atlas, "no/such-model"))
    expect("nowhere: no such file or folder", "tiny", new, "--atlas", tmp_path / "nowhere")
    assert not new.exists()


def test_a_backbone_that_is_not_whole_trains_nothing(tmp_path, mini_atlas, backbone, expect):
    """The flaw: what was missing was drawn at random, and the command ended with 0."""
    folder = Path(shutil.copytree(backbone, tmp_path / "backbone"))
    weights = load_file(folder / "model.safetensors")
    gone = [name for name in weights if "layers.1." in name][:3]
    save_file({name: t for name, t in weights.items() if name not in gone}, folder / "model.safetensors")
    expect(r"3 of the \d+ weights of \w+ are missing", *sft(tmp_path / "new", mini_atlas, folder))
    save_file({f"encoder.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    expect(r"weights are not known to", *sft(tmp_path / "new", mini_atlas, folder))
    assert not (tmp_path / "new").exists()


def test_a_refused_start_keeps_a_folder_that_was_there(tmp_path, backbone, expect):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    expect("no such file or folder", *sft(tmp_path / "mine", tmp_path / "nowhere", backbone))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_link_out_of_the_atlas(tmp_path, atlas, backbone, expect, hba, workers):
    """Seen when the file is opened: the run stops, and goes on once the atlas is mended."""
    number, row = rows_with(atlas, "audios", dataset="tess")[0]
    path = atlas / row["audios"][0]
    path.rename(tmp_path / "outside.wav")
    path.symlink_to(tmp_path / "outside.wav")
    command = sft(tmp_path / "new", atlas, backbone, "datasets=[tess]", f"loader.workers={workers}")
    expect(rf"train\.jsonl:{number}, audios: .* is a link out of", *command)
    assert not unfinished(tmp_path)
    path.unlink()
    (tmp_path / "outside.wav").rename(path)
    assert hba(*command)[0] == 0


# --- media -----------------------------------------------------------------------------------------------------------


def test_a_sound_of_zero_bytes_is_left_out_by_name(tmp_path, atlas, backbone, hba):
    number, row = rows_with(atlas, "audios", dataset="tess")[0]
    replace(atlas / row["audios"][0], b"")
    command = sft(tmp_path / "new", atlas, backbone, "datasets=[tess]", "train.epochs=1", "train.max_steps=null")
    code, out, err = hba(*command, "--json")
    assert (code, json.loads(out)["quarantined"]) == (2, 1)
    named = [line for line in err.splitlines() if line.startswith("quarantined ")]
    assert len(named) == 1
    assert re.search(rf"train\.jsonl:{number}, audios: is empty \(0 bytes\)", named[0])
    (error,) = errors(err)
    assert "1 sample was left out" in error
    assert "--allow-quarantined 1" in error
    code, out, err = hba(*command, "--json", "--allow-quarantined", 1)  # the same run, and accepted
    assert (code, json.loads(out)["quarantined"], errors(err)) == (0, 1, [])


def test_a_clip_cut_in_the_middle_is_left_out_by_name_until_it_is_restored(tmp_path, run, atlas, hba):
    labelled = [
        (number, row)
        for number, row in rows_with(atlas, "videos", split="test")
        if TAXONOMY.dataset(row["dataset"]).domain is not None
    ]
    number, row = labelled[0]
    clip = atlas / row["videos"][0]
    sharing = sum(other["videos"] == row["videos"] for _, other in labelled)
    whole = clip.read_bytes()
    replace(clip, whole[: len(whole) // 2])
    with pytest.raises(av.error.FFmpegError), av.open(str(clip)) as container:
        list(container.decode(video=0))
    command = ["predict", run, "--atlas", atlas, "--run", tmp_path / "new", "--json", "loader.workers=0"]
    code, out, err = hba(*command)
    said = json.loads(out)
    assert (code, said["quarantined"]) == (2, sharing)
    assert re.search(rf"quarantined .*test\.jsonl:{number}, videos: ", err)
    assert "Traceback" not in err
    assert len((tmp_path / "new" / "predictions.jsonl").read_text().splitlines()) == said["predicted"]
    replace(clip, whole)
    code, out, _ = hba(*command)
    again = json.loads(out)
    assert (code, again["quarantined"], again["predicted"]) == (0, 0, said["predicted"] + sharing)


class Exploit:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_descriptor_that_runs_code(tmp_path, atlas, backbone, hba):
    """Stage 1 opens no descriptor, so the run is none the worse; who does open it is refused."""
    number, row = rows_with(atlas, "ext_audio_feats")[0]
    path = atlas / row["ext_audio_feats"][0]
    path.unlink()
    torch.save({"features": Exploit(tmp_path / "ran")}, path)
    assert hba(*sft(tmp_path / "new", atlas, backbone, "train.max_steps=1"))[0] == 0
    sample = open_atlas(atlas, split="train")[number - 1]
    with pytest.raises(MediaError, match=rf"train\.jsonl:{number}, ext_audio_feats: is not a plain file of tensors"):
        sample.load_descriptors("ext_audio_feats")
    assert not (tmp_path / "ran").exists()


def test_no_readable_validation_sample(tmp_path, atlas, backbone, hba):
    for _, row in rows_with(atlas, "audios", split="validation", dataset="tess"):
        replace(atlas / row["audios"][0], b"")
    split = "validation_split=validation"
    code, out, err = hba(*sft(tmp_path / "new", atlas, backbone, "datasets=[tess]", split))
    assert (code, out) == (2, "")
    (error,) = errors(err)
    assert "no sample of split 'validation' can be read" in error
    lines = (tmp_path / "new" / "quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["split"] for line in lines} == {"validation"}
    assert not list((tmp_path / "new" / "checkpoints").glob("*"))


def test_a_step_without_a_readable_sample_is_survived(tmp_path, atlas, backbone, hba):
    for _, row in rows_with(atlas, "audios", dataset="tess"):
        replace(atlas / row["audios"][0], b"")
    all_rows_one_by_one = ["train.batch_size=1", "train.log_every=1", "train.max_steps=null", "train.epochs=1"]
    datasets = ["datasets=[tess,cremad]", "train.validate_every=9"]
    code, _, err = hba(*sft(tmp_path / "new", atlas, backbone, *datasets, *all_rows_one_by_one))
    assert code == 2
    assert "Traceback" not in err
    log = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if line["kind"] == "train"]
    assert steps[-1]["samples_seen"] == len(rows_with(atlas, "audios", dataset="cremad"))
    assert all(line["loss"] > 0 for line in steps)


# --- config and run folder -------------------------------------------------------------------------------------------

BAD_CONFIG = {
    "unknown key": ("train.lerning_rate=1", "unknown key 'train.lerning_rate'.*Did you mean 'train.learning_rate'"),
    "unknown section": ("trian.epochs=1", "unknown key 'trian'.*Did you mean 'train'"),
    "wrong type": ("train.epochs=many", "'train.epochs=many'.*expected a valid integer, found str 'many'"),
    "out of range": ("train.accumulation=0", "'train.accumulation': expected greater than or equal to 1, found int 0"),
    "share": ("train.warmup_share=1.5", "'train.warmup_share': expected less than or equal to 1"),
    "not key=value": ("epochs", "expected key=value"),
    "unknown choice": ("model.strategy=all", "'model.strategy': expected 'heads', 'lora' or 'full'"),
    "unknown dataset": ("datasets=[tes]", "'tes'.*Did you mean 'tess'"),
    "one value for a list": ("datasets=tess", r"expected a list, found str 'tess'.*Write datasets=\[tess\]"),
    "the beginning of a split": ("train_split=val", "no split 'val'.*Did you mean 'validation'"),
}


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_a_bad_config(tmp_path, mini_atlas, backbone, expect, name):
    override, message = BAD_CONFIG[name]
    expect(message, *sft(tmp_path / "new", mini_atlas, backbone, override))
    assert not (tmp_path / "new").exists()


def test_a_model_that_is_not_there(tmp_path, mini_atlas, monkeypatch, expect):
    """A path below a folder that exists is no hub id, and nothing is looked up on the hub."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    missing = "error: runs/nope: no such folder. Fix: Give a run folder, a checkpoint, .* or a hub id such as"
    for train in (["sft"], ["lm"], ["rl", "--config", "rl_tiny"]):
        expect(missing, "train", *train, f"atlas={mini_atlas}", "model.name=runs/nope")
    expect(missing, "train", "qa", "--from", "runs/nope", f"atlas={mini_atlas}")
    expect(missing, "train", "bam", "--all", "--from", "runs/nope", f"atlas={mini_atlas}")
    for more in ([], ["--run", "runs/new"], ["--run", "runs/new", "--backend", "hf"]):
        expect(missing, "predict", "runs/nope", "--atlas", mini_atlas, *more)
    expect(missing, "merge", "runs/nope", "runs/new")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_bad_config_file(tmp_path, expect):
    file = tmp_path / "my.yaml"
    file.write_text("train:\n  epochs: 3\n  lerning_rate: 1\n")
    expect(rf"{file}:3: unknown key 'train.lerning_rate'", "train", "sft", "--config", file, "atlas=x")
    expect("no config file or recipe 'sft_tini'.*'sft_tiny'", "train", "sft", "--config", "sft_tini")
    file.write_text("atlas: x\nencode:\n  modalities: audio\n")
    expect(rf"{file}:3: key 'encode.modalities'.*Write modalities: \[audio\]", "train", "sft", "--config", file)
    expect("required key 'atlas' is missing", "train", "sft", "--run", tmp_path / "new")
    expect("unknown key 'batch'.*'batch_size'", "predict", tmp_path, "--atlas", "x", "batch=1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.yaml"]


def test_a_run_folder_of_another_config(run, mini_atlas, backbone, expect):
    before = snapshot(run)
    expect("another config: train.batch_size was 4, is 8", *sft(run, mini_atlas, backbone, "train.batch_size=8"))
    assert snapshot(run) == before


def test_a_training_says_at_the_start_where_it_writes(tmp_path, mini_atlas, backbone, hba, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [part for part in sft("--", mini_atlas, backbone) if part not in ("--run", "--")]
    for state in ("new", "goes on with the run in it"):
        code, _, err = hba(*command)
        assert (code, err.splitlines()[0]) == (0, f"Run folder: runs/sft ({state}; --run chooses another).")


def test_a_tiny_backbone_is_written_over_nothing(tmp_path, run, mini_atlas, hba, expect):
    (tmp_path / "file").write_text("mine")
    for place in (run, tmp_path / "file", tmp_path):
        before = snapshot(place) or place.read_bytes()
        expect("already holds something other than this tiny backbone", "tiny", place, "--atlas", mini_atlas)
        assert (snapshot(place) or place.read_bytes()) == before
    for _ in range(2):  # the same one again is no loss
        code, _, err = hba("tiny", tmp_path / "new", "--atlas", mini_atlas)
        assert code == 0, err
    expect("already holds", "tiny", tmp_path / "new", "--atlas", mini_atlas, "--seed", 1)
    assert unfinished(tmp_path) == []


def test_a_run_folder_that_is_a_file(tmp_path, mini_atlas, backbone, expect):
    (tmp_path / "file").write_text("mine")
    expect("the run folder is a file", *sft(tmp_path / "file", mini_atlas, backbone))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_demo_of_another_seed_or_with_a_foreign_key(tmp_path, mini_atlas, expect):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "atlas").symlink_to(mini_atlas)
    demo = ["demo", "--run", tmp_path / "demo", "--size", "tiny"]
    expect("already holds something other than the mini-atlas of size tiny, seed 1", *demo, "--seed", 1)
    expect("the demo itself sets atlas", *demo, "atlas=elsewhere")
    expect("unknown size 'huge'", "demo", "--run", tmp_path / "other", "--size", "huge")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["atlas"]
    assert not (tmp_path / "other").exists()


# --- predictions, scores, report -------------------------------------------------------------------------------------


def test_predictions_of_another_split_or_model(run, mini_atlas, expect, tmp_path):
    before = snapshot(run)
    to = ["--atlas", mini_atlas, "--run", run, "--split"]
    expect("holds predictions with another split, data", "predict", run, *to, "validation")
    expect("holds predictions with another split, data", "predict", run, *to, "test[:8]")
    best = json.loads((run / "checkpoints" / "best.json").read_text())["step"]
    other = tmp_path / "step_9"
    shutil.copytree(run / "checkpoints" / f"step_{best}", other)
    heads = {name: tensor + 1 for name, tensor in load_file(other / "heads.safetensors").items()}
    save_file(heads, other / "heads.safetensors")
    expect("holds predictions with another model", "predict", other, *to, "test[:16]")
    assert snapshot(run) == before


def test_a_run_and_an_atlas_that_were_moved_are_the_same(run, atlas, hba):
    known = (run / "predictions.jsonl").read_text()
    code, out, _ = hba("predict", run, "--atlas", atlas, "--split", "test[:16]", "--json")
    assert (code, json.loads(out)["predicted"]) == (0, known.count("\n")) and known
    assert (run / "predictions.jsonl").read_text() == known


def test_a_model_that_cannot_predict(tmp_path, run, backbone, mini_atlas, expect):
    to = ["--atlas", mini_atlas, "--run", tmp_path / "new"]
    expect("backbone without trained heads", "predict", backbone, *to)
    expect("no run folder of a training", "predict", backbone, "--atlas", mini_atlas)
    shutil.rmtree(run / "checkpoints")
    expect("no checkpoint here", "predict", run, *to)
    assert not (tmp_path / "new").exists()


def test_predicting_what_is_not_there(run, tmp_path, expect):
    before = snapshot(run)
    expect("nowhere: no such file or folder", "predict", run, "--atlas", tmp_path / "nowhere")
    assert snapshot(run) == before


def test_a_quarantine_that_is_torn_or_none(run, mini_atlas, hba):
    command = ["predict", run, "--atlas", mini_atlas, "--split", "test[:16]"]
    quarantine = run / "quarantine.jsonl"
    quarantine.write_text('{"id": "test/1", "spl')
    assert hba(*command)[0] == 0
    assert quarantine.read_text() == ""
    quarantine.write_text('{"id": "test/1"}\n')
    code, _, err = hba(*command)
    assert code == 2
    assert re.search(r"quarantine\.jsonl:1, split: expected a text", errors(err)[0])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r'"label": "[^"]*"', '"label": "joyfull"', r"predictions\.jsonl:3, label: unknown label 'joyfull'"),
        (r'"latency_s": [\d.]+', '"latency_s": NaN', r"predictions\.jsonl:3: not valid JSON"),
        (r'"probs": \{"[^"]*": [\d.e-]+', '"probs": {"anger": NaN', r"predictions\.jsonl:3: not valid JSON"),
        (r'"dataset": "[^"]*", ', "", r"predictions\.jsonl:3, dataset: .*missing"),
        (r'"target": "[^"]*"', '"target": 4', r"predictions\.jsonl:3, target: Expected `str`, got `int`"),
    ],
)
def test_a_bad_prediction(run, hba, expect, old, new, message):
    assert hba("score", run)[0] == 0
    path = run / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[2], count = re.subn(old, new, lines[2], count=1)
    assert count == 1
    path.write_text("".join(lines))
    before = snapshot(run)
    expect(message, "score", run)
    expect(message, "report", run)
    assert snapshot(run) == before


def test_nothing_to_score_and_nothing_to_report(tmp_path, run, expect):
    expect("no metrics.json in the run folder.*Run `hba score` on it first", "report", run)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "config.yaml").write_text("{}")
    expect("Run `hba predict`, then `hba score`", "report", tmp_path / "trained")
    expect("no such run folder", "report", tmp_path / "nowhere")
    (run / "predictions.jsonl").write_text("")
    expect(r"predictions\.jsonl: no prediction to score", "score", run)
    (run / "predictions.jsonl").unlink()
    expect(r"predictions\.jsonl: no such file.*hba predict", "score", run)
    assert not (run / "metrics.json").exists()
    assert not (run / "report.html").exists()


def test_a_report_that_cannot_be_written_there(run, hba, expect):
    assert hba("score", run)[0] == 0
    (run / "taken").mkdir()
    expect("taken: Is a directory", "report", run, "--out", run / "taken")
    assert not unfinished(run)


# --- a full disk -----------------------------------------------------------------------------------------------------


def command_line(arguments):
    return [sys.executable, "-m", "hba", *map(str, arguments)]


def check_full(done, run):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = errors(done.stderr)
    assert re.search(r"checkpoints/step_\d+: no space left on the disk; nothing was half-written.*Fix: ", error)
    assert not unfinished(run)


def test_a_checkpoint_beyond_the_file_size_limit(tmp_path, mini_atlas, backbone, hba):
    """The first write that fails is that of safetensors; the same command goes on once there is space."""
    run = tmp_path / "run"
    arguments = sft(run, mini_atlas, backbone, "datasets=[tess]")
    code = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (400_000, 400_000)); from hba.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    check_full(subprocess.run(command, capture_output=True, text=True, timeout=900), run)
    assert not list((run / "checkpoints").iterdir())
    assert hba(*arguments)[0] == 0


@pytest.mark.skipif(not CAN_MOUNT, reason="this system does not let a user mount a file system of their own")
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path, trained, mini_atlas, backbone):
    """A file system with room for one checkpoint and a half: the second fails, the first stands and can be loaded."""
    step = trained / "checkpoints" / "step_2"
    size = sum(path.stat().st_size for path in step.rglob("*"))
    disk = tmp_path / "disk"
    disk.mkdir()
    # The trained run's first checkpoint is put there, so that the run resumes at step 2 and fails at step 3.
    arguments = sft(disk / "run", mini_atlas, backbone, "train.max_steps=4")
    script = f"""
        set -e
        mount -t tmpfs -o size={int(1.6 * size)} none '{disk}'
        mkdir -p '{disk}/run/checkpoints'
        cp -r '{step}' '{disk}/run/checkpoints/step_2'
        set +e
        {" ".join(f"'{part}'" for part in command_line(arguments))}
        code=$?
        cp -r '{disk}/run' '{tmp_path}/kept'
        exit $code
    """
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    check_full(subprocess.run(unshare, capture_output=True, text=True, timeout=900), tmp_path / "kept")
    kept = tmp_path / "kept" / "checkpoints"
    assert [path.name for path in kept.iterdir() if path.is_dir()] == ["step_2"]
    whole, old = (load_file(Path(folder) / "model.safetensors") for folder in (kept / "step_2", step))
    assert all(torch.equal(whole[name], old[name]) for name in old)


@pytest.mark.parametrize(
    "command",
    [("ask", "random", "words.txt"), ("atlas", "validate", "gone"), ("atlas", "build", "gone", "out")]
    + [("predict", "random", "--atlas", "gone", "--run", "run"), ("atlas", "info", "gone", "--durations")],
)  # fmt: skip
def test_a_command_that_is_refused_leaves_no_bar(hba, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("Well.")
    code, out, err = hba(*command)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
