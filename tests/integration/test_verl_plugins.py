"""The plug-ins for verl as far as they need no verl: rows, order, prompts and the policy are the local engine's."""

import asyncio
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import hba
from hba.batch.encode import encoder_for
from hba.batch.prompt import FormatMix
from hba.config import load_config, to_yaml
from hba.errors import HbaError, InputError, MediaError
from hba.evaluate.answers import bare
from hba.model import OmniSapiens
from hba.model.generate import media_token_ids
from hba.rl.config import RlConfig
from hba.rl.evaluation_log import write_evaluation
from hba.rl.prompts import PromptFeed, training_rows, validation_rows
from hba.rl.rollout import probabilities, with_responses
from hba.rl.verl.config import AGENT
from hba.rl.verl.dataset import AtlasDataset, PlanSampler, Reference, records, verdict
from hba.rl.verl.launch import _release, best_step, checkpoints, keep_last_and_best, place_of, train_on_verl
from hba.rl.verl.thinker import NEVER, OmniForConditionalGeneration, OmniProcessor
from hba.run import RunFolder

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
    policy = OmniSapiens.from_pretrained(backbone, dtype="float32", heads=False).eval()
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
        assert record.keys() == {"id", "task", "dataset", "number", "target", "sampled", "greedy", "answer"}
        assert record["answer"] == bare(record["target"]) or record["answer"] == record["target"]
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


def test_steps_have_the_prompts_of_the_local_engines_steps_whatever_their_number(run):
    config, atlas = run.config, run.dataset.atlas
    sampler = PlanSampler(atlas, config)
    encoder = encoder_for(run.policy.processor, config.encode, atlas.taxonomy)
    feed = PromptFeed(atlas, encoder, config.mix, config.train, config.loader, replicates=1, rank=0, world=1)
    numbers, epoch = atlas.numbers, [atlas.numbers[rows].tolist() for rows in sampler.steps]
    for step in epoch:
        taken = [feed.take() for _ in range(min(config.train.accumulation, len(feed) - feed.position))]
        local = [each.batch for pieces in taken for piece in pieces for each in piece]
        assert [sample.number for batch in local for sample in batch.samples] == step
    assert sorted(number for step in epoch for number in step) == sorted(numbers.tolist() * config.train.epochs)
    assert len({len(step) for step in epoch}) > 1, "remainders of a modality"
    assert list(sampler) == [row for rows in sampler.steps for row in rows]
    assert list(PlanSampler(training_rows(config), config)) == list(sampler)
    assert place_of(config, run.path).steps == len(epoch)


def test_a_batch_larger_than_the_rows_is_all_of_a_modality(run):
    config = load_config(RlConfig, run.path / "config.yaml", ["train.batch_size=4000", "train.accumulation=1"])
    assert len(PlanSampler(run.dataset.atlas, config).steps) == 3 * config.train.epochs


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


def test_a_release_that_is_not_whole_is_refused_before_verl_starts(run, tmp_path):
    """verl loads by transformers, which draws what is missing at random."""
    copy = Path(shutil.copytree(run.place.model, tmp_path / "release"))
    weights = load_file(copy / "model.safetensors")
    del weights["thinker.model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors")
    config = replace(run.config, model=replace(run.config.model, name=str(copy)))
    with pytest.raises(InputError, match=r"1 of the \d+ weights of Qwen2_5OmniThinker\w+ are missing"):
        _release(config, place_of(config, tmp_path))


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
    from hba.batch.encode import collate

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


VERL = """
import json, os, sys, time
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--config-dir") + 1]).parent
with (run / "log.jsonl").open("a") as log:
    print(json.dumps({"step": 1, "kind": "rl"}), file=log)
    print(json.dumps({"step": 1, "kind": "warning", "message": "the answers have collapsed"}), file=log)
if os.environ.get("HBA_TEST") == "fails":
    from hba.errors import HbaError
    from hba.rl.verl.launch import note_failure
    note_failure(run, HbaError("raised KeyError", where="own.py:3"))
    time.sleep(3600)  # if nobody ends it
"""


@pytest.fixture
def verl(tmp_path, monkeypatch):
    """A program in the place of verl's, which logs a step and a warning."""
    package = tmp_path / "site" / "verl" / "trainer"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "main_ppo.py").write_text(VERL)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{Path(hba.__file__).parents[1]}")


def on_verl(run, atlas, backbone, *changes):
    config = load_config(RlConfig, None, [f"atlas={atlas}", f"model.name={backbone}", *SETTINGS, *changes])
    told, said = [], []
    with RunFolder.open(run, config=config, command="train rl --engine verl", seed=0) as folder:
        train_on_verl(config, folder, lambda *step: told.append(step), said.append)
    return told, said


def test_what_verl_logs_is_told_and_its_warnings_are_said(verl, tmp_path, mini_atlas, backbone):
    told, said = on_verl(tmp_path / "run", mini_atlas, backbone)
    assert told[-1][0] == 1 and said == ["warning: step 1: the answers have collapsed"]


def test_a_failure_that_a_process_of_verl_notes_ends_a_run_that_would_go_on(
    verl, tmp_path, mini_atlas, backbone, monkeypatch
):
    monkeypatch.setenv("HBA_TEST", "fails")
    with pytest.raises(HbaError, match=r"own\.py:3: raised KeyError"):
        on_verl(tmp_path / "run", mini_atlas, backbone)
    monkeypatch.delenv("HBA_TEST")
    on_verl(tmp_path / "run", mini_atlas, backbone)  # what was noted before does not count


def test_the_last_and_the_best_checkpoint_of_a_run_on_verl_are_kept_and_the_best_is_merged(tmp_path):
    folder = tmp_path / "verl" / "checkpoints"

    def saved(step):
        (folder / f"global_step_{step}").mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
        keep_last_and_best(tmp_path)

    def evaluated(step, score):
        parts = {"score": score, "right": 0.0, "format": 0.0, "tokens": 1.0}
        sampled = {"id": "a", "task": "t", "dataset": "d", "number": 0, "target": "x", "answer": "x", "sampled": parts}
        write_evaluation(tmp_path, step, [sampled | {"greedy": parts}])
        keep_last_and_best(tmp_path)

    evaluated(0, 0.9)  # of what the run starts from, which is no checkpoint of it
    kept = []
    for step, score in ((5, 0.3), (10, 0.6), (15, 0.5), (20, 0.4)):
        saved(step)
        evaluated(step, score)
        kept.append((best_step(tmp_path), [at for at, _ in checkpoints(tmp_path)]))
    assert kept == [(5, [5]), (10, [10]), (10, [10, 15]), (10, [10, 20])]
    (folder / "global_step_25").mkdir()  # is being written
    keep_last_and_best(tmp_path)
    assert [at for at, _ in checkpoints(tmp_path)] == [10, 20, 25]
