"""The model on real samples: every medium reaches the logits, and batching changes nothing."""

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from transformers import TopPLogitsWarper
from transformers.models.llama.modeling_llama import LlamaMLP

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import IGNORED, Encoder, collate
from hba.errors import InputError
from hba.model.generate import _Decided, media_token_ids
from hba.model.omni import liger_layers


@pytest.fixture(scope="module")
def encoder(model):
    return Encoder(model.processor, EncodeConfig(num_frames=4, min_pixels=3136, max_pixels=3136))


@pytest.fixture(scope="module")
def train(mini_atlas):
    return open_atlas(mini_atlas, split="train")


@pytest.fixture(scope="module")
def by_signature(train):
    """Two classification samples of each modality signature."""
    found = {}
    for sample in train:
        if sample.label is not None and len(found.setdefault(sample.modality_signature, [])) < 2:
            found[sample.modality_signature].append(sample)
    return found


def batch_of(encoder, samples):
    return collate([encoder.encode(s) for s in samples], pad_token_id=encoder.pad_token_id)


def pooled(model, encoder, samples):
    return model.pooled(batch_of(encoder, samples))


def with_medium(encoder, sample, donor, kind):
    """The batch of `sample` with one medium taken from `donor`, prompts and everything else untouched."""
    own, other = encoder.encode(sample), encoder.encode(donor)
    if kind == "audio":
        changed = dataclasses.replace(own, mels=tuple(m.clone() for m in own.mels))
        for mine, theirs in zip(changed.mels, other.mels, strict=True):
            n = min(mine.shape[1], theirs.shape[1])
            mine[:, :n] = theirs[:, :n]
    else:
        key = "pixel_values_videos" if kind == "video" else "pixel_values"
        changed = dataclasses.replace(own, media=own.media | {key: other.media[key]})
    return collate([changed], pad_token_id=encoder.pad_token_id)


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_another_medium_changes_the_logits(model, encoder, by_signature, kind):
    sample, donor = by_signature["text_video_audio"]
    before = model.classify(batch_of(encoder, [sample]))
    after = model.classify(with_medium(encoder, sample, donor, kind))
    own = torch.isfinite(before)
    assert (before[own] - after[own]).abs().max() > 1e-3


def test_another_image_changes_the_pooled_state(model, tmp_path):
    rows = []
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (80, 60), colour).save(tmp_path / f"{i}.png")
        rows.append({"problem": "<image>How does the person feel?", "answer": "happy", "dataset": "cremad",
                     "task": "emotion_cls", "modality_signature": "text_image", "images": [f"{i}.png"]})  # fmt: skip
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    atlas = open_atlas(tmp_path, split="test")
    encoder = Encoder(model.processor, EncodeConfig(min_pixels=3136, max_pixels=3136))
    sample, donor = atlas[0], atlas[1]
    before = pooled(model, encoder, [sample])
    after = model.pooled(with_medium(encoder, sample, donor, "image"))
    assert (before - after).abs().max() > 1e-3


def test_forward_equals_the_thinker_of_transformers(model, encoder, by_signature):
    samples = [s for pair in by_signature.values() for s in pair]
    batch = batch_of(encoder, samples)
    with torch.no_grad():
        ours = model(batch)
        theirs = model.transformer(**batch.inputs, use_cache=False, output_hidden_states=True)
        mask = batch.inputs["attention_mask"].unsqueeze(-1)
        expected = (theirs.hidden_states[-2] * mask).sum(1) / mask.sum(1)
        words = batch_of(Encoder(encoder.processor, encoder.config, answers=True), samples)
        answers, whole = model(words), model.transformer(**words.inputs, use_cache=False).logits
    torch.testing.assert_close(ours.pooled_BH, expected, atol=1e-6, rtol=1e-5)
    expected = whole[:, :-1][words.labels_BT[:, 1:] != -100]
    torch.testing.assert_close(answers.answer_logits_NV, expected, atol=1e-6, rtol=1e-5)
    said = model.transformer.lm_head(answers.answer_states_NH)
    torch.testing.assert_close(said, expected, atol=1e-6, rtol=1e-5)


def test_a_mixed_left_padded_batch_equals_single_samples(model, encoder, by_signature):
    samples = [s for pair in by_signature.values() for s in pair]
    together = pooled(model, encoder, samples)
    alone = torch.cat([pooled(model, encoder, [s]) for s in samples])
    torch.testing.assert_close(together, alone, atol=3e-6, rtol=1e-4)


