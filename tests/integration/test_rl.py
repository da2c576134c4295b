"""The local RL engine on the tiny omni model: rollouts, their probabilities, the loop, and its death in every phase."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rl_run import PHASES, arguments, as_prompts, die_in, logged, result, settings, train, without_times, write_reward
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from hba import open_atlas
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import collate, encoder_for
from hba.batch.prompt import FormatMix
from hba.batch.sampler import MixConfig
from hba.errors import HbaError, InputError, MachineError
from hba.model import OmniSapiens
from hba.model.generate import media_token_ids
from hba.report.page import write_report
from hba.rl import evaluation_log, local, rollout
from hba.rl.prompts import PromptFeed
from hba.rl.rewards import RewardConfig, Scorer
from hba.rl.rollout import Draws, Place, PolicySampler, Prompts, probabilities, roll_out
from hba.run import RunFolder
from hba.storage import read_json, read_jsonl
from hba.train.config import TrainConfig


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return write_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def policy(backbone):
    return OmniSapiens.from_pretrained(backbone, dtype="float32", heads=False).eval()


@pytest.fixture(scope="module")
def encoded(mini_atlas, policy):
    """Samples of every signature, encoded alone."""
    atlas = open_atlas(mini_atlas, split="train")
    config = EncodeConfig(num_frames=2, max_pixels=3136)
    encoder = encoder_for(policy.processor, config, atlas.taxonomy, wording=FormatMix(("think",)))
    first = {sample.modality_signature: sample for sample in atlas}
    assert len(first) == 3
    samples = [encoder.encode(sample) for sample in first.values()]
    return SimpleNamespace(samples=samples, pad=encoder.pad_token_id)


def batch_of(encoded, samples):
    return collate(samples, pad_token_id=encoded.pad)


def test_probabilities_of_the_sampling_are_those_of_the_update(policy, encoded):
    """Cached, left-padded sampling on mixed media equals one teacher-forced pass."""
    prompts = batch_of(encoded, [sample for sample in encoded.samples for _ in range(2)])
    torch.manual_seed(0)
    with torch.inference_mode():
        said = policy.transformer.generate(
            **prompts.inputs, max_new_tokens=8, do_sample=True, top_k=0, top_p=1.0, temperature=0.7,
            suppress_tokens=media_token_ids(policy.transformer.config), output_scores=True,
            return_dict_in_generate=True, pad_token_id=encoded.pad,
        )  # fmt: skip
    drawn_BLV = torch.log_softmax(torch.stack(said.scores, 1), -1)
    ids_BL = said.sequences[:, prompts.inputs["input_ids"].shape[1] :]
    rows = [row[: (row == policy.processor.tokenizer.eos_token_id).int().argmax() + 1 or None] for row in ids_BL]
    rows = [row if len(row) else full for row, full in zip(rows, ids_BL, strict=True)]
    with torch.no_grad():
        found = probabilities(policy, policy, local_batch(prompts, rows, encoded), 0.7)
    for b, row in enumerate(rows):
        drawn = drawn_BLV[b, : len(row)].gather(-1, row.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(found.logps_BL[b, : len(row)], drawn, atol=4e-6, rtol=0)
        assert found.mask_BL[b].sum() == len(row) and not found.logps_BL[b, len(row) :].any()


def local_batch(prompts, rows, encoded):
    from hba.rl.rollout import with_responses

    return with_responses(prompts, rows, encoded.pad)


def test_sounds_with_as_many_frames_as_the_prompts_have_tokens_stay_as_they_are(encoded):
    sounds = next(s for s in encoded.samples if "feature_attention_mask" in batch_of(encoded, [s]).inputs)
    prompts = batch_of(encoded, [sounds, sounds])
    frames_AM = torch.ones_like(prompts.inputs["input_ids"])
    same = replace(prompts, inputs={**prompts.inputs, "feature_attention_mask": frames_AM})
    batch = local_batch(same, [torch.tensor([5, 6]), torch.tensor([5])], encoded)
    assert torch.equal(batch.inputs["feature_attention_mask"], frames_AM)
    assert batch.inputs["input_ids"].shape[1] == frames_AM.shape[1] + 2


def drawn(policy, batch, max_new_tokens, temperature):
    return roll_out(PolicySampler(policy), policy, [as_prompts(batch)], Draws("", max_new_tokens, temperature))[0]


def test_replicated_prompts_are_rolled_out_as_if_alone(policy, encoded):
    """num_return_sequences mixes up video patches; replicated rows do not."""
    replicated = drawn(policy, batch_of(encoded, [s for s in encoded.samples for _ in range(3)]), 6, 1e-4)
    for number, sample in enumerate(encoded.samples):
        alone = drawn(policy, batch_of(encoded, [sample]), 6, 1e-4)
        assert replicated.texts[3 * number : 3 * number + 3] == alone.texts * 3


def test_what_a_row_draws_does_not_depend_on_the_rows_beside_it(policy, encoded):
    """Nor on the number of draws: it is the prompt's place and the number of the draw that decide."""
    together = as_prompts(batch_of(encoded, [s for s in encoded.samples for _ in range(2)]))
    draws, sampler = Draws("run", 8, 1.0), PolicySampler(policy)
    (whole,) = sampler.draw([together], draws)
    alone = [as_prompts(batch_of(encoded, [sample]), number) for number, sample in enumerate(encoded.samples)]
    apart = [ids for each in sampler.draw(alone[::-1], draws._replace(per_row=2))[::-1] for ids in each.tokens]
    assert [ids.tolist() for ids in whole.tokens] == [ids.tolist() for ids in apart]
    assert whole.tokens[0].tolist() != whole.tokens[1].tolist()
    (other,) = sampler.draw([together], draws._replace(name="another"))
    assert [ids.tolist() for ids in other.tokens] != [ids.tolist() for ids in whole.tokens]
    rolled = roll_out(sampler, policy, [together], draws)[0]
    with torch.no_grad():
        found = probabilities(policy, policy, rolled.batch, 1.0)
    torch.testing.assert_close(found.logps_BL, rolled.sampler_logps_BL, atol=4e-6, rtol=0)


