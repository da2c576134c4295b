"""Chat models of three families and Qwen2.5-Omni: every medium reaches the model, batching and padding change nothing,
and the logits that are computed are those of the answers."""

import dataclasses
import pickle
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, GenerationConfig

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import IGNORED, collate, encoder_for, end_token_id, give_template, media_placeholders
from hba.batch.prompt import FormatMix
from hba.errors import ConfigError, InputError, MediaError
from hba.model import OmniSapiens
from hba.model.config import ModelConfig
from hba.model.generate import media_token_ids
from hba.model.heads import answer_loss
from hba.model.omni import apply_strategy, lora_targets

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_chat

FAMILIES = ("qwen_omni", *tiny_chat.FAMILIES)
MODALITIES = {"qwen_omni": ("image", "video", "audio"), **tiny_chat.MODALITIES}


@pytest.fixture(scope="module")
def folders(backbone, tmp_path_factory):
    """Folder of a tiny model of each family."""
    out = tmp_path_factory.mktemp("chat")
    built = {family: tiny_chat.build(family, backbone, out / family) for family in tiny_chat.FAMILIES}
    return {"qwen_omni": backbone, **built}


@pytest.fixture(scope="module")
def models(folders):
    how = {"dtype": "float32", "heads": False}
    return {family: OmniSapiens.from_pretrained(folder, **how).eval() for family, folder in folders.items()}


@pytest.fixture(scope="module")
def train(mini_atlas):
    return open_atlas(mini_atlas, split="train")


def encoder(models, family, **options):
    config = EncodeConfig(num_frames=4, min_pixels=3136, max_pixels=3136, modalities=MODALITIES[family])
    return encoder_for(models[family].processor, config, **options)


def batch_of(enc, samples):
    return collate([enc.encode(s) for s in samples], pad_token_id=enc.pad_token_id, taxonomy=enc.taxonomy)


def some(train, count=2):
    """Samples of each signature, of different lengths."""
    found = {}
    for sample in train:
        if len(found.setdefault((sample.modality_signature, sample.label is None), [])) < count:
            found[sample.modality_signature, sample.label is None].append(sample)
    return [sample for group in found.values() for sample in group]


def seen_by(train, modality):
    """Two samples with a medium of that modality."""
    return [s for s in train if getattr(s, f"{modality}s")][:2]


def swapped(enc, sample, donor, modality):
    """The batch of `sample` with the features of its medium taken from `donor`, prompt and answer untouched."""
    own, other = enc.encode(sample), enc.encode(donor)
    own = dataclasses.replace(own, media=own.media | {k: v for k, v in other.media.items() if k in own.media})
    if own.mels:
        mels = tuple(m.clone() for m in own.mels)
        for mine, theirs in zip(mels, other.mels, strict=True):
            n = min(mine.shape[1], theirs.shape[1])
            mine[:, :n] = theirs[:, :n]
        own = dataclasses.replace(own, mels=mels)
    elif modality == "audio":  # as long as the donor's: the mask must go on fitting the number of tokens
        own = dataclasses.replace(own, media=own.media | {"feature_attention_mask": enc.encode(sample).media[
            "feature_attention_mask"]})  # fmt: skip
    return collate([own], pad_token_id=enc.pad_token_id, taxonomy=enc.taxonomy)


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_logits_are_those_of_the_whole_model(models, train, family):
    batch = batch_of(encoder(models, family, answers=True), some(train))
    model = models[family]
    with torch.no_grad():
        ours_NV = model(batch).answer_logits_NV
        full_BTV = model.transformer(**batch.inputs, use_cache=False).logits
    mask_BT = batch.labels_BT[:, 1:] != IGNORED
    torch.testing.assert_close(ours_NV, full_BTV[:, :-1][mask_BT], atol=1e-6, rtol=1e-5)
    assert len(ours_NV) == int((batch.labels_BT != IGNORED).sum()) < full_BTV[..., 0].numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_transformers_with_the_end_token_and_one_shift(models, train, family):
    enc, model = encoder(models, family, answers=True), models[family]
    for sample in some(train, 1):
        batch = batch_of(enc, [sample])
        with torch.no_grad():
            ours = answer_loss(model(batch).answer_logits_NV, batch.labels_BT)
            logits_TV = model.transformer(**batch.inputs, use_cache=False).logits[0].float()
        labels_T = batch.labels_BT[0]
        theirs = torch.nn.functional.cross_entropy(logits_TV[:-1], labels_T[1:], ignore_index=IGNORED)
        twice = torch.nn.functional.cross_entropy(logits_TV[:-2], labels_T[2:], ignore_index=IGNORED)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert abs(float(ours - twice)) > 1e-3
        said = labels_T[labels_T != IGNORED]
        assert said[-1] == end_token_id(model.processor)
        assert model.processor.tokenizer.decode(said[:-1]) == sample.target