def test_batches_are_padded_to_their_longest_sample_only(encoder, by_signature):
    encoded = [encoder.encode(s) for pair in by_signature.values() for s in pair]
    batch = collate(encoded, pad_token_id=encoder.pad_token_id)
    assert batch.inputs["input_ids"].shape[1] == max(len(e.input_ids_T) for e in encoded)
    assert batch.inputs["input_features"].shape[2] == max(m.shape[1] for e in encoded for m in e.mels)


def test_mel_frames_equal_those_of_the_whole_window(model, encoder, by_signature):
    sample = by_signature["text_audio"][0]
    (audio,) = sample.load_audios()
    whole = model.processor.feature_extractor(
        audio.samples, sampling_rate=16000, return_attention_mask=True, return_tensors="pt"
    )
    (mel,) = encoder.encode(sample).mels
    assert mel.shape[1] == int(whole["attention_mask"].sum())
    torch.testing.assert_close(mel, whole["input_features"][0][:, : mel.shape[1]], atol=1e-6, rtol=0)


def test_audio_longer_than_the_window_of_the_extractor_is_not_cut(model, by_signature):
    import copy

    processor = copy.deepcopy(model.processor)
    short = type(processor.feature_extractor)(
        feature_size=128, chunk_length=1, n_fft=400, hop_length=160, return_attention_mask=True
    )
    sample = by_signature["text_audio"][0]
    (audio,) = sample.load_audios()
    assert audio.seconds > 1
    processor.feature_extractor = short
    cut = Encoder(processor, EncodeConfig()).encode(sample)
    (mel,) = cut.mels
    assert mel.shape[1] == -(-len(audio.samples) // 160)


def test_classes_outside_the_domain_are_impossible(model, encoder, by_signature, train):
    samples = [s for pair in by_signature.values() for s in pair]
    batch = batch_of(encoder, samples)
    logits = model.classify(batch)
    assert logits.shape == (len(samples), 25)
    for row, sample in zip(logits, samples, strict=True):
        domain = train.taxonomy.domains[train.taxonomy.dataset(sample.dataset).domain]
        assert set(torch.isfinite(row).nonzero().flatten().tolist()) == set(domain.indices)
    assert torch.isfinite(logits.gather(1, batch.class_index_B.unsqueeze(1))).all()


def test_a_free_form_row_selects_no_head(model, encoder, train):
    question = next(s for s in train if s.label is None)
    batch = batch_of(encoder, [question])
    assert batch.class_index_B.tolist() == [IGNORED]
    with pytest.raises(InputError, match=question.id):
        model.classify(batch)
    with torch.no_grad():
        assert torch.isinf(model(batch).logits_BC).all()


def test_generation_of_a_batch_equals_single_samples_and_has_no_media_tokens(model, encoder, by_signature):
    samples = [s for pair in by_signature.values() for s in pair]
    together = model.generate(batch_of(encoder, samples), max_new_tokens=8)
    alone = [model.generate(batch_of(encoder, [s]), max_new_tokens=8)[0] for s in samples]
    assert together == alone
    assert len(media_token_ids(model.transformer.config)) == 7


def test_cached_generation_equals_teacher_forcing(model, encoder, by_signature):
    batch = batch_of(encoder, by_signature["text_video_audio"])
    out = model.transformer.generate(
        **batch.inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, suppress_tokens=media_token_ids(model.transformer.config),
    )  # fmt: skip
    length = batch.inputs["input_ids"].shape[1]
    longer = dict(batch.inputs, input_ids=out.sequences)
    longer["attention_mask"] = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, 6), value=1)
    with torch.no_grad():
        forced = model.transformer(**longer, use_cache=False).logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), forced, atol=2e-5, rtol=1e-4)


def test_log_probabilities_of_what_is_said_are_those_of_transformers(model, encoder, by_signature):
    batch, banned = batch_of(encoder, by_signature["text_video_audio"]), media_token_ids(model.transformer.config)
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.transformer.generate(**batch.inputs, **how, suppress_tokens=banned)
    for row, said in enumerate(model.say(batch, max_new_tokens=4, alternatives=3)):
        assert said.ids == tuple(out.sequences[row, batch.inputs["input_ids"].shape[1] :].tolist())[: said.tokens]
        for step, (chosen, *others) in enumerate(said.ranked):
            logits = out.logits[step][row].float()
            logits[banned] = -torch.inf
            values, ids = logits.log_softmax(-1).topk(3)
            assert chosen[0] == said.ids[step] and [token for token, _ in others] == ids.tolist()
            assert [chosen[1], *(logp for _, logp in others)] == pytest.approx([values[0].item(), *values.tolist()])


