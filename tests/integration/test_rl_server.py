"""RL whose responses a server samples: a real one on the loopback, with a real tiny model, that has what vLLM has."""

import base64
import io
import json
import shutil
import subprocess
import sys
import urllib.request
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from accelerate import Accelerator
from rl_run import SMALL, arguments, as_prompts, die_in, logged, result, train, write_reward

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import collate, encoder_for
from hba.batch.prompt import FormatMix
from hba.config import load_config
from hba.errors import ConfigError, HbaError
from hba.model import OmniSapiens
from hba.report.page import write_report
from hba.rl import local
from hba.rl.config import RlConfig
from hba.rl.rollout import Draws, Place, PolicySampler, probabilities, roll_out
from hba.rl.server import ServedWeights, ServerSampler
from hba.train.ranks import Ranks

SERVER = Path(__file__).parents[1] / "servers" / "model_server.py"
PIXELS = ["--num-frames", "2", "--min-pixels", "3136", "--max-pixels", "3136"]
ENCODE = EncodeConfig(num_frames=2, max_pixels=3136)
SECRET = "sk-secret-of-tests"
WORDING = FormatMix(("think",))


@contextmanager
def serving(model):
    """The URL of a server over `model`, a backbone."""
    command = [sys.executable, str(SERVER), str(model), *PIXELS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = process.stdout.readline()
        assert port, "the server did not start"
        yield f"http://127.0.0.1:{int(port)}/v1"
    finally:
        process.kill()
        process.wait()


def post(url, path, value):
    request = urllib.request.Request(url.removesuffix("/v1") + path, json.dumps(value).encode())
    urllib.request.urlopen(request).close()


@contextmanager
def misbehaving(url, **faults):
    """The same URL, while its server has these faults."""
    post(url, "/faults", faults)
    try:
        yield url
    finally:
        with suppress(OSError):  # it may have died of them
            post(url, "/faults", {})


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return write_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def served(backbone):
    with serving(backbone) as url:
        yield url


@pytest.fixture(scope="module")
def prompts(mini_atlas, backbone):
    """A policy, and a batch with two rows for a sample of each signature."""
    policy = OmniSapiens.from_pretrained(backbone, dtype="float32", heads=False).eval()
    atlas = open_atlas(mini_atlas, split="train")
    encoder = encoder_for(policy.processor, ENCODE, atlas.taxonomy, wording=WORDING)
    first = {sample.modality_signature: sample for sample in atlas}
    assert len(first) == 3
    encoded = [encoder.encode(sample) for sample in first.values()]
    batch = collate([each for each in encoded for _ in range(2)], pad_token_id=encoder.pad_token_id)
    return SimpleNamespace(policy=policy, encoder=encoder, batch=batch)


def sampler(url, prompts, run):
    given = ["atlas=a", "model.strategy=full", "model.dtype=float32", "rollout.sampler=server"]
    config = load_config(RlConfig, None, [*given, f"remote.base_url={url}"])
    return closing(ServerSampler(config, prompts.policy, prompts.encoder, Ranks(Accelerator(cpu=True)), run))


def stats(url):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as reply:
        return json.load(reply)


def test_greedy_responses_are_those_of_generate_for_text_sound_and_video(served, prompts, tmp_path):
    greedy = Draws("test", 8, 0.0)
    (here,) = roll_out(PolicySampler(prompts.policy), prompts.policy, [as_prompts(prompts.batch)], greedy)
    with sampler(served, prompts, tmp_path) as there:
        there.renew(0)
        single = collate([prompts.encoder.encode(s) for s in prompts.batch.samples[::2]], pad_token_id=0)
        (said,) = roll_out(there, prompts.policy, [as_prompts(single)], greedy)
    assert said.texts == here.texts[::2] and said.lengths == here.lengths[::2]
    assert len(set(said.texts)) == 3, "answers that depend on what was asked"


def test_what_the_server_says_of_its_samples_is_what_the_policy_says(served, prompts, tmp_path):
    draws = Draws("test", 8, 0.7)
    with sampler(served, prompts, tmp_path) as there:
        there.renew(0)
        said, again = (roll_out(there, prompts.policy, [as_prompts(prompts.batch)], draws)[0] for _ in range(2))
        (other,) = roll_out(there, prompts.policy, [as_prompts(prompts.batch)], draws._replace(name="next"))
    assert said.texts == again.texts != other.texts, "seeded by the name of the draws"
    assert said.texts[0] != said.texts[1], "replicates are drawn apart"
    with torch.no_grad():
        found = probabilities(prompts.policy, prompts.policy, said.batch, 0.7)
    torch.testing.assert_close(found.logps_BL, said.sampler_logps_BL, atol=2e-5, rtol=0)


def test_batches_change_nothing_of_what_is_drawn(served, prompts, tmp_path):
    """Neither their size nor the number of processes that share them."""
    samples = prompts.batch.samples[::2]
    rows = [as_prompts(collate([prompts.encoder.encode(s)] * 2, pad_token_id=0), i) for i, s in enumerate(samples)]
    draws = Draws("test", 4, 1.0)
    with sampler(served, prompts, tmp_path) as there:
        there.renew(0)
        together = there.draw([as_prompts(prompts.batch)], draws)[0].tokens
        apart = [tokens for drawn in there.draw(rows[::-1], draws)[::-1] for tokens in drawn.tokens]
        twice = there.draw([rows[0], as_prompts(rows[0].batch, 9)], draws)
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(twice[0].tokens, twice[1].tokens, strict=True))


