"""`hba train rl` against a real vLLM server, in the environment whose Python HBA_VLLM names (`make test-vllm`).

vLLM's attention on a CPU wants heads of 32 at least, hence a backbone of its own.
"""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager

import pytest
import torch
from accelerate import Accelerator
from real_vllm import CPU, VLLM
from rl_run import arguments, as_prompts, die_in, logged, train, write_reward

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import collate, encoder_for
from hba.batch.prompt import FormatMix
from hba.config import load_config
from hba.errors import HbaError
from hba.model import OmniSapiens
from hba.rl import local
from hba.rl.config import RlConfig
from hba.rl.rollout import Draws, PolicySampler, probabilities, roll_out
from hba.rl.server import ServerSampler
from hba.train.ranks import Ranks

START_SECONDS = 300
FULL = {"VLLM_SERVER_DEV_MODE": "1"}
LORA = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}

pytestmark = pytest.mark.skipif(VLLM is None, reason="no vLLM here: make test-vllm")


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return write_reward(tmp_path_factory.mktemp("reward"))


@contextmanager
def serving(model, log, environment, *options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "32"]
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), *given, *options]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as handle:
        started = [*command, "--logprobs-mode", "processed_logprobs"]
        process = subprocess.Popen(started, env=own | CPU | environment, stdout=handle, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url, process, log):
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise TimeoutError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def full(served, tmp_path_factory):
    with serving(served, tmp_path_factory.mktemp("full") / "log", FULL) as url:
        yield url


@pytest.fixture(scope="module")
def lora(served, tmp_path_factory):
    log = tmp_path_factory.mktemp("lora") / "log"
    with serving(served, log, FULL | LORA, "--enable-lora", "--max-lora-rank", "8") as url:
        yield url


def told(atlas, model, reward, url, *changes):
    server = ["rollout.sampler=server", f"remote.base_url={url}", "remote.max_attempts=2"]
    return arguments(atlas, model, reward, *server, "rollout.max_new_tokens=12", *changes)


def from_server(*what):
    return load_config(RlConfig, None, told(*what))


def test_answers_and_probabilities_are_those_of_the_policy(served, full, mini_atlas, tmp_path):
    policy, wording = OmniSapiens.from_pretrained(served, dtype="float32", heads=False).eval(), FormatMix(("think",))
    atlas = open_atlas(mini_atlas, split="train")
    encode = EncodeConfig(num_frames=4, max_pixels=12544)
    encoder = encoder_for(policy.processor, encode, atlas.taxonomy, wording=wording)
    kinds = {sample.modality_signature: sample for sample in atlas}
    assert len(kinds) == 3
    encoded = [encoder.encode(sample) for sample in [*kinds.values(), *(atlas[i] for i in range(6))]]
    batch = collate([each for each in encoded for _ in range(2)], pad_token_id=encoder.pad_token_id)
    single = collate(encoded, pad_token_id=encoder.pad_token_id)
    given = ["atlas=a", "model.strategy=full", "model.dtype=float32", "rollout.sampler=server"]
    config = load_config(RlConfig, None, [*given, f"remote.base_url={full}"])
    greedy, sampled = Draws("test", 16, 0.0), Draws("test", 16, 0.7)
    with closing(ServerSampler(config, policy, encoder, Ranks(Accelerator(cpu=True)), tmp_path)) as there:
        there.renew(0)
        (said,) = roll_out(there, policy, [as_prompts(single)], greedy)
        drawn, again = (roll_out(there, policy, [as_prompts(batch)], sampled)[0] for _ in range(2))
    (here,) = roll_out(PolicySampler(policy), policy, [as_prompts(single)], greedy)
    assert said.texts == here.texts and said.lengths == here.lengths
    assert drawn.texts == again.texts and drawn.texts[0] != drawn.texts[1]
    with torch.no_grad():
        found = probabilities(policy, policy, drawn.batch, 0.7)
    torch.testing.assert_close(found.logps_BL, drawn.sampler_logps_BL, atol=5e-5, rtol=0)


def test_whole_weights_are_renewed_and_a_killed_run_goes_on(served, full, launch, mini_atlas, reward, tmp_path):
    what = (mini_atlas, served, reward, full)
    die_in(launch, torch.optim.AdamW, "step", "after", tmp_path / "run", told(*what))
    assert train(tmp_path / "run", from_server(*what)).step == 4
    records = logged(tmp_path / "run", "rl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["sampler_gap"] < 1e-5 for record in records)
    assert len({record["entropy"] for record in records}) == 4
    assert not (tmp_path / "run" / "served").exists()


def test_adapters_are_renewed(served, lora, launch, mini_atlas, reward, tmp_path):
    changes = ["model.strategy=lora", "model.lora_r=4", "train.learning_rate=2e-2", "loss.importance_cap=2"]
    what = (mini_atlas, served, reward, lora, *changes, "algorithm=harpo", "train.max_steps=3")
    die_in(launch, local, "roll_out", "after", tmp_path / "run", told(*what))
    assert train(tmp_path / "run", from_server(*what)).step == 3
    records = logged(tmp_path / "run", "rl")
    assert all(record["sampler_gap"] < 1e-5 for record in records) and len(records) == 3
    assert all(record["importance"] == pytest.approx(1, abs=1e-4) for record in records)


def test_a_server_that_takes_no_weights_is_one_error(served, full, lora, mini_atlas, reward, tmp_path):
    adapters = from_server(mini_atlas, served, reward, full, "model.strategy=lora", "model.lora_r=4")
    with pytest.raises(HbaError, match=r"did not take the weights.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        train(tmp_path / "adapters", adapters)
    with pytest.raises(HbaError, match=r"did not take the weights.*without --enable-lora"):
        train(tmp_path / "whole", from_server(mini_atlas, served, reward, lora))
