"""The plug-ins for verl as far as they need no verl: rows, order, prompts and the policy are the local engine's."""

import asyncio
import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from hba.atlas.answer_format import FormatMix
from hba.atlas.chat_encoder import encoder_for
from hba.config import load_config, to_yaml
from hba.errors import ConfigError, InputError, MediaError
from hba.model import chat
from hba.model.generate import media_token_ids
from hba.rl.config import RlConfig
from hba.rl.prompts import PromptFeed
from hba.rl.rollout import probabilities, with_responses
from hba.rl.rows import training_rows, validation_rows
from hba.rl.verl.config import AGENT
from hba.rl.verl.dataset import AtlasDataset, PlanSampler
from hba.rl.verl.evaluation import records, verdict
from hba.rl.verl.launch import _release, place_of
from hba.rl.verl.processor import OmniProcessor
from hba.rl.verl.rows import Reference
from hba.rl.verl.thinker import NEVER, OmniForConditionalGeneration

SETTINGS = [
    *("model.strategy=full", "model.dtype=float32", "train.epochs=2", "train.batch_size=3", "train.accumulation=2"),
    *("rollout.per_prompt=2", "rollout.max_new_tokens=6", "encode.num_frames=2", "encode.max_pixels=3136"),
    *("validation_rows=6", "loader.workers=0", "verl.gpus_per_node=1"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, mini_atlas, backbone):
    """A run folder as `hba train rl --engine verl` begins one, its config, dataset and processor."""
    path = tmp_path_factory.mktemp("verl")
    config = load_config(RlConfig, None, [f"atlas={mini_atlas}", f"model.name={backbone}", *SETTINGS])
    (path / "config.yaml").write_text(to_yaml(config))
    place = place_of(config, path)
    _release(config, place)
    policy = chat.load(backbone, dtype="float32").eval()
    whole = AutoConfig.from_pretrained(place.model)
    processor = OmniProcessor(policy.processor, whole)
    whole.hba_media_token_ids = processor.media_token_ids
    data_config = SimpleNamespace(hba_run=str(path))
    dataset = AtlasDataset("training", policy.processor.tokenizer, data_config, processor)
    return SimpleNamespace(
        path=path, config=config, place=place, dataset=dataset, processor=processor, policy=policy, whole=whole,
        data_config=data_config,
    )  # fmt: skip


def as_verl_calls(run, row):
    """What verl's prompt builder does with a row: template, then the processor with what the dataset decoded."""
    messages = run.dataset[row]["raw_prompt"]
    found = asyncio.run(AtlasDataset.process_multi_modal_info(messages, 14, run.data_config))
    images, videos, audios = found
    frames, metadata = zip(*videos, strict=True) if videos else ((), ())
    text = run.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pixels = {"min_pixels": run.config.encode.min_pixels, "max_pixels": run.config.encode.max_pixels}
    return run.processor([text], images, frames, audios, video_metadata=metadata, sampling_rate=16000, **pixels)


def first_of_each_signature(run):
    return list({sample.modality_signature: i for i, sample in enumerate(run.dataset.atlas)}.values())


def test_rows_hold_references_and_what_rewards_and_advantages_need(run):
    row, sample = run.dataset[1], run.dataset.atlas[1]
    assert (row["task"], row["dataset"], row["sample_id"], row["agent_name"]) == (
        sample.task, sample.dataset, sample.id, AGENT,
    )  # fmt: skip
    assert row["reward_model"]["ground_truth"] == sample.target
    assert len(repr(row)) < 3000  # of every one there are as many copies as rollouts
    for number in range(len(run.dataset)):
        for item in run.dataset[number]["raw_prompt"][0]["content"]:
            if item["type"] != "text":
                assert Reference.parse(item[item["type"]]) == Reference("training", number)


@pytest.mark.parametrize("text", ["file:///etc/passwd", "hba:training/-1", "hba:test/1"])
def test_nothing_else_is_a_reference(text):
    with pytest.raises(InputError, match="not a reference"):
        Reference.parse(text)


def test_what_cannot_be_read_is_named_once_in_the_runs_quarantine(run, tmp_path, mini_atlas):
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    lines = [json.loads(line) for line in (atlas / "train.jsonl").read_text().splitlines()]
    number = next(i for i, line in enumerate(lines) if line["audios"] and not line["videos"])
    (medium,) = lines[number]["audios"]
    (atlas / medium).write_bytes(b"RIFF")
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(RlConfig, run.path / "config.yaml", [f"atlas={atlas}"])))
    config = SimpleNamespace(hba_run=str(tmp_path))
    messages = AtlasDataset("training", None, config)[number]["raw_prompt"]
    for _ in range(3):  # the rollouts of a prompt
        with pytest.raises(MediaError):
            asyncio.run(AtlasDataset.process_multi_modal_info(messages, 14, config))
    (record,) = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert (record["id"], record["split"], record["field"]) == (f"train/{number + 1}", "train", "audios")