class Told:
    """A wording that has every sample answer the same."""

    def __init__(self, text):
        self.text = text

    def question(self, sample):
        return sample.problem

    def answer(self, sample, target):
        return self.text


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_of_choices_are_those_of_whole_passes(models, train, family):
    model, samples = models[family], some(train)
    choices = [["sad", "not sarcasm", "\\boxed{weakly positive}"][: 1 + i % 3] for i in range(len(samples))]
    found = model.logps(batch_of(encoder(models, family), samples), choices)
    assert [len(each) for each in found] == [len(each) for each in choices]
    for text in {text for each in choices for text in each}:
        mine = [i for i, each in enumerate(choices) if text in each]
        batch = batch_of(encoder(models, family, answers=True, wording=Told(text)), [samples[i] for i in mine])
        labels_BT = batch.labels_BT[:, 1:]
        with torch.no_grad():
            logits_BTV = model.transformer(**batch.inputs, use_cache=False).logits[:, :-1].float()
        logps_BT = logits_BTV.log_softmax(-1).gather(2, labels_BT.clamp(min=0)[..., None])[..., 0]
        whole_B = (logps_BT * (labels_BT != IGNORED)).sum(1)
        torch.testing.assert_close(
            torch.tensor([found[i][choices[i].index(text)] for i in mine]), whole_B, atol=2e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_says_one_of_its_choices_and_a_free_one_what_it_would(models, train, family):
    model, samples = models[family], some(train)
    batch = batch_of(encoder(models, family), samples)
    offered = [["sad", "sad and angry", "not sarcasm"] if i % 2 else [] for i in range(len(samples))]
    free, bound = (model.say(batch, max_new_tokens=12, choices=choices) for choices in ((), offered))
    for i, choices in enumerate(offered):
        assert bound[i].text in choices if choices else bound[i] == free[i]
    drawn = model.say(batch, max_new_tokens=12, temperature=3.0, choices=offered)
    assert all(said.text in choices for said, choices in zip(drawn, offered, strict=True) if choices)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_is_no_prompt_and_a_batch_equals_single_samples(models, train, family):
    enc, model, samples = encoder(models, family, answers=True), models[family], some(train)
    batch = batch_of(enc, samples)
    with torch.no_grad():
        together_NV = model(batch).answer_logits_NV
        alone_NV = torch.cat([model(batch_of(enc, [sample])).answer_logits_NV for sample in samples])
    torch.testing.assert_close(together_NV, alone_NV, atol=2e-5, rtol=1e-4)
    lengths = [int((enc.encode(s).input_ids_T).numel()) for s in samples]
    assert batch.prompt_mask.sum(1).tolist() == lengths and len(set(lengths)) > 1
    padding = batch.inputs["attention_mask"] == 0
    assert (batch.labels_BT[padding] == IGNORED).all()


@pytest.mark.parametrize(
    ("family", "modality"), [(f, m) for f in FAMILIES for m in ("video", "audio") if m in MODALITIES[f]]
)
def test_another_medium_changes_the_loss(models, train, family, modality):
    enc = encoder(models, family, answers=True)
    sample, donor = seen_by(train, modality)
    with torch.no_grad():
        losses = [
            answer_loss(models[family](batch).answer_logits_NV, batch.labels_BT)
            for batch in (batch_of(enc, [sample]), swapped(enc, sample, donor, modality))
        ]
    assert abs(float(losses[0] - losses[1])) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_of_a_mixed_batch_equals_single_samples(models, train, family):
    enc, model, samples = encoder(models, family), models[family], some(train)
    together = model.say(batch_of(enc, samples), max_new_tokens=8)
    alone = [model.say(batch_of(enc, [sample]), max_new_tokens=8)[0] for sample in samples]
    assert together == alone
    assert all(1 <= said.tokens <= 8 for said in together)


@pytest.mark.parametrize("family", FAMILIES)
def test_media_tokens_are_never_said(models, train, family):
    model = models[family]
    never = media_token_ids(model.transformer.config, model.processor)
    names = {model.processor.tokenizer.convert_ids_to_tokens(i) for i in never}
    expected = {
        "qwen_omni": 7, "qwen2.5-vl": {"<|IMAGE|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>"},
        "qwen2-audio": {"<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"},
        "gemma3": {"<image_soft_token>", "<start_of_image>", "<end_of_image>"}, "llama": set(),
    }[family]  # fmt: skip
    assert len(names) == expected if isinstance(expected, int) else names >= expected
    batch = batch_of(encoder(models, family), some(train, 1))
    head, ids = model.transformer.get_output_embeddings(), torch.tensor(never, dtype=torch.long)
    likeliest = head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, ids, 1e4))
    try:
        said = [model.say(batch, max_new_tokens=3, temperature=temperature) for temperature in (0.0, 1.0)]
    finally:
        likeliest.remove()
    assert not {token for way in said for one in way for token in one.ids} & set(never)