def test_a_device_without_room_for_responses_says_what_to_change(policy, encoded, monkeypatch):
    monkeypatch.setattr(OmniSapiens, "say", lambda *_, **__: torch.empty(1 << 56))  # no machine has that
    batch = batch_of(encoded, encoded.samples)
    places = tuple(Place(0, number) for number in range(len(batch)))
    draws = Draws("", 4, 1.0, size_key="validation_batch_size")
    with pytest.raises(MachineError, match="no room for a batch of 3 samples of up to") as told:
        PolicySampler(policy).draw([Prompts(batch, places)], draws)
    assert "a lower validation_batch_size or a lower rollout.max_new_tokens" in told.value.fix


def test_tokens_are_drawn_as_often_as_they_are_probable(policy, encoded):
    """Of 1,200 draws at a temperature, against the model's own distribution."""
    text = next(sample for sample in encoded.samples if not sample.media and not sample.mels)
    with torch.no_grad():
        batch = batch_of(encoded, [text])
        logits = policy.transformer(**batch.inputs, use_cache=False).logits[0, -1].float() / 3.0
    logits[media_token_ids(policy.transformer.config, policy.processor)] = -math.inf
    expected, prompts = torch.softmax(logits, -1), as_prompts(batch_of(encoded, [text] * 150))
    tokens = [
        int(ids[0])
        for number in range(8)
        for ids in PolicySampler(policy).draw([prompts], Draws(str(number), 1, 3.0))[0].tokens
    ]
    likely = expected.argsort(descending=True)
    for share in (0.25, 0.5, 0.75):
        top = likely[: int((expected[likely].cumsum(0) < share).sum()) + 1]
        wanted = float(expected[top].sum())
        found = sum(token in set(top.tolist()) for token in tokens) / len(tokens)
        assert abs(found - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / len(tokens))


def test_media_tokens_have_no_probability(policy, encoded):
    banned = media_token_ids(policy.transformer.config, policy.processor)
    assert len(banned) == 7
    prompts = batch_of(encoded, encoded.samples[:1])
    rows = [torch.tensor([banned[0]])]
    with torch.no_grad():
        assert probabilities(policy, policy, local_batch(prompts, rows, encoded), 1.0).logps_BL.item() == -math.inf
    hot = drawn(policy, batch_of(encoded, encoded.samples * 8), 8, 50.0)
    said = hot.batch.labels_BT[hot.batch.labels_BT >= 0]
    assert not np.isin(said.numpy(), banned).any()


def test_entropy_is_that_of_the_distribution(policy, encoded):
    prompts = batch_of(encoded, encoded.samples[:1])
    batch = local_batch(prompts, [torch.tensor([5, 6])], encoded)
    with torch.no_grad():
        logits = policy(batch).answer_logits_NV
        found = probabilities(policy, policy, batch, 1.0)
    logits[:, media_token_ids(policy.transformer.config, policy.processor)] = -math.inf
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(found.entropy_BL[0], expected, atol=1e-4, rtol=1e-4)