def test_top_p_draws_from_the_tokens_that_transformers_keeps():
    scores, numbers = torch.randn(1, 60, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 4001)[:-1]
    kept = TopPLogitsWarper(0.7)(None, scores / 0.8).softmax(-1)[0]
    decided = _Decided(numbers[:, None].double(), 0.8, 0.7, None)
    drawn = decided(None, scores.expand(4000, -1)).argmax(-1)
    assert 1 < (kept > 0).sum() < 60
    assert torch.bincount(drawn, minlength=60) / 4000 == pytest.approx(kept, abs=1 / 2000)


def test_an_audio_that_is_too_long_is_refused_by_name(model, by_signature):
    from hba.errors import MediaError

    sample = by_signature["text_audio"][0]
    encoder = Encoder(model.processor, EncodeConfig(max_audio_seconds=0.5))
    with pytest.raises(MediaError, match=r"train\.jsonl:\d+, audios: audio of .* more than max_audio_seconds"):
        encoder.encode(sample)


def test_the_answer_loss_is_that_of_the_thinker_and_includes_the_end_token(model, train):
    from hba.model.heads import answer_loss

    encoder = Encoder(model.processor, EncodeConfig(num_frames=4, min_pixels=3136, max_pixels=3136), answers=True)
    questions = [s for s in train if s.label is None][:3] + [s for s in train if s.label is not None][:2]
    for sample in questions:
        batch = collate([encoder.encode(sample)], pad_token_id=encoder.pad_token_id)
        with torch.no_grad():
            ours = answer_loss(model(batch).answer_logits_NV, batch.labels_BT)
            theirs = model.transformer(**batch.inputs, labels=batch.labels_BT, use_cache=False).loss
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        labelled = batch.labels_BT[batch.labels_BT != IGNORED]
        assert labelled[-1] == model.processor.tokenizer.eos_token_id
        assert model.processor.tokenizer.decode(labelled[:-1]) == sample.target


def test_answers_behind_the_prompt_do_not_touch_the_pooled_state(model, encoder, by_signature):
    samples = [s for pair in by_signature.values() for s in pair]
    answering = Encoder(model.processor, encoder.config, answers=True)
    with_answers = model.pooled(batch_of(answering, samples))
    torch.testing.assert_close(with_answers, pooled(model, encoder, samples), atol=3e-6, rtol=1e-4)


def test_free_form_rows_leave_a_finite_gradient(model, train):
    from hba.train.sft import sft_loss

    encoder = Encoder(model.processor, EncodeConfig(num_frames=4, min_pixels=3136, max_pixels=3136), answers=True)
    mixed = [next(s for s in train if s.label is None), next(s for s in train if s.label is not None)]
    loss = sft_loss(model, batch_of(encoder, mixed), answer_weight=1.0)
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads if g is not None)


class _Normed:
    """What Liger's function computes, by its formula."""

    @staticmethod
    def apply(states, weight, eps, *_):
        return weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)


class _Gated:
    """As above."""

    @staticmethod
    def apply(gate, up):
        return torch.nn.functional.silu(gate) * up


class _Limited(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * self.up_proj(x))


class _Dropping(LlamaMLP):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.1, self.training)


SMALL_TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL_TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
# Qwen 3.5's gated norms take two tensors, and its others add one to their weights; Cohere's take off the mean.
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
OTHERS = {
    "Llama": ({}, None, 5 + 2),
    "Llama limited": ({}, _Limited, 5),
    "Llama dropping": ({}, _Dropping, 5),
    "Cohere2": ({"layer_types": ["full_attention"] * 2}, None, 2),
    "Qwen3_5": ({"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, **LINEAR}, None, 2),
}


@pytest.mark.parametrize("family", OTHERS)
def test_liger_takes_the_norms_and_products_alone_that_compute_what_it_does(monkeypatch, family):
    for name, functions in (
        ("rms_norm", {"LigerRMSNormFunction": _Normed}),
        ("swiglu", {"LigerSiLUMulFunction": _Gated}),
    ):
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{name}", SimpleNamespace(**functions))
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    more, product, taken = OTHERS[family]
    kind = family.split()[0]
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Qwen3_5' else ''}Config")(**SMALL_TEXT, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for layer in model.model.layers if product else []:
        layer.mlp = product(config).eval()
    words = torch.arange(8)[None]
    before, drawn = model(input_ids=words).logits, torch.get_rng_state()
    liger_layers(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert sum("forward" in vars(module) for module in model.modules()) == taken
    assert torch.allclose(model(input_ids=words).logits, before, rtol=1e-4, atol=1e-6)
