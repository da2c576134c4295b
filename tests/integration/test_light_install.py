"""The wheel, unpacked in another folder and run without torch: what works there, and what says what to install.

A `sitecustomize` bars the imports of the extra `train` in every process, workers included. Both tests run one process.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.main import get_command

from hba.atlas.pt import write_arrays
from hba.cli import app
from hba.environment import EXTRAS

ROOT = Path(__file__).resolve().parents[2]

BARRED = """
import sys

class Barred:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Barred())
"""

# Runs commands in one process: their exit codes, and what they wrote on standard error.
DRIVER = """
import contextlib, io, json, sys
import hba
from hba.cli import main

told = []
for words in json.load(sys.stdin):
    sys.argv, err = ["hba", *words], io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as stop:
        told.append([words, stop.code or 0, err.getvalue()])
print(json.dumps({"file": hba.__file__, "version": hba.__version__, "told": told, "loaded": sorted(sys.modules)}))
"""

EXPLORED = """
import json, sys
from pathlib import Path
from starlette.testclient import TestClient
from hba.explorer.media import curves, landmarks
from hba.explorer.server import create_app

atlas, runs, cache = map(Path, sys.argv[1:])
app = create_app(atlas=atlas, runs=runs, cache_folder=cache)
with TestClient(app, base_url="http://127.0.0.1") as client:
    pages = {page: client.get(page).status_code for page in ("/", "/static/explorer.css", "/runs")}