def test_of_a_models_own_generation_config_its_end_tokens_alone_decide(models, train, monkeypatch):
    model = models["llama"]
    batch = batch_of(encoder(models, "llama"), some(train, 1)[:2])
    plain = model.say(batch, max_new_tokens=8)
    first, last = plain[0].ids[0], plain[0].ids[-1]
    ways = {"suppress_tokens": [first], "no_repeat_ngram_size": 1, "num_beams": 3, "forced_eos_token_id": first}
    for name, value in ways.items():
        monkeypatch.setattr(model.transformer, "generation_config", GenerationConfig(**{name: value}))
        assert model.say(batch, max_new_tokens=8) == plain, name
    monkeypatch.setattr(model.transformer, "generation_config", own := GenerationConfig(eos_token_id=last))
    assert model.say(batch, max_new_tokens=8)[0].ids == plain[0].ids[: plain[0].ids.index(last) + 1]
    assert model.transformer.generation_config is own


def test_a_model_without_video_sees_the_frames_in_the_place_of_the_video(models, train):
    enc = encoder(models, "gemma3")
    sample = next(s for s in train if s.videos and "<video>" in s.problem)
    encoded = enc.encode(sample)
    assert encoded.media["pixel_values"].shape[0] == 4
    (token,) = media_placeholders(models["gemma3"].processor, "image")
    assert int((encoded.input_ids_T == token).sum()) == 4 * 4


def test_a_video_tells_its_real_length(models, train):
    sample = next(s for s in train if s.videos)
    (video,) = sample.load_videos(4)
    encoded = encoder(models, "qwen2.5-vl").encode(sample)
    assert float(encoded.media["second_per_grid_ts"][0]) == pytest.approx(2 * video.duration_seconds / 4)


def test_a_medium_that_the_model_cannot_take_is_named_with_the_filter(models, train):
    config = EncodeConfig(num_frames=4, min_pixels=3136, max_pixels=3136)
    sample = next(s for s in train if s.audios)
    with pytest.raises(InputError, match=r"train\.jsonl:\d+, audios: Gemma3Processor takes no audio.*modalities"):
        encoder_for(models["gemma3"].processor, config).encode(sample)
    sample = next(s for s in train if s.videos)
    with pytest.raises(InputError, match="takes no videos"):
        encoder_for(models["qwen2-audio"].processor, config).encode(sample)