def test_several_responses_to_a_row_are_one_request_and_those_to_its_copies(served, prompts, tmp_path):
    single = collate([prompts.encoder.encode(s) for s in prompts.batch.samples[::2]], pad_token_id=0)
    draws = Draws("test", 4, 1.0)
    with sampler(served, prompts, tmp_path) as there:
        there.renew(0)
        (copies,), before = there.draw([as_prompts(prompts.batch)], draws), stats(served)
        (counted,), after = there.draw([as_prompts(single)], draws._replace(per_row=2)), stats(served)
    assert [ids.tolist() for ids in counted.tokens] == [ids.tolist() for ids in copies.tokens]
    assert after["chats"] - before["chats"] == 3


def test_media_arrive_bit_for_bit(prompts, tmp_path):
    sample = next(s for s in prompts.batch.samples if s.videos and s.audios)
    with sampler("http://127.0.0.1:9/v1", prompts, tmp_path) as there:
        request = there.request(sample, Place(0, 0), Draws("test", 8, 1.0), 2)
    parts = [part for message in request.messages for part in message["content"]]
    (sound,) = (part["input_audio"]["data"] for part in parts if part["type"] == "input_audio")
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="float32")
    np.testing.assert_array_equal(heard, sample.load_audios()[0].samples)
    assert rate == 16000
    (clip,) = (part["video_url"]["url"] for part in parts if part["type"] == "video_url")
    kind, *frames = clip.split(",")
    assert kind == "data:video/jpeg;base64"
    shown = [np.array(PIL.Image.open(io.BytesIO(base64.b64decode(frame)))) for frame in frames]
    (video,) = sample.load_videos(2)
    np.testing.assert_array_equal(shown, video.frames)
    assert request.extra["mm_processor_kwargs"]["fps"] == pytest.approx(2 / video.duration_seconds)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"mute": True}, "gives no token ids.*return_token_ids"),
        ({"short": True}, r"a response of 1 tokens ended with 'length'.*max-model-len"),
        ({"deaf": True}, r"sees \d+ tokens of video in the prompt, the policy \d+.*min_pixels"),
    ],
)
def test_replies_on_which_nothing_can_be_trained_are_refused(served, prompts, tmp_path, faults, message):
    large = EncodeConfig(num_frames=2, min_pixels=12544, max_pixels=12544)
    encoder = encoder_for(prompts.policy.processor, large, prompts.encoder.taxonomy, wording=WORDING)
    sample = next(s for s in prompts.batch.samples if s.videos)
    batch = collate([encoder.encode(sample)], pad_token_id=0)
    changed = SimpleNamespace(policy=prompts.policy, encoder=encoder)
    with misbehaving(served, **faults) as url, sampler(url, changed, tmp_path) as there:
        there.renew(0)
        with pytest.raises(HbaError, match=message) as raised:
            there.draw([as_prompts(batch)], Draws("test", 4, 1.0))
    assert sample.id in str(raised.value)


FEW = ["rollout.per_prompt=2", "rollout.max_new_tokens=4", "validation_rows=3", "rollout.sampler=server"]


def told(atlas, model, reward, url, *changes):
    return arguments(atlas, model, reward, *FEW, f"remote.base_url={url}", *changes)


def from_server(*what):
    return load_config(RlConfig, None, told(*what))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, mini_atlas, backbone, reward, served):
    run = tmp_path_factory.mktemp("rl") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVER_KEY", SECRET)
        config = from_server(mini_atlas, backbone, reward, served, "remote.api_key_env=SERVER_KEY")
        assert train(run, config).step == 4
    return run