def test_an_evaluation_has_both_responses_to_each_row_in_the_local_engines_form(run):
    validation = AtlasDataset("validation", None, run.data_config)
    rows = validation_rows(run.config)
    asked = [validation[i] for i in range(len(validation))]
    assert [(row["index"], row["way"]) for row in asked] == list(itertools.product(range(6), ("sampled", "greedy")))
    assert {run.dataset[i]["way"] for i in range(len(run.dataset))} == {"sampled"}
    answered = []
    for row in asked:  # right where it is greedy
        sample = rows[row["index"]]
        text = f"<think>So.</think> \\boxed{{{sample.target}}}" if row["way"] == "greedy" else "no"
        parts = {"score": float(len(text)), "tokens": 3.0}
        answered.append({**parts, **verdict(sample, text, row["index"], row["way"], rows.taxonomy)})
    lost = answered.pop(4)  # the sampled response to the third row
    columns = {name: [each[name] for each in answered] for name in lost} | {"reward": [0.0] * len(answered)}
    found = records(rows, columns, draws=1)
    assert [record["number"] for record in found] == sorted(rows[i].number for i in range(6) if i != 2)
    for record in found:
        assert record.keys() == {"id", "task", "dataset", "number", "sampled", "greedy"}
        assert record["sampled"].keys() == {"score", "tokens", "right", "format"}
        assert (record["greedy"]["right"], record["greedy"]["format"], record["sampled"]["format"]) == (1, 1, 0)


def test_several_draws_of_a_row_stand_next_to_each_other_and_become_one_mean(run, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(replace(run.config, validation_draws=3)))
    validation = AtlasDataset("validation", None, SimpleNamespace(hba_run=str(tmp_path)))
    rows, asked = validation.atlas, [validation[i] for i in range(len(validation))]
    expected = list(itertools.product(range(6), ("sampled", "sampled", "sampled", "greedy")))
    assert [(row["index"], row["way"]) for row in asked] == expected
    answered = []
    for i, row in enumerate(asked):
        parts = {"score": np.float64(i % 4), "tokens": 5.0 + i}
        answered.append({**parts, **verdict(rows[row["index"]], "nothing", row["index"], row["way"], rows.taxonomy)})
    lost = answered.pop(9)  # one of the sampled responses to the third row
    columns = {name: [each[name] for each in answered[::-1]] for name in lost}  # in any order
    found = {record["id"]: record for record in records(rows, columns, draws=3)}
    assert found.keys() == {rows[i].id for i in range(6) if i != 2}
    for i in (0, 1, 3, 4, 5):
        record = json.loads(json.dumps(found[rows[i].id]))
        assert record["sampled"] == {"score": 1.0, "tokens": 6.0 + 4 * i, "right": 0.0, "format": 0.0}
        assert (record["greedy"]["score"], record["greedy"]["tokens"]) == (3.0, 8.0 + 4 * i)


def test_responses_to_a_prompt_share_its_decoded_media(run):
    """Also those that ask while the first still decodes."""
    number = next(i for i, sample in enumerate(run.dataset.atlas) if sample.videos)
    messages = run.dataset[number]["raw_prompt"]

    async def all_at_once():
        asked = [AtlasDataset.process_multi_modal_info(messages, 14, run.data_config) for _ in range(8)]
        return await asyncio.gather(*asked)

    assert len({videos[0][0].data_ptr() for _, videos, _ in asyncio.run(all_at_once())}) == 1


def test_prompts_and_features_are_the_local_engines(run):
    encoder = encoder_for(run.policy.processor, run.config.encode, run.dataset.atlas.taxonomy,
                          wording=FormatMix((run.config.format,)))  # fmt: skip
    for row in first_of_each_signature(run):
        features, encoded = as_verl_calls(run, row), encoder.encode(run.dataset.atlas[row])
        assert features["input_ids"][0].tolist() == encoded.input_ids_T.tolist()
        for name, tensor in encoded.media.items():
            torch.testing.assert_close(features[name], tensor, rtol=0, atol=0)
        if encoded.mels:
            mask = features["feature_attention_mask"].bool()
            mels = [mel[:, kept] for mel, kept in zip(features["input_features"], mask, strict=True)]
            torch.testing.assert_close(mels, list(encoded.mels), rtol=0, atol=0)