pose = next(atlas.rglob("pose/**/*.pt"))
heard = next(atlas.rglob("opensmile/**/*.pt"))
frames = landmarks(pose, "pose")["frames"]
drawn = [[name, shape] for name, shape, values in curves(heard, "heard")]
print(json.dumps({"pages": pages, "parts": sorted(frames), "drawn": drawn}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Folder of the unpacked wheel, with the hook that bars torch beside it."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(out), str(source)], check=True)
    (built,) = out.glob("*.whl")
    zipfile.ZipFile(built).extractall(out / "unpacked")
    (out / "unpacked" / "sitecustomize.py").write_text(f"NAMES = {[*EXTRAS['train'], 'scipy']!r}{BARRED}")
    return out / "unpacked"


def run(wheel, folder, code, *arguments, **options):
    env = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1", "HBA_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_torch_an_atlas_is_opened_validated_asked_judged_scored_and_shown(
    wheel, tmp_path, mini_atlas, chat_server
):
    server, judge = chat_server(), chat_server("judge")
    shutil.copytree(mini_atlas, tmp_path / "atlas")
    few = ["--per-dataset", "1", "encode.num_frames=2"]
    asked = ["m", "--backend", "openai", "--base-url", server.url, "--judge", "j", "--judge-url", judge.url, *few]
    commands = [
        ["--help"],
        ["atlas", "info", "atlas"],
        ["atlas", "validate", "atlas", "--workers", "2"],
        ["eval", *asked, "--atlas", "atlas", "--run", "runs/m"],
        ["predict", "majority", "--atlas", "atlas", "--run", "runs/majority"],
        ["score", "runs/majority", "--resamples", "100"],
        ["leaderboard", "runs/m", "runs/majority", "--out", "board.html", "--allow-other-data"],
        ["bundle", "runs/majority", "majority.zip"],
        ["verify", "majority.zip"],
        ["ask", "m", "atlas/README.md", "--backend", "openai", "--base-url", server.url, "--task", "EMO"],
        ["doctor"],
    ]
    found = run(wheel, tmp_path, DRIVER, input=json.dumps(commands))
    assert Path(found["file"]).is_relative_to(wheel) and re.match(r"\d+\.\d+", found["version"])
    # README.md is no medium: `ask` says so, having come that far without torch.
    assert [(words[0], code) for words, code, _ in found["told"]] == [
        (words[0], 2 if words[0] == "ask" else 0) for words in commands
    ], [err for *_, err in found["told"]]
    assert not {name.partition(".")[0] for name in found["loaded"]} & set(EXTRAS["train"])
    assert (tmp_path / "runs" / "m" / "report.html").is_file() and (tmp_path / "board.html").is_file()
    explored = run(wheel, tmp_path, EXPLORED, tmp_path / "atlas", tmp_path / "runs", tmp_path / "index")
    assert set(explored["pages"].values()) == {200}
    assert explored["parts"] == ["face", "left_hand", "pose", "right_hand"] and explored["drawn"]


NEEDING = """
train sft | train lm | train rl | train qa | train bam --all | transfer | fit x --gpu 24 | merge a b
push a b --license x | tiny t --atlas atlas | demo | ask runs/x clip.mp4 | ask x clip.mp4 --backend hf
predict some/model --atlas atlas --run r | predict x --atlas atlas --run r --backend vllm | eval x --atlas atlas
atlas prepare atlas | atlas describe atlas | serve x
"""
# With a service, a baseline, or no model at all.
DOING_WITHOUT = """
atlas info | atlas validate | atlas mini | atlas build | atlas convert | atlas download | ask | eval | predict | score
judge | report | compare | leaderboard | bundle | verify | explore | export lmms-eval | export inspect | export wandb
doctor
"""


def words_of(listed):
    return [words.split() for words in listed.replace("\n", "|").split("|") if words.strip()]


def test_of_every_command_it_is_decided_whether_it_needs_torch():
    def names(command, before=()):
        inner = getattr(command, "commands", None)
        return [name for key, each in (inner or {}).items() for name in names(each, (*before, key))] or [before]

    told = {tuple(words) for words in words_of(DOING_WITHOUT)}
    told |= {tuple(words)[:depth] for words in words_of(NEEDING) for depth in (1, 2)}
    assert [name for name in names(get_command(app)) if name not in told] == []


def test_a_command_that_needs_torch_says_in_one_sentence_what_to_install(wheel, tmp_path):
    commands = words_of(NEEDING)
    found = run(wheel, tmp_path, DRIVER, input=json.dumps(commands))
    for words, code, err in found["told"]:
        line = r"error: .*needs torch, which is not installed\. Fix: pip install 'human-behavior-atlas\[train\]'.*\.\n"
        assert (code, bool(re.fullmatch(line, err))) == (2, True), (words, code, err)
    assert len(found["told"]) == len(commands) and not [path for path in tmp_path.iterdir() if path.name != "cache"]


# --- files of torch.save, read without it -----------------------------------------------------------------------------

READ = """
import json, sys
from pathlib import Path
from hba.atlas.media import load_descriptor
from hba.errors import HbaError

found = {}
for path in map(Path, sys.argv[1:]):
    try:
        loaded = load_descriptor(path, where=path.name)
        parts = loaded if isinstance(loaded, dict) else {"": loaded}
        found[path.name] = {name: [a.dtype.name, list(a.shape), a.ravel().tolist()] for name, a in parts.items()}
    except HbaError as error:
        found[path.name] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""


def test_what_torch_saved_is_read_without_it(wheel, tmp_path):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    base = torch.rand(4, 6, generator=generator)
    good = {
        "plain.pt": base,
        "parts.pt": {"pose": base[1:, ::2], "face": base.T, "one": torch.tensor(3.0)},
        "kinds.pt": {str(kind): (base * 9).to(kind) for kind in (torch.float16, torch.bfloat16, torch.float64)},
        "whole.pt": {str(kind): (base * 9).to(kind) for kind in (torch.uint8, torch.int16, torch.int64)},
        "trained.pt": torch.nn.Parameter(base),
        "repeated.pt": base[:1].expand(5, 6),
    }
    for name, value in good.items():
        torch.save(value, tmp_path / name)
    save_file({"a": base, "b": base.bfloat16()}, tmp_path / "a.safetensors")
    good["a.safetensors"] = {"a": base, "b": base.bfloat16()}
    bad = {
        "nan.pt": (torch.tensor([1.0, float("nan")]), "MediaError", "NaN"),
        "empty.pt": (torch.zeros(0, 3), "MediaError", "empty"),
        "list.pt": ({"pose": [1, 2]}, "MediaError", "found list"),
        "none.pt": ({}, "MediaError", "found dict"),
        "huge.pt": (torch.zeros(1).expand(1 << 40), "MediaError", "claims shape"),
        "sparse.pt": (torch.eye(3).to_sparse(), "InputError", r"torch alone reads.*\[train\]"),
        "truth.pt": (torch.ones(2, dtype=torch.bool), "MediaError", "torch.bool"),
        "code.pt": (Path("a"), "MediaError", "not a plain file of tensors"),
    }
    for name, (value, *_) in bad.items():
        torch.save(value, tmp_path / name)
    torch.save(base, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[:-40])
    (tmp_path / "reaching.pt").write_bytes(_reaching())
    (tmp_path / "noise.pt").write_bytes(b"\xff" * 64)
    found = run(wheel, tmp_path, READ, *sorted(path for path in tmp_path.iterdir() if path.suffix != ".json"))
    for name, value in good.items():
        parts = value if isinstance(value, dict) else {"": value}
        for part, tensor in parts.items():
            dtype, shape, numbers = found[name][part]
            expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            assert (dtype, shape) == (str(expected.dtype).removeprefix("torch."), list(tensor.shape)), (name, part)
            assert numbers == expected.detach().reshape(-1).tolist(), (name, part)
    expected = {name: kind for name, (_, *kind) in bad.items()}
    expected["old.pt"] = ["InputError", r"before torch 1\.6, which torch alone reads"]
    expected |= {name: ["MediaError", "damaged"] for name in ("cut.pt", "reaching.pt", "noise.pt")}
    for name, (kind, message) in expected.items():
        assert found[name][0] == kind and re.search(message, found[name][1]), (name, found[name])


def _reaching():
    """A tensor that claims more numbers than its storage has."""
    whole = write_arrays({"a": np.ones(4, np.float32)})
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["archive/data/0"] = parts["archive/data/0"][:8]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return target.getvalue()


def test_what_is_written_without_torch_torch_reads():
    rng = np.random.default_rng(0)
    for kind in (np.float32, np.float16, np.float64, np.int64, np.uint8):
        arrays = {"pose": (rng.random((7, 33, 3)) * 9).astype(kind), "face": (rng.random((7, 4)) * 9).astype(kind)}
        written = write_arrays(arrays)
        assert written == write_arrays(arrays)
        loaded = torch.load(io.BytesIO(written), weights_only=True)
        assert list(loaded) == list(arrays)
        for name, tensor in loaded.items():
            assert tensor.numpy().dtype == kind and np.array_equal(tensor.numpy(), arrays[name])
    with pytest.raises(ValueError, match="no storage of complex"):
        write_arrays({"a": np.ones(1, np.complex64)})