def test_weights_are_renewed_before_each_step_and_evaluation(straight, served):
    """Five versions (0 to 4); each step's samples have the probabilities of the policy that learns from them."""
    records = logged(straight, "rl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["sampler_gap"] < 1e-5 for record in records)
    assert len({record["entropy"] for record in records}) == 4, "the policy changes"
    assert not (straight / "served").exists(), "what was handed over is removed"


def test_the_report_shows_the_gap(straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    assert "sampler gap" in write_report(run).read_text()


# The phases of a step in which a run with a server may die.
PHASES = [
    (ServedWeights, "write", "after"),
    (torch.optim.AdamW, "step", "after"),
    (local, "save_state", "after"),
]


@pytest.mark.slow
def test_when_the_server_or_the_run_dies_the_run_goes_on_to_the_same_end(
    straight, launch, tmp_path, mini_atlas, backbone, reward, served
):
    run, gone = tmp_path / "run", r"no response to sample \S+: no reply.*run the same command again"
    with serving(backbone) as url, misbehaving(url, busy=1, die=10), pytest.raises(HbaError, match=gone):
        train(run, from_server(mini_atlas, backbone, reward, url, "remote.max_attempts=2"))
    assert logged(run, "evaluation"), "it had begun"
    config = from_server(mini_atlas, backbone, reward, served)  # another port
    for owner, name, when in PHASES:
        die_in(launch, owner, name, when, run, told(mini_atlas, backbone, reward, served))
    assert train(run, config).step == 4
    assert result(run) == result(straight)
    assert not (run / "served").exists()


def test_adapters_are_served_by_version(tmp_path, mini_atlas, backbone, reward, served):
    lora = ["model.strategy=lora", "model.lora_r=4", "algorithm=grpo", "loss.importance_cap=2", "train.max_steps=3"]
    post(served, "/restart", {})
    before = stats(served)["loads"]
    train(tmp_path / "run", from_server(mini_atlas, backbone, reward, served, *lora, "train.learning_rate=2e-2"))
    records = logged(tmp_path / "run", "rl")
    assert stats(served)["loads"] - before == 4, "one for each version"
    assert all(record["sampler_gap"] < 1e-5 for record in records)
    assert all(record["importance"] == pytest.approx(1, abs=1e-5) for record in records)


def test_a_server_that_keeps_its_weights_is_noticed(tmp_path, mini_atlas, backbone, reward, served):
    with misbehaving(served, stale=True):
        with pytest.raises(HbaError, match="still answers with the old weights"):
            train(tmp_path / "full", from_server(mini_atlas, backbone, reward, served))
        post(served, "/restart", {})
        lora = ["model.strategy=lora", "model.lora_r=4", "train.learning_rate=5e-2", "rollout.max_gap=0.01"]
        with pytest.raises(HbaError, match=r"differ by .* nats, more than max_gap=0\.01.*--logprobs-mode"):
            train(tmp_path / "lora", from_server(mini_atlas, backbone, reward, served, *lora))
    assert len(logged(tmp_path / "full", "rl")) == 1, "it had learnt from the weights that the server did have"


def test_what_the_server_denies_to_the_first_process_ends_all_of_them_with_the_reason(
    launch, tmp_path, mini_atlas, backbone, reward, served
):
    post(served, "/restart", {})
    given = [f"atlas={mini_atlas}", f"model.name={backbone}", f"reward.function={reward}:letters", *SMALL, *FEW]
    command = ["train", "rl", "--run", tmp_path / "run", *given, f"remote.base_url={served}"]
    with misbehaving(served, stale=True):
        ended = launch(command, ranks=2)
    post(served, "/restart", {})
    assert ended.code == 1
    assert all("still answers with the old weights" in text for text in ended.err), ended.err


def test_importance_weights_scale_the_gradient(tmp_path, mini_atlas, backbone, reward, served):
    """A sampler that says 0.2 nats more of every token than the policy is corrected by exp(-0.2)."""
    norms = {}
    for cap in (None, 2):
        run = tmp_path / str(cap)
        changes = ["train.max_steps=1", "validation_rows=1", *([] if cap is None else [f"loss.importance_cap={cap}"])]
        with misbehaving(served, shift=0.2):
            train(run, from_server(mini_atlas, backbone, reward, served, *changes))
        (record,) = logged(run, "rl")
        assert record["sampler_gap"] == pytest.approx(0.2, abs=1e-5)
        norms[cap] = record["grad_norm"]
        assert record.get("importance") == (None if cap is None else pytest.approx(0.8187308))
    assert norms[2] / norms[None] == pytest.approx(0.8187308, rel=1e-4)


def test_the_key_reaches_the_server_and_no_file_of_the_run(straight, served):
    assert stats(served)["key"] == f"Bearer {SECRET}"
    files = [path for path in straight.rglob("*") if path.is_file()]
    assert files and not any(SECRET.encode() in path.read_bytes() for path in files)


def test_a_server_and_its_url_are_given_together():
    for given in (["rollout.sampler=server"], ["remote.base_url=http://localhost:8000/v1"]):
        with pytest.raises(ConfigError, match="together"):
            load_config(RlConfig, None, ["atlas=a", *given])
    for old, new in (("url", "remote.base_url"), ("max_gap", "rollout.max_gap"), ("max_attempts", "remote.max_att")):
        with pytest.raises(ConfigError, match=rf"rollout\.server\.{old}' has another name now\. Fix: Write {new}"):
            load_config(RlConfig, None, ["atlas=a", f"rollout.server.{old}=1"])
    with pytest.raises(ConfigError, match="no mismatch to correct"):
        load_config(RlConfig, None, ["atlas=a", "loss.importance_cap=2"])


@pytest.mark.parametrize("key", ["lora_dora=true", "lora_rank_pattern={q_proj: 3}", "quantization=nf4"])
def test_a_policy_that_the_server_would_not_serve_is_refused(key):
    given = ["atlas=a", "model.strategy=lora", f"model.{key}"]
    load_config(RlConfig, None, given)
    with pytest.raises(ConfigError, match="would serve another policy") as told:
        load_config(RlConfig, None, [*given, "rollout.sampler=server", "remote.base_url=http://localhost:8000/v1"])
    assert told.value.where == f"model.{key.partition('=')[0]}"
