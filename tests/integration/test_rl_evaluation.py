"""Evaluations of the local RL engine: several draws of a row are one record, and the report says how many."""

import io
import json
from collections import defaultdict

import pytest
from accelerate import Accelerator
from rich.console import Console
from rl_run import settings, train, write_reward

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import encoder_for
from hba.batch.prompt import FormatMix
from hba.model import OmniSapiens
from hba.report.page import write_report
from hba.report.rl import changes, changes_table
from hba.rl.config import RolloutConfig
from hba.rl.evaluation import evaluate
from hba.rl.rewards import RewardConfig, Scorer
from hba.rl.rollout import PolicySampler
from hba.run import QuarantineLog
from hba.train.ranks import Ranks


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return write_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def policy(backbone):
    return OmniSapiens.from_pretrained(backbone, dtype="float32", heads=False).eval()


class Kept:
    """A sampler that keeps what it was asked for and what it said, and an encoder that counts what it decodes."""

    def __init__(self, sampler, encoder):
        self.sampler, self.encoder = sampler, encoder
        self.said, self.encoded = [], []

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def draw(self, prompts, draws):
        found = self.sampler.draw(prompts, draws)
        self.said += [(prompts[0].batch.samples, draws, found[0])]
        return found

    def encode(self, sample):
        self.encoded.append(sample.id)
        return self.encoder.encode(sample)


def evaluated(policy, atlas, reward, run, **options):
    config = EncodeConfig(num_frames=2, max_pixels=3136)
    encoder = encoder_for(policy.processor, config, atlas.taxonomy, wording=FormatMix(("think",)))
    kept = Kept(PolicySampler(policy), encoder)
    scorer = Scorer(RewardConfig(function=f"{reward}:letters"), atlas.taxonomy)
    rollout, ranks = RolloutConfig(max_new_tokens=4), Ranks(Accelerator(cpu=True))
    with QuarantineLog(run) as quarantine:
        records = evaluate(kept, policy, atlas, kept, scorer, rollout, ranks, quarantine, **options)
    return records, kept


def test_a_record_is_the_mean_over_the_draws_of_a_row_whose_media_are_decoded_once(
    policy, mini_atlas, reward, tmp_path
):
    atlas = open_atlas(mini_atlas, split="validation")[:7]
    records, kept = evaluated(policy, atlas, reward, tmp_path, draws=3, batch_size=4, seed=5)
    again, _ = evaluated(policy, atlas, reward, tmp_path, draws=3, batch_size=4, seed=5)
    assert json.dumps(records) == json.dumps(again) and len(records) == 7
    assert sorted(kept.encoded) == sorted(sample.id for sample in atlas)
    texts = defaultdict(list)
    for samples, draws, said in kept.said:
        way = "sampled" if draws.temperature else "greedy"
        assert len(said.tokens) == len(samples) * draws.per_row
        for i, ids in enumerate(said.tokens):
            text = policy.processor.tokenizer.decode(ids, skip_special_tokens=True)
            texts[samples[i // draws.per_row].id, way].append((text, len(ids)))
    for record in records:
        assert len(texts[record["id"], "sampled"]) == 3 and len(texts[record["id"], "greedy"]) == 1
        for way in ("sampled", "greedy"):
            said = texts[record["id"], way]
            assert record[way]["score"] == pytest.approx(sum(len(set(text)) / 10 for text, _ in said) / len(said))
            assert record[way]["even"] == pytest.approx(sum(len(text) % 2 for text, _ in said) / len(said))
            assert record[way]["tokens"] == pytest.approx(sum(length for _, length in said) / len(said))
    assert any(len(set(texts[record["id"], "sampled"])) == 3 for record in records)


def test_the_first_of_several_draws_is_the_only_one_of_one(policy, mini_atlas, reward, tmp_path):
    atlas = open_atlas(mini_atlas, split="validation")[:3]
    _, several = evaluated(policy, atlas, reward, tmp_path, draws=2, batch_size=4, seed=5)
    _, single = evaluated(policy, atlas, reward, tmp_path, draws=1, batch_size=4, seed=5)
    (_, _, first), (_, _, only) = several.said[0], single.said[0]
    assert [ids.tolist() for ids in first.tokens[::2]] == [ids.tolist() for ids in only.tokens]


def test_a_run_with_several_draws_says_how_many(tmp_path, mini_atlas, backbone, reward):
    run = tmp_path / "run"
    train(run, settings(mini_atlas, backbone, reward, "validation_draws=3", "train.max_steps=2"))
    found = {change.name: change.draws for change in changes(run)}
    assert found["reward, sampled"] == 3 and found["reward, greedy"] == 1
    assert "3 sampled responses and a greedy one to each" in write_report(run).read_text()
    shown = Console(width=120, record=True, file=io.StringIO())
    shown.print(changes_table({"harpo": changes(run)}))
    assert "the mean of 3 responses to each prompt" in shown.export_text()