def test_the_order_is_the_plans_and_a_resumed_loader_goes_on_in_it(run):
    config = run.config
    sampler = PlanSampler(run.dataset.atlas, config)
    order = list(sampler)
    assert len(order) == len(sampler)
    local = PromptFeed(
        run.dataset.atlas, encoder_for(run.policy.processor, config.encode, run.dataset.atlas.taxonomy), config.mix,
        config.train, config.loader, replicates=1, rank=0, world=1,
    )  # fmt: skip
    full = [rows for rows in local._replicated if len(rows) == config.train.batch_size]
    expected = list(itertools.chain.from_iterable(map(list, full)))
    assert order == expected[: len(order)]
    assert len(expected) - len(order) < 2 * config.train.batch_size
    codes = run.dataset.atlas.columns.signature_codes
    for start in range(0, len(order), config.train.batch_size):
        assert len(set(codes[order[start : start + config.train.batch_size]])) == 1
    assert list(PlanSampler(training_rows(config), config)) == order
    assert place_of(config, run.path).steps == len(order) // (config.train.batch_size * config.train.accumulation)


def test_batches_larger_than_any_modality_are_refused(run):
    config = load_config(RlConfig, run.path / "config.yaml", ["train.batch_size=4000"])
    with pytest.raises(ConfigError, match="4000 rows"):
        PlanSampler(run.dataset.atlas, config)


def test_one_placeholder_a_medium_reaches_the_sampling_engine(run):
    for row in first_of_each_signature(run):
        ids, sample = as_verl_calls(run, row)["input_ids"][0].tolist(), run.dataset.atlas[row]
        sent = run.processor.collapsed(ids)
        assert sent.count(run.processor.audio_token_id) == sample.audios
        assert sent.count(run.processor.video_token_id) == sample.videos
        media = {run.processor.audio_token_id, run.processor.video_token_id}
        assert [t for t in sent if t not in media] == [t for t in ids if t not in media]
    assert len(run.processor.media_token_ids) == 7
    assert run.processor.media_token_ids == media_token_ids(run.whole.thinker_config, run.policy.processor)


def test_weights_are_named_as_in_the_release(run):
    actor = OmniForConditionalGeneration.from_pretrained(run.place.model, config=run.whole, dtype=torch.float32)
    assert all(name.startswith("thinker.") for name in actor.state_dict())
    local = {f"thinker.{name}": tensor for name, tensor in run.policy.transformer.state_dict().items()}
    assert actor.state_dict().keys() == local.keys()
    for name, tensor in actor.state_dict().items():
        torch.testing.assert_close(tensor, local[name], rtol=0, atol=0, msg=name)


def test_probabilities_are_the_local_policys(run):
    """Right-padded rows with positions of verl's form, against the local engine's left-padded batch."""
    actor = OmniForConditionalGeneration.from_pretrained(run.place.model, config=run.whole, dtype=torch.float32).eval()
    encoder = encoder_for(run.policy.processor, run.config.encode, run.dataset.atlas.taxonomy,
                          wording=FormatMix((run.config.format,)))  # fmt: skip
    from hba.atlas.batch import collate

    ids = torch.tensor([5, 9, 300, 41])
    for row in first_of_each_signature(run):
        batch = collate([encoder.encode(run.dataset.atlas[row])], pad_token_id=encoder.pad_token_id)
        batch = with_responses(batch, [ids], encoder.pad_token_id)
        with torch.no_grad():
            local = probabilities(run.policy, run.policy, batch, 1.0).logps_BL[0]
        features = dict(as_verl_calls(run, row))
        tokens = torch.cat([features.pop("input_ids"), ids.unsqueeze(0)], 1)
        mask = torch.ones_like(tokens)
        features.pop("attention_mask")
        grids = {name: features.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        extra = run.processor.get_rope_index_kwargs(features)
        rope, _ = run.processor.get_rope_index(input_ids=tokens, attention_mask=mask, **grids, **extra)
        positions = torch.cat([torch.arange(tokens.shape[1]).view(1, 1, -1), rope])
        with torch.no_grad():
            logits = actor(tokens, mask, positions, **features).logits[0, -len(ids) - 1 : -1]
        assert (logits[:, run.processor.media_token_ids] == NEVER).all()
        found = torch.log_softmax(logits, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        np.testing.assert_allclose(found, local, atol=1e-5)


def test_both_towers_run_whatever_the_media_and_the_language_layers_alone_train(run):
    run.whole.hba_language_layers_alone = True
    actor = OmniForConditionalGeneration.from_pretrained(run.place.model, config=run.whole, dtype=torch.float32)
    run.whole.hba_language_layers_alone = False
    trained = {name for name, parameter in actor.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith(("thinker.model.layers.", "thinker.model.norm.")) for name in trained)
    called = set()
    for tower in ("audio_tower", "visual"):
        getattr(actor.thinker, tower).register_forward_hook(lambda *_, tower=tower, **__: called.add(tower))
    tokens = torch.tensor([[5, 9, 41]])
    positions = torch.arange(3).view(1, 1, 3).expand(4, 1, 3)
    actor(tokens, torch.ones_like(tokens), positions)
    assert called == {"audio_tower", "visual"}