class LargestLogits(TorchDispatchMode):
    """The most values of a tensor over the vocabulary that any operation makes, a transposed weight aside."""

    def __init__(self, vocabulary, hidden):
        super().__init__()
        self.vocabulary, self.hidden, self.most = vocabulary, hidden, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            of_vocabulary = isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.vocabulary
            if of_vocabulary and tensor.shape != (self.hidden, self.vocabulary):
                self.most = max(self.most, tensor.numel())
        return made


def test_distributions_over_the_vocabulary_are_held_for_a_few_tokens_at_a_time(policy, encoded, monkeypatch):
    """Not for all response tokens of a batch; log-probabilities, entropies and gradients stay what they are."""
    prompts = batch_of(encoded, encoded.samples[:1] * 4)
    ids = torch.arange(30).repeat(4, 1) + 5
    batch = local_batch(prompts, list(ids), encoded)
    trained = [p for p in policy.parameters() if p.requires_grad and p.ndim > 1]
    vocabulary, hidden = policy.transformer.get_output_embeddings().weight.shape

    def looked_at():
        with LargestLogits(vocabulary, hidden) as largest:
            found = probabilities(policy, policy, batch, 0.7)
            grads = torch.autograd.grad((found.logps_BL * ids).sum(), trained, allow_unused=True)
        return largest.most, [found.logps_BL, found.entropy_BL, *(grad for grad in grads if grad is not None)]

    whole, expected = looked_at()
    assert whole == 4 * 30 * vocabulary
    monkeypatch.setattr(rollout, "CHUNK_VALUES", 7 * vocabulary)
    most, found = looked_at()
    assert most == 7 * vocabulary
    assert len(found) == len(expected) > 10
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_reader_is_given_the_logits_that_the_model_makes(policy, encoded):
    """Capped and scaled as some models do; an unknown change behind the head is refused."""
    batch = local_batch(batch_of(encoded, encoded.samples[:1]), [torch.tensor([5, 6, 7])], encoded)
    config, head = policy.transformer.config.get_text_config(), policy.transformer.get_output_embeddings()
    capped = OmniSapiens(policy.transformer, policy.processor)

    def forward(*args, **options):
        output = plain(*args, **options)
        output.logits = torch.tanh(output.logits / 3) * 3
        return output

    plain = policy.transformer.forward
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.transformer, "forward", forward)
        with pytest.raises(InputError, match="changes logits behind its language head"):
            capped(batch, lambda states, head: head(states))
        patch.setattr(config, "final_logit_softcapping", 3.0, raising=False)
        read = capped(batch, lambda states, head: head(states))
        torch.testing.assert_close(read.answer_logits_NV, capped(batch).answer_logits_NV)
    assert head is policy.transformer.get_output_embeddings()


def test_task_and_token_lengths_reach_the_harpo_reward(mini_atlas):
    atlas = open_atlas(mini_atlas, split="train")
    free = next(sample for sample in atlas if sample.label is None)
    classed = next(sample for sample in atlas if sample.label is not None)
    scorer = Scorer(RewardConfig(max_response_tokens=20, overlong_buffer_tokens=10), atlas.taxonomy)
    answers = [rf"<think>x</think>\boxed{{{s.target}, I think}}" for s in (free, classed)]
    graded = scorer(answers, [free, classed], [15, 5])
    assert graded[0]["similarity_score"] > 0.7 and graded[0]["overlong_score"] == -0.5
    assert graded[1]["similarity_score"] == 0 and graded[1]["overlong_score"] == 0


@pytest.mark.parametrize(
    ("updates", "limit"), [(1, {"device_batch_size": 2}), (2, {"device_batch_size": 2}), (2, {"device_tokens": 900})]
)
def test_prompts_and_updates_are_the_same_on_any_number_of_processes(policy, mini_atlas, updates, limit):
    """Every prompt has its place in the plan; as many micro-batches on each rank, some of which are empty."""
    atlas = open_atlas(mini_atlas, split="train[:23]")
    encoder = encoder_for(policy.processor, EncodeConfig(num_frames=2, max_pixels=3136), atlas.taxonomy)
    train = TrainConfig(epochs=1, batch_size=5, **limit)
    given = (atlas, encoder, MixConfig(), train, LoaderConfig(workers=0))
    found = {}
    for world in (1, 3, 8):
        feeds = [PromptFeed(*given, replicates=2, rank=r, world=world, updates=updates) for r in range(world)]
        for number in range(len(feeds[0])):
            taken = [feed.take() for feed in feeds]
            assert {len(pieces) for pieces in taken} <= {1, updates}
            for piece, shares in enumerate(zip(*taken, strict=True)):
                assert len({len(share) for share in shares}) == 1
                rows = [
                    row
                    for share in shares
                    for each in share
                    for row in zip(each.places, each.batch.samples, strict=True)
                ]
                names = sorted((place, sample.id) for place, sample in rows)
                assert found.setdefault((number, piece), names) == names
    places = [place for names in found.values() for place, _ in names]
    assert len(places) == 2 * len(set(places)) == 46


