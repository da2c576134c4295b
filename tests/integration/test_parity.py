"""One model, asked through `hf` and through an OpenAI-compatible server, gives the same answers under greedy decoding.

The server (tests/servers/model_server.py) runs the model through transformers, one request at a time, and knows nothing
of hba's encoder, batches or padding. What this shows: prompt, sound and pictures reach a served model as they reach the
model here.
"""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from hba import open_atlas
from hba.config import load_config
from hba.errors import InputError
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import Selection, predict_run
from hba.evaluate.predictions import read_predictions
from hba.evaluate.score import score_run
from hba.model.tiny import atlas_texts, build_tiny
from hba.taxonomy import BUILTIN

SERVER = Path(__file__).parents[1] / "servers" / "model_server.py"
ENCODE = {"num_frames": 4, "min_pixels": 3136, "max_pixels": 3136}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, mini_atlas):
    """Random weights without near ties: a sound of another rate is rounded to 16 bits on its way to a server."""
    texts = atlas_texts(open_atlas(mini_atlas, split="train"))
    return build_tiny(tmp_path_factory.mktemp("tiny") / "backbone", texts, seed=1)


@pytest.fixture(scope="module")
def served(backbone):
    """The URL of the server over the tiny backbone."""
    options = [text for name, value in ENCODE.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(SERVER), str(backbone), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    port = process.stdout.readline()
    assert port, "the server did not start"
    yield f"http://127.0.0.1:{int(port)}/v1"
    process.kill()
    process.wait()


def run(folder, model, atlas, backend, *overrides):
    settings = [f"encode.{name}={value}" for name, value in ENCODE.items()]
    answers = ["generation.max_tokens=12", "loader.workers=0", "video=file", "remote.max_concurrency=2"]
    config = load_config(PredictConfig, None, [*settings, *answers, *overrides])
    options = {"atlas": str(atlas), "split": "test", "config": config, "progress": lambda tally: None}
    predict_run(str(model), folder, backend=backend, selection=Selection(per_dataset=2), **options)
    return {p.id: p for p in read_predictions(folder / "predictions.jsonl")}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["choice", "grammar"])
def test_bound_to_labels_hf_and_a_server_give_the_same_answers(served, backbone, mini_atlas, tmp_path, form):
    bound = ["generation.constrain=labels", f"generation.constrain_by={form}", "encode.modalities=[]"]
    here = run(tmp_path / "hf", backbone, mini_atlas, "hf", *bound)
    there = run(tmp_path / "openai", "tiny", mini_atlas, "openai", *bound, f"remote.base_url={served}")
    assert here.keys() == there.keys()
    assert {key: p.output for key, p in here.items()} == {key: p.output for key, p in there.items()}
    labelled = [p for p in there.values() if p.target in BUILTIN.class_names]
    assert len(labelled) > 20 and all(p.label is not None for p in labelled)


@pytest.mark.slow
def test_likelihoods_of_labels_are_those_of_hf_where_a_server_tells_those_of_a_prompt(
    served, backbone, mini_atlas, tmp_path
):
    weighed = ["generation.read=likelihood", "encode.modalities=[]"]
    here = run(tmp_path / "hf", backbone, mini_atlas, "hf", *weighed)
    there = run(tmp_path / "openai", "tiny", mini_atlas, "openai", *weighed, f"remote.base_url={served}")
    assert here.keys() == there.keys() and sum(p.probs is not None for p in there.values()) > 20
    for key, mine in here.items():
        assert (there[key].label, there[key].output) == (mine.label, mine.output)
        assert there[key].probs == (None if mine.probs is None else pytest.approx(mine.probs, abs=1e-4))
    httpx.post(f"{served.removesuffix('/v1')}/faults", json={"mute_prompt": True})
    with pytest.raises(InputError, match="gives no log-probabilities of a prompt"):
        run(tmp_path / "mute", "tiny", mini_atlas, "openai", *weighed, f"remote.base_url={served}")
    httpx.post(f"{served.removesuffix('/v1')}/faults", json={})
    with pytest.raises(InputError, match="the google API gives no log-probabilities"):
        run(tmp_path / "google", "tiny", mini_atlas, "google", *weighed, f"remote.base_url={served}")


def test_a_server_is_bound_by_a_schema_and_one_that_is_not_stops_the_run(served, mini_atlas, tmp_path):
    bound = ["generation.constrain=labels", "encode.modalities=[]", f"remote.base_url={served}"]
    there = run(tmp_path / "openai", "tiny", mini_atlas, "openai", *bound, "generation.max_tokens=40")
    assert all(p.rule == "json" for p in there.values() if p.label is not None)
    httpx.post(f"{served.removesuffix('/v1')}/faults", json={"loose": True})
    with pytest.raises(InputError, match=r"does not hold to generation\.constrain_by=choice"):
        run(tmp_path / "loose", "tiny", mini_atlas, "openai", *bound, "generation.constrain_by=choice")
    httpx.post(f"{served.removesuffix('/v1')}/faults", json={})


@pytest.mark.slow
def test_hf_and_a_server_give_the_same_answers(served, backbone, mini_atlas, tmp_path):
    chosen = "generation.format=think"
    here = run(tmp_path / "hf", backbone, mini_atlas, "hf", chosen)
    there = run(tmp_path / "openai", "tiny", mini_atlas, "openai", chosen, f"remote.base_url={served}")
    assert here.keys() == there.keys() and len(here) > 25
    assert [key for key in here if here[key].output != there[key].output] == []
    assert [key for key in here if here[key].tokens_in != there[key].tokens_in] == []
    assert len({p.output for p in here.values()}) > len(here) / 2  # answers that depend on what was asked
    modalities = {p.modality for p in here.values()}
    assert {"text_audio", "text_video_audio"} <= modalities
    scores = [score_run(tmp_path / name, resamples=100).provenance.answers_sha256 for name in ("hf", "openai")]
    assert scores[0] == scores[1]