def test_tags_of_modalities_that_are_left_out_vanish(models, train):
    sample = next(s for s in train if "<video>" in s.problem and s.audios)
    config = EncodeConfig(modalities=("audio",))
    enc = encoder_for(models["qwen2-audio"].processor, config)
    text = enc.processor.tokenizer.decode(enc.encode(sample).input_ids_T)
    assert "<video>" not in text and "<audio>" not in text and "<|AUDIO|>" in text
    no_media = encoder_for(models["qwen2.5-vl"].processor, EncodeConfig(modalities=())).encode(sample)
    assert not no_media.media


def test_sound_longer_than_the_window_of_a_model_is_refused_not_cut(models, train):
    from transformers import WhisperFeatureExtractor

    enc = encoder(models, "qwen2-audio")
    processor = pickle.loads(pickle.dumps(enc.processor))
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    sample = next(s for s in train if s.audios and s.load_audios()[0].seconds > 1)
    with pytest.raises(MediaError, match=r"audios: audio of .* more than the 1 s that Qwen2AudioProcessor takes"):
        encoder_for(processor, enc.config).encode(sample)


def test_encoders_survive_pickling_and_give_the_same(models, train):
    wording = FormatMix(["think"], reasoning="It is {{ answer }}.", seed=0)
    for family in FAMILIES:
        enc = encoder(models, family, answers=True, wording=wording)
        copy = pickle.loads(pickle.dumps(enc))
        one, two = enc.encode(train[0]), copy.encode(train[0])
        assert torch.equal(one.input_ids_T, two.input_ids_T) and torch.equal(one.answer_ids_T, two.answer_ids_T)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_stays_in_the_language_model(folders, family):
    model = OmniSapiens.from_pretrained(folders[family], dtype="float32", heads=False)
    apply_strategy(model, ModelConfig(name="x", strategy="lora", lora_r=2))
    trained = [n for n, p in model.transformer.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n and "layers" in n for n in trained)
    assert not any("visual" in n or "audio" in n or "vision" in n for n in trained)
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(kind in n for n in trained)


def test_lora_targets_of_qwen_omni_are_those_of_the_paper(models):
    import re

    paper = r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"

    names = [n for n, m in models["qwen_omni"].transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    found = lora_targets(models["qwen_omni"].transformer)
    assert [n for n in names if re.fullmatch(found, n)] == [n for n in names if re.fullmatch(paper, n)]


def test_heads_alone_cannot_be_trained_in_a_chat_model(models):
    with pytest.raises(ConfigError, match=r"model\.strategy"):
        apply_strategy(models["gemma3"], ModelConfig(name="x", strategy="heads"))


def test_a_template_that_knows_texts_alone_and_drops_lists_keeps_the_question(folders):
    processor = AutoProcessor.from_pretrained(folders["gemma3"])
    of_texts = "{% if message.content is string %}{{ message.content }}{% endif %}"
    processor.chat_template = f"{{% for message in messages %}}{of_texts}{{% endfor %}}"
    give_template(processor)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How does she feel?"}]}
    shown = processor.apply_chat_template([turn], tokenize=False)
    assert shown == f"{processor.image_token}How does she feel?"


def test_a_template_that_takes_the_system_prompt_as_one_text_gets_it_so(folders):
    processor = AutoProcessor.from_pretrained(folders["qwen2.5-vl"])
    own, of_system = processor.chat_template, "messages | {}attr('role', 'equalto', 'system') | list"
    first = f"{{% for turn in {of_system.format('select')} %}}{{{{ turn.content }}}}{{% endfor %}}"
    others = f"{{% set messages = {of_system.format('reject')} %}}"
    processor.chat_template = f"{first}{others}{own}"
    give_template(processor)
    said = [{"type": "text", "text": "You watch people."}]
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How does she feel?"}]}
    turns = [{"role": "system", "content": said}, asked]
    shown = processor.apply_chat_template(turns, tokenize=False)
    processor.chat_template = own
    assert shown == f"You watch people.{processor.apply_chat_template([asked], tokenize=False)}"


def test_a_folder_without_a_chat_template_is_refused(tmp_path, folders):
    import shutil

    shutil.copytree(folders["qwen2.5-vl"], tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        OmniSapiens.from_pretrained(tmp_path / "base", heads=False)
    with pytest.raises(InputError, match="cannot load backbone"):
        OmniSapiens.from_pretrained("nobody/no-such-model", heads=False)