@pytest.fixture(scope="module")
def straight(tmp_path_factory, mini_atlas, backbone, reward):
    run = tmp_path_factory.mktemp("rl") / "run"
    progress = train(run, settings(mini_atlas, backbone, reward))
    assert progress.step == 4
    return run


def test_layers_that_are_computed_twice_sample_and_learn_the_same(straight, tmp_path, mini_atlas, backbone, reward):
    config = settings(mini_atlas, backbone, reward, "train.activation_checkpointing=true")
    train(tmp_path / "run", config)
    figures = ("step", "score", "grad_norm", "entropy", "tokens")
    twice, once = ([[line[f] for f in figures] for line in logged(p, "rl")] for p in (tmp_path / "run", straight))
    assert twice == [pytest.approx(line, rel=1e-5) for line in once]


def test_the_log_says_everything_by_task_and_dataset(straight):
    records = logged(straight, "rl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["rollouts"] == sum(task["rollouts"] for task in record["tasks"].values()) <= 18
        for part in (record, *record["tasks"].values(), *record["datasets"].values()):
            assert {"score", "even", "abs_advantage", "tokens", "silent_groups"} <= part.keys()
            assert 0 <= part["silent_groups"] <= 1 and 1 <= part["tokens"] <= 5
        assert record["entropy"] > 1 and record["clipped"] == 0 and record["grad_norm"] > 0
        for task in record["tasks"].values():
            assert task["silent_groups"] == 1 or 0.5 <= task["task_factor"] <= 4
    assert [record["step"] for record in logged(straight, "evaluation")] == [0, 2, 4]


def test_fewer_lines_are_those_of_their_own_steps_and_of_the_evaluated_ones(
    straight, tmp_path, mini_atlas, backbone, reward
):
    config = settings(mini_atlas, backbone, reward, "train.log_every=3")
    train(tmp_path / "run", config)
    few = [without_times(line) for line in logged(tmp_path / "run", "rl")]
    assert few == [without_times(line) for line in logged(straight, "rl") if line["step"] in (2, 3, 4)]


def test_evaluations_stand_beside_chance(straight):
    (first, *_), records = logged(straight, "evaluation"), evaluation_log.read_evaluations(straight)[0]
    assert 0 < first["figures"]["chance"] <= 1
    assert {f"chance/{record['task']}" for record in records} <= first["figures"].keys()
    assert all(record["target"] and isinstance(record["answer"], str) for record in records)


def test_rollouts_can_be_read(straight):
    lines = [line.record for line in read_jsonl(straight / "rollouts.jsonl")]
    assert {line["step"] for line in lines} == {1, 2, 4}
    assert all(line["parts"]["score"] == len(set(line["response"])) / 10 for line in lines)
    first = [line for line in lines if line["step"] == 1]
    assert len(first) == 12 and len({line["task"] for line in first}) > 1, "four prompts, of different tasks"
    for group in {line["group"] for line in first}:
        assert sum(line["advantage"] for line in first if line["group"] == group) == pytest.approx(0, abs=1e-5)


def test_towers_and_embeddings_stay_as_they_were(straight, backbone):
    before = load_file(Path(backbone) / "model.safetensors")
    after = load_file(straight / "checkpoints" / "step_4" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".layers." in name or name.endswith("norm.weight") for name in changed)
    assert not any("tower" in name or "visual" in name or "embed" in name for name in changed)


def test_a_policy_opens_again_and_the_next_stage_may_start_from_it(straight):
    opened = OmniSapiens.from_pretrained(straight, dtype="float32", heads=False)
    assert read_json(straight / "checkpoints" / "best.json")["step"] in (0, 2, 4)
    assert opened.processor.tokenizer.pad_token_id is not None


@pytest.mark.slow
def test_killed_in_every_phase_of_a_step_it_ends_the_same(straight, launch, tmp_path, mini_atlas, backbone, reward):
    run, told = tmp_path / "run", (mini_atlas, backbone, reward)
    for owner, name, when in PHASES:
        die_in(launch, owner, name, when, run, arguments(*told))
    assert train(run, settings(*told)).step == 4
    assert result(run) == result(straight)


def test_harpo_goes_on_with_its_averages(straight):
    state = read_json(straight / "checkpoints" / "step_4" / local.STATE)
    assert state["position"] == 8
    assert state["advantage"]["signal"].keys() == state["advantage"]["log_factor"].keys()
    assert len(state["advantage"]["signal"]) > 1 and any(state["advantage"]["log_factor"].values())


def test_lora_is_kept_near_its_reference_and_several_updates_are_clipped(tmp_path, mini_atlas, backbone, reward):
    changes = ["model.strategy=lora", "model.lora_r=4", "loss.kl_weight=0.1", "loss.updates=2", "algorithm=gspo"]
    config = settings(mini_atlas, backbone, reward, *changes, "train.max_steps=2", "train.learning_rate=2e-2")
    train(tmp_path / "run", config)
    first, second = logged(tmp_path / "run", "rl")
    assert 0 <= first["kl"] < second["kl"] and second["clipped"] > 0
    kept = load_file(tmp_path / "run" / "checkpoints" / "step_2" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in kept.items() if "lora_B" in name)
    with pytest.raises(InputError, match="has no reference to switch to"):
        train(tmp_path / "next", settings(mini_atlas, tmp_path / "run", reward, *changes))


def test_dapo_samples_on_until_there_is_signal(tmp_path, mini_atlas, backbone, reward):
    config = settings(mini_atlas, backbone, reward, "algorithm=dapo", "train.max_steps=1", "rollout.max_new_tokens=1")
    train(tmp_path / "run", config)
    (record,) = logged(tmp_path / "run", "rl")
    position = read_json(tmp_path / "run" / "checkpoints" / "step_1" / local.STATE)["position"]
    informative = record["rollouts"] / 3 * (1 - record["silent_groups"])
    assert 2 < position <= 10 and (informative >= 6 or position == 10)
    assert record["silent_groups"] == 0, "groups without signal weigh nothing, as on verl"
    assert informative <= 6 and record["dropped_groups"] > 0
    assert record["samples_seen"] == informative + record["dropped_groups"]


def test_a_reward_that_is_not_a_number_ends_the_run_with_its_name(tmp_path, mini_atlas, backbone, reward):
    config = settings(mini_atlas, backbone, reward, f"reward.function={reward}:nan")
    with pytest.raises(HbaError, match=r"own.py:nan, sample \S+: reward 'score' is nan"):
        train(tmp_path / "run", config)


def test_a_prompt_that_cannot_be_read_is_quarantined_and_the_run_goes_on(tmp_path, mini_atlas, backbone, reward):
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    clips = sorted(atlas.rglob("*.wav")) + sorted(atlas.rglob("*.mp4"))
    for clip in clips[: len(clips) // 2]:
        clip.write_bytes(b"broken")
    config = settings(atlas, backbone, reward, "train.max_steps=1")
    with RunFolder.open(tmp_path / "run", config=config, command="train rl", seed=0) as run:
        local.train_rl(config, run)
        assert run.quarantine.records()
    (record,) = logged(tmp_path / "run", "rl")
    assert record["rollouts"] % 3 == 0


def test_evaluations_can_be_compared_prompt_by_prompt(straight):
    by_step = evaluation_log.read_evaluations(straight)
    assert list(by_step) == [0, 2, 4]
    assert [r["id"] for r in by_step[0]] == [r["id"] for r in by_step[4]] and len(by_step[0]) == 6
    assert json.loads((straight / "evaluations" / "step_0.jsonl").read_text().splitlines()[0])["greedy"]["score"] >= 0


def test_the_report_shows_curves_changes_and_rollouts_and_escapes_them(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    with (run / "rollouts.jsonl").open("a") as handle:
        line = read_jsonl(straight / "rollouts.jsonl").__iter__().__next__().record
        handle.write(json.dumps({**line, "step": 4, "response": "<script>alert(1)</script>"}) + "\n")
    with (run / "log.jsonl").open("a") as handle:
        handle.write(json.dumps({"step": 4, "kind": "warning", "message": "the reward of x has collapsed"}) + "\n")
    page = write_report(run).read_text()
    for text in ("Reinforcement learning: harpo", "reward, sampled", "right answers, greedy", "HARPO task factor"):
        assert text in page
    assert "1 sampled response and a greedy one to each" in page
    assert "Chance of a right answer: " in page and "share of the most frequent answer" in page
    assert "share of groups without signal" in page and "the reward of x has collapsed" in page
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
