"""`hba predict --backend vllm` by a real engine, in the environment whose Python HBA_VLLM names (`make test-vllm`)."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from real_vllm import CPU, VLLM

from hba import open_atlas
from hba.evaluate.predictions import read_predictions

pytestmark = pytest.mark.skipif(VLLM is None, reason="no vLLM here: make test-vllm")

ASKED = ["dtype=float32", "generation.max_tokens=8", "generation.format=boxed"]
ASKED += ["encode.num_frames=4", "encode.max_pixels=12544"]
LONG = 4000  # words
TOKENS = 2048


@pytest.fixture(scope="module")
def atlas(tmp_path_factory, mini_atlas):
    """37 rows of the mini-atlas; one is too long for the engine, one has two videos of different frame rates."""
    folder = tmp_path_factory.mktemp("atlas") / "atlas"
    shutil.copytree(mini_atlas, folder)
    rows = [json.loads(line) for line in (mini_atlas / "test.jsonl").read_text().splitlines()][:37]
    rows[3]["problem"] += " so" * LONG
    samples = {sample.number: sample for sample in open_atlas(mini_atlas, split="test[:37]")}
    seen = [number for number in samples if rows[number]["videos"] and number != 3]
    spans = {number: round(samples[number].load_videos(4)[0].rate_hz, 3) for number in seen}
    one, other = next((a, b) for a in seen for b in seen if spans[a] != spans[b])
    rows[one]["videos"] = [*rows[one]["videos"], *rows[other]["videos"]]
    rows[one]["problem"] = "<video>" + rows[one]["problem"]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, {samples[3].id, samples[one].id}


def predict(python, model, atlas, run, backend, *more, rank=None):
    """A process of `hba predict`; of two that a launcher starts, the one of number `rank`."""
    command = [python, "-m", "hba", "predict", str(model), "--atlas", str(atlas), "--run", str(run), "--json"]
    command += ["--backend", backend, *ASKED, *more]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or python == sys.executable}
    places = {} if rank is None else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    places |= {} if rank is None else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}
    environment = own | CPU | places
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    """Its exit code, what it answered and what it told."""
    out, err = process.communicate(timeout=900)
    return process.returncode, json.loads(out) if out else None, err


def answers(run):
    return {p.id: p for p in read_predictions(run / "predictions.jsonl")}


def test_what_the_engine_refuses_is_a_failure_of_its_sample(served, atlas, tmp_path):
    folder, bad = atlas
    run = tmp_path / "run"
    engine = [f"vllm.max_model_len={TOKENS}", "vllm.gpu_memory_utilization=0.5"]
    code, said, err = ended(predict(VLLM, served, folder, run, "vllm", *engine))
    assert code == 1 and (said["failed"], said["quarantined"]) == (1, 1), err
    found = answers(run)
    ((failed, long),) = ((name, p) for name, p in found.items() if p.failed)
    assert "vLLM refuses it" in long.error and str(TOKENS) in long.error and len(found) == 36
    (left_out,) = (json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines())
    assert "different frame rates" in left_out["reason"] and {failed, left_out["id"]} == bad
    code, _, err = ended(predict(sys.executable, served, folder, tmp_path / "hf", "hf"))
    assert code in (0, 1, 2), err
    here = answers(tmp_path / "hf")
    assert {name: p.output for name, p in found.items() if not p.failed} == {
        name: p.output for name, p in here.items() if name not in bad
    }
    assert all(p.tokens_in == here[p.id].tokens_in and p.finish == here[p.id].finish
               for p in found.values() if not p.failed)  # fmt: skip


def test_two_processes_serve_an_adapter_beside_its_backbone(served, mini_atlas, tmp_path):
    trained = tmp_path / "lm"
    options = ["model.strategy=lora", "model.lora_r=4", "model.dtype=float32", "train.learning_rate=1e-2"]
    options += ["train.max_steps=6", "train.batch_size=8", "loader.workers=0", "formats=[boxed]"]
    options += ["train_split=train[:48]", "validation_split=validation[:8]", "encode.num_frames=4"]
    command = [sys.executable, "-m", "hba", "train", "lm", "--run", str(trained), f"model.name={served}"]
    subprocess.run([*command, f"atlas={mini_atlas}", "encode.max_pixels=12544", *options], check=True, env=os.environ)
    few = ["--split", "test[:17]"]
    memory = ["vllm.max_model_len=2048", "vllm.gpu_memory_utilization=0.3"]
    one = predict(sys.executable, trained, mini_atlas, tmp_path / "hf", "hf", *few)
    assert ended(one)[0] == 0
    two = [predict(VLLM, trained, mini_atlas, tmp_path / "run", "vllm", *few, *memory, rank=rank) for rank in (0, 1)]
    ends = [ended(process) for process in two]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert [said["merged"] for _, said, _ in ends if said] == [True]
    here, there = answers(tmp_path / "hf"), answers(tmp_path / "run")
    assert {name: p.output for name, p in there.items()} == {name: p.output for name, p in here.items()}
    plain = predict(sys.executable, served, mini_atlas, tmp_path / "plain", "hf", *few)
    assert ended(plain)[0] == 0
    assert len({p.output for p in here.values()}) > 1
    assert {name: p.output for name, p in answers(tmp_path / "plain").items()} != {
        name: p.output for name, p in here.items()
    }
