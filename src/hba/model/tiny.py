"""Tiny backbones: the real model and processor classes of a family with small dimensions, built offline.

About 0.4 million parameters, random weights, and a tokenizer trained on an atlas' own prompts. They are saved like any
checkpoint and loaded through `from_pretrained`, so that nothing downstream knows one from Qwen2.5-Omni-7B.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hba.atlas import Atlas
from hba.batch.prompt import FORMATS, AnswerFormat, Modality
from hba.errors import InputError, nearest
from hba.model.weights import silence_transformers
from hba.storage import atomic_folder, file_sha256

# The pre-tokenizer and the special tokens of Qwen2.5-Omni.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MEDIA_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
TEXT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content -%}
{% if item.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>
{%- elif item.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif item.type == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>
{%- else %}{{ item.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


# As Gemma's: a begin token, the role 'model', and a token of its own at the end of a turn.
GEMMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{% if message.content is string %}{{ message.content | trim }}{% else %}{% for item in message.content -%}
{% if item.type == 'image' %}IMAGE{% elif item.type == 'video' %}VIDEO{% elif item.type == 'audio' %}AUDIO
{%- elif item.type == 'text' %}{{ item.text | trim }}{% endif %}
{%- endfor %}{% endif %}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif -%}
"""
GEMMA3_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
GEMMA3N_TOKENS = {"boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}
GEMMA4_TOKENS = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
}
TEXT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Dimensions of the tiny thinker; the audio and vision towers project to `hidden`."""

    vocabulary: int = 1024
    hidden: int = 64
    layers: int = 3  # hidden_states[-2] skips the last one
    heads: int = 4
    key_value_heads: int = 2
    intermediate: int = 128
    audio_width: int = 64
    audio_layers: int = 2
    vision_width: int = 48
    vision_layers: int = 2
    initializer_range: float = 0.1  # 0.02 learns much slower at this size


def build_tiny(
    out: str | Path,
    texts: Iterable[str],
    *,
    seed: int,
    sizes: TinySizes | None = None,
    family: str = "qwen2.5-omni",
) -> Path:
    """Write a tiny backbone of `family` and its processor to `out` and return it. `texts` trains the tokenizer.

    Deterministic in (texts, seed, sizes); works without a network. Raises InputError for an unknown family, and when
    `out` holds anything else than this backbone: nothing is ever written over.
    """
    if family not in FAMILIES:
        raise InputError(f"no family {family!r}", where="--family", fix=nearest(family, FAMILIES))
    sizes = sizes or TinySizes()
    return build_family(out, _tokenizer(list(texts), sizes.vocabulary), family, seed=seed, sizes=sizes)


def build_family(out: str | Path, tokenizer: Any, family: str, *, seed: int, sizes: TinySizes | None = None) -> Path:
    """`build_tiny` with a tokenizer that is there, which may get the tokens of the family."""
    silence_transformers()
    made = FAMILIES[family].make(tokenizer, sizes or TinySizes())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = made.model_class._from_config(made.config)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # Gemma's projector of images starts at zero
                torch.nn.init.normal_(parameter, std=0.1)
    with atomic_folder(Path(out).absolute()) as folder:
        model.save_pretrained(folder)
        made.processor.save_pretrained(folder)
        if Path(out).exists() and not _empty_or_same(Path(out), folder):
            fix = "Name a new folder, or remove this one."
            raise InputError("already holds something other than this tiny backbone", where=str(out), fix=fix)
    return Path(out)


def _empty_or_same(out: Path, made: Path) -> bool:
    """Whether the folder `out` holds nothing, or the very files of `made`."""
    if not out.is_dir():
        return False
    names = {file.name for file in out.iterdir()}
    same = names == {file.name for file in made.iterdir()} and all((out / name).is_file() for name in names)
    return not names or (same and all(file_sha256(out / name) == file_sha256(made / name) for name in names))


def _tokenizer(texts: list[str], vocabulary: int) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), byte_level])
    bpe.decoder = decoders.ByteLevel()
    special = [*TEXT_TOKENS, *MEDIA_TOKENS.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    roles = ["user\n", "assistant\n", "system\n"] * len(texts)
    bpe.train_from_iterator(
        texts + roles,
        trainers.BpeTrainer(vocab_size=vocabulary - len(special), initial_alphabet=alphabet, show_progress=False),
    )
    trained = json.loads(bpe.to_str())["model"]
    vocab = dict(trained["vocab"])
    for token in special:
        vocab[token] = len(vocab)
    return hf.Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        padding_side="left",
        extra_special_tokens=MEDIA_TOKENS,
    )


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """A family of which a tiny model can be made; `modalities` is what it takes."""

    modalities: tuple[Modality, ...]
    make: Callable[[Any, TinySizes], Made]


class Made(NamedTuple):
    """The class of a model, its config, and its processor."""

    model_class: Any
    config: Any
    processor: Any


def _patches(size: int) -> dict[str, int]:
    return {"patch_size": size, "temporal_patch_size": 2, "merge_size": 2}


def _text(tokenizer: Any, sizes: TinySizes, **more: Any) -> dict[str, Any]:
    """The fields that the language models of all families have."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": sizes.initializer_range,
        **more,
    }


def _rope(sizes: TinySizes, **more: Any) -> dict[str, Any]:
    half = sizes.hidden // sizes.heads // 2
    temporal, height = half // 4, (half - half // 4) // 2
    sections = [temporal, height, half - temporal - height]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **more}


SEEN = {"image_token_id": "image_token", "video_token_id": "video_token"}
BORDERS = {"vision_start_token_id": "vision_bos_token", "vision_end_token_id": "vision_eos_token"}
HEARD = {"audio_start_token_id": "audio_bos_token", "audio_end_token_id": "audio_eos_token"}


def _ids(tokenizer: Any, tokens: Mapping[str, str]) -> dict[str, int]:
    """Ids of tokens of media, by the names that a config has for them."""
    return {name: tokenizer.convert_tokens_to_ids(MEDIA_TOKENS[token]) for name, token in tokens.items()}


def _windowed_vision(sizes: TinySizes) -> dict[str, Any]:
    return {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_width,
        "intermediate_size": 2 * sizes.vision_width,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": sizes.hidden,
        "fullatt_block_indexes": [sizes.vision_layers - 1],
        "initializer_range": sizes.initializer_range,
    }


def _deepstack_vision(sizes: TinySizes) -> dict[str, Any]:
    return {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_width,
        "intermediate_size": 2 * sizes.vision_width,
        "num_heads": 4,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": sizes.hidden,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": sizes.initializer_range,
    }


def _whisper(sizes: TinySizes, mel_bins: int) -> dict[str, Any]:
    return {
        "num_mel_bins": mel_bins,
        "encoder_layers": sizes.audio_layers,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * sizes.audio_width,
        "d_model": sizes.audio_width,
    }


def _qwen2_5_omni(tokenizer: Any, sizes: TinySizes) -> Made:
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

    extractor = hf.WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16000, hop_length=160, chunk_length=300, n_fft=400, return_attention_mask=True
    )
    processor = hf.Qwen2_5OmniProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**_patches(14)),
        video_processor=hf.Qwen2VLVideoProcessor(**_patches(14)),
        feature_extractor=extractor,
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    scale = {"initializer_range": sizes.initializer_range}
    sound = {"max_source_positions": 1500, "n_window": 100, "output_dim": sizes.hidden}
    ids = {"audio_token_index": "audio_token", "image_token_index": "image_token", "video_token_index": "video_token"}
    ids |= HEARD | BORDERS  # those of pictures are no fields of the config class, but its rope index reads the first
    config = Qwen2_5OmniThinkerConfig(
        text_config=_text(tokenizer, sizes, rope_parameters=_rope(sizes)),
        audio_config=_whisper(sizes, 128) | sound | scale,
        vision_config=_windowed_vision(sizes),
        **_ids(tokenizer, ids),
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        tie_word_embeddings=True,
        **scale,
    )
    return Made(hf.Qwen2_5OmniThinkerForConditionalGeneration, config, processor)


def _qwen3_omni(tokenizer: Any, sizes: TinySizes) -> Made:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    processor = hf.Qwen3OmniMoeProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**_patches(16)),
        video_processor=hf.Qwen2VLVideoProcessor(**_patches(16)),
        feature_extractor=hf.WhisperFeatureExtractor(feature_size=128, return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": sizes.intermediate // 2}
    scale = {"initializer_range": sizes.initializer_range}
    sound = {"max_source_positions": 1500, "n_window": 50, "n_window_infer": 400, "output_dim": sizes.hidden}
    sound |= {"conv_chunksize": 500, "downsample_hidden_size": 16}
    ids = {"audio_token_id": "audio_token"} | SEEN | HEARD | BORDERS
    head = {"head_dim": sizes.hidden // sizes.heads, **experts}
    config = Qwen3OmniMoeThinkerConfig(
        text_config=_text(tokenizer, sizes, rope_parameters=_rope(sizes, mrope_interleaved=True), **head),
        audio_config=_whisper(sizes, 128) | sound | scale,
        vision_config=_deepstack_vision(sizes),
        **_ids(tokenizer, ids),
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        tie_word_embeddings=True,
        **scale,
    )
    return Made(hf.Qwen3OmniMoeThinkerForConditionalGeneration, config, processor)


def _qwen2_5_vl(tokenizer: Any, sizes: TinySizes) -> Made:
    image, video = hf.Qwen2VLImageProcessor(**_patches(14)), hf.Qwen2VLVideoProcessor(**_patches(14))
    processor = hf.Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)
    config = hf.Qwen2_5_VLConfig(
        text_config=_text(tokenizer, sizes, rope_parameters=_rope(sizes)),
        vision_config=_windowed_vision(sizes),
        **_ids(tokenizer, SEEN | BORDERS),
        tie_word_embeddings=True,
    )
    return Made(hf.Qwen2_5_VLForConditionalGeneration, config, processor)


def _qwen3_vl(tokenizer: Any, sizes: TinySizes) -> Made:
    tokenizer._set_model_specific_special_tokens(
        {"vision_start_token": MEDIA_TOKENS["vision_bos_token"], "vision_end_token": MEDIA_TOKENS["vision_eos_token"]}
    )
    image, video = hf.Qwen2VLImageProcessor(**_patches(16)), hf.Qwen3VLVideoProcessor(**_patches(16))
    processor = hf.Qwen3VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)
    rope, head = _rope(sizes, mrope_interleaved=True), {"head_dim": sizes.hidden // sizes.heads}
    config = hf.Qwen3VLConfig(
        text_config=_text(tokenizer, sizes, rope_parameters=rope, **head),
        vision_config=_deepstack_vision(sizes),
        **_ids(tokenizer, SEEN | BORDERS),
        tie_word_embeddings=True,
    )
    return Made(hf.Qwen3VLForConditionalGeneration, config, processor)


def _qwen2_audio(tokenizer: Any, sizes: TinySizes) -> Made:
    """Every sound padded to the window of its processor."""

    names = {name: MEDIA_TOKENS[name] for name in ("audio_token", "audio_bos_token", "audio_eos_token")}
    extractor = hf.WhisperFeatureExtractor(feature_size=80, chunk_length=4)
    processor = hf.Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE, **names)
    config = hf.Qwen2AudioConfig(
        audio_config=_whisper(sizes, 80) | {"max_source_positions": 200, "init_std": sizes.initializer_range},
        text_config=_text(tokenizer, sizes, model_type="qwen2"),
        **_ids(tokenizer, {"audio_token_index": "audio_token"}),
    )
    return Made(hf.Qwen2AudioForConditionalGeneration, config, processor)


def _audio_flamingo(tokenizer: Any, sizes: TinySizes) -> Made:
    """Sounds in windows of four seconds, one behind the other."""

    extractor = hf.WhisperFeatureExtractor(feature_size=80, chunk_length=4, return_attention_mask=True)
    token = MEDIA_TOKENS["audio_token"]
    processor = hf.AudioFlamingo3Processor(extractor, tokenizer, chat_template=CHAT_TEMPLATE, audio_token=token)
    config = hf.AudioFlamingo3Config(
        audio_config={
            "num_mel_bins": 80,
            "num_hidden_layers": sizes.audio_layers,
            "num_attention_heads": 4,
            "intermediate_size": 2 * sizes.audio_width,
            "hidden_size": sizes.audio_width,
            "max_source_positions": 200,
            "initializer_range": sizes.initializer_range,
        },
        text_config=_text(tokenizer, sizes, model_type="qwen2"),
        **_ids(tokenizer, {"audio_token_id": "audio_token"}),
    )
    return Made(hf.AudioFlamingo3ForConditionalGeneration, config, processor)


# The first ids of Mistral's tokenizers; Voxtral reads 24 as a sound.
TEKKEN = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS]"
    " [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
    " <SPECIAL_20> <SPECIAL_21> <SPECIAL_22> <SPECIAL_23> [AUDIO] [BEGIN_AUDIO] <SPECIAL_26> <SPECIAL_27>"
    " <SPECIAL_28> <SPECIAL_29> <SPECIAL_30> <SPECIAL_31> [ARGS] [CALL_ID] [TRANSCRIBE]"
)


class _Tekken(NamedTuple):
    """What Voxtral is published with in place of a processor: tekken.json and the settings of its sound."""

    feature_extractor: Any
    read: dict[str, Any]

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tekken.json").write_text(json.dumps(self.read))
        self.feature_extractor.save_pretrained(folder)


def _voxtral(tokenizer: Any, sizes: TinySizes) -> Made:
    """Sounds in windows of four seconds, one behind the other; a tokenizer in Mistral's format."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of, named = {char: byte for byte, char in bytes_to_unicode().items()}, set(tokenizer.added_tokens_decoder)
    words = sorted((number, word) for word, number in tokenizer.get_vocab().items() if number not in named)
    pieces = [bytes(byte_of[char] for char in word) for _, word in words]
    pieces.sort(key=lambda piece: piece[0] if len(piece) == 1 else 256)  # bytes stand first, in their order
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(pieces)
    ]
    special = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(TEKKEN.split())]
    size = len(vocab) + len(special)
    counts = {"num_vocab_tokens": len(vocab), "default_vocab_size": size, "default_num_special_tokens": len(special)}
    spectrum = {"num_mel_bins": 80, "hop_length": 160, "window_size": 400}
    sound = {"sampling_rate": 16000, "frame_rate": 12.5, "audio_encoding_config": spectrum, "chunk_length_s": 4.0}
    read = {"config": {"pattern": SPLIT, "version": "v11", **counts}, "vocab": vocab, "special_tokens": special}
    config = hf.VoxtralConfig(
        audio_config={
            "num_mel_bins": 80,
            "num_hidden_layers": sizes.audio_layers,
            "num_attention_heads": 4,
            "intermediate_size": 4 * sizes.audio_width,  # four steps of sound are a token
            "hidden_size": sizes.audio_width,
            "max_source_positions": 200,
            "initializer_range": sizes.initializer_range,
        },
        text_config=_text(tokenizer, sizes, vocab_size=size, pad_token_id=11, bos_token_id=1, eos_token_id=2)
        | {"head_dim": sizes.hidden // sizes.heads},
        audio_token_id=24,
        tie_word_embeddings=True,
    )
    extractor = hf.WhisperFeatureExtractor(feature_size=80, chunk_length=4)
    return Made(hf.VoxtralForConditionalGeneration, config, _Tekken(extractor, read | {"audio": sound}))


def _video_llama3(tokenizer: Any, sizes: TinySizes) -> Made:
    """Clips whose frames carry their times, and of which tokens that change little from frame to frame are left out."""

    image, video = hf.VideoLlama3ImageProcessor(merge_size=1), hf.VideoLlama3VideoProcessor(merge_size=2)
    processor = hf.VideoLlama3Processor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)
    config = hf.VideoLlama3Config(
        text_config=_text(tokenizer, sizes, model_type="qwen2"),
        vision_config=_siglip(sizes) | {"patch_size": 14},
        **_ids(tokenizer, SEEN),
    )
    return Made(hf.VideoLlama3ForConditionalGeneration, config, processor)


def _minicpmv(tokenizer: Any, sizes: TinySizes) -> Made:
    """Pictures in slices; layers of linear attention."""

    borders = {
        f"{kind}_{end}_token": f"<|{kind}_{end}|>"
        for kind in ("image", "slice", "image_id")
        for end in ("start", "end")
    }
    tokenizer.add_special_tokens({"additional_special_tokens": list(borders.values())})
    tokenizer._set_model_specific_special_tokens(borders)
    small = {"scale_resolution": 56, "max_slice_nums": 2}
    processor = hf.MiniCPMV4_6Processor(
        hf.MiniCPMV4_6ImageProcessor(**small),
        hf.MiniCPMV4_6VideoProcessor(**small),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    kinds = ["linear_attention"] * (sizes.layers - 1) + ["full_attention"]
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    head = {"head_dim": sizes.hidden // sizes.heads, "layer_types": kinds, **linear}
    config = hf.MiniCPMV4_6Config(
        text_config=_text(tokenizer, sizes, model_type="qwen3_5_text", **head),
        vision_config=_siglip(sizes) | {"image_size": 56, "patch_size": 14},
        insert_layer_id=0,
        image_size=56,
        **_ids(tokenizer, SEEN),
        tie_word_embeddings=True,
    )
    return Made(hf.MiniCPMV4_6ForConditionalGeneration, config, processor)


def _phi4(tokenizer: Any, sizes: TinySizes) -> Made:
    """Pictures in crops and sound; the language model has the towers below its embeddings."""

    tokenizer.chat_template = TEXT_TEMPLATE
    processor = hf.Phi4MultimodalProcessor(
        hf.Phi4MultimodalImageProcessor(), hf.Phi4MultimodalFeatureExtractor(), tokenizer
    )
    ids = _ids(tokenizer, {"image_token_id": "image_token", "audio_token_id": "audio_token"})
    config = hf.Phi4MultimodalConfig(
        **_text(tokenizer, sizes),
        bos_token_id=None,
        vision_config=_siglip(sizes) | {"image_token_id": ids["image_token_id"]},
        audio_config={
            "hidden_size": sizes.audio_width,
            "intermediate_size": sizes.audio_width,
            "num_blocks": sizes.audio_layers,
            "num_attention_heads": 4,
            "ext_pw_out_channel": sizes.audio_width,
            "depthwise_separable_out_channel": sizes.audio_width,
            "nemo_conv_channels": 16,
            "audio_token_id": ids["audio_token_id"],
        },
    )
    return Made(hf.Phi4MultimodalForCausalLM, config, processor)


def _internvl(tokenizer: Any, sizes: TinySizes) -> Made:
    """Pictures in crops of one size; the frames of a clip stand among words, each as one crop."""

    names = {"start_image_token": "vision_bos_token", "end_image_token": "vision_eos_token"}
    names |= {"context_image_token": "image_token", "video_token": "video_token"}
    tokenizer._set_model_specific_special_tokens({name: MEDIA_TOKENS[token] for name, token in names.items()})
    size = {"height": 56, "width": 56}
    image, video = hf.GotOcr2ImageProcessor(size=size, max_patches=2), hf.InternVLVideoProcessor(size=size)
    processor = hf.InternVLProcessor(image, tokenizer, video, image_seq_length=4, chat_template=CHAT_TEMPLATE)
    config = hf.InternVLConfig(
        text_config=_text(tokenizer, sizes, model_type="qwen2"),
        vision_config=_siglip(sizes)
        | {"image_size": 56, "patch_size": 14, "initializer_range": sizes.initializer_range},
        image_seq_length=4,
        **_ids(tokenizer, {"image_token_id": "image_token"}),
    )
    return Made(hf.InternVLForConditionalGeneration, config, processor)


def _llava_onevision(tokenizer: Any, sizes: TinySizes) -> Made:
    """Pictures in crops by their shape, a token at the end of each line of patches."""

    size, grid = {"height": 56, "width": 56}, [[56, 56], [56, 112], [112, 56]]
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    config = hf.LlavaOnevisionConfig(
        text_config=_text(tokenizer, sizes, model_type="qwen2"),
        vision_config=_siglip(sizes) | {"image_size": 56, "patch_size": 14, "vision_use_head": False},
        image_grid_pinpoints=grid,
        **_ids(tokenizer, {"image_token_index": "image_token", "video_token_index": "video_token"}),
        tie_word_embeddings=True,
    )
    return Made(hf.LlavaOnevisionForConditionalGeneration, config, processor)


def _smolvlm(tokenizer: Any, sizes: TinySizes) -> Made:
    """Pictures in crops, clips as frames with their times; how many it says in words."""
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE  # clips have it in any case

    if find_spec("num2words") is None:
        fix = "pip install num2words, or use another family."
        raise InputError("its processor needs num2words, which is not installed", where="smolvlm", fix=fix)
    around = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<image>", "<video>"]
    tokenizer.add_special_tokens({"additional_special_tokens": around})
    tokenizer._set_model_specific_special_tokens({"image_token": "<image>", "video_token": "<video>"})
    small = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    sampled = {"video_sampling": {"max_frames": 8, "fps": 1, "video_size": {"longest_edge": 56}}}
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**small),
        tokenizer,
        hf.SmolVLMVideoProcessor(**small, **sampled),
        image_seq_len=4,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    config = hf.SmolVLMConfig(
        text_config=_text(tokenizer, sizes, model_type="llama"),
        vision_config=_siglip(sizes)
        | {"image_size": 56, "patch_size": 14, "initializer_range": sizes.initializer_range},
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=True,
    )
    return Made(hf.SmolVLMForConditionalGeneration, config, processor)


def _glm4v(tokenizer: Any, sizes: TinySizes) -> Made:
    """Clips whose frames carry their times and stand as pictures between tokens of their own."""

    borders = {
        f"{kind}_{end}": f"<|{begins}_of_{kind}|>"
        for kind in ("image", "video")
        for end, begins in (("start", "begin"), ("end", "end"))
    }
    tokenizer.add_special_tokens({"additional_special_tokens": list(borders.values())})
    small = {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}}
    processor = hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(**small),
        tokenizer,
        hf.Glm4vVideoProcessor(size={"shortest_edge": 2 * 56 * 56, "longest_edge": 4 * 56 * 56}),
        chat_template=CHAT_TEMPLATE.replace(
            "<|vision_bos|><|VIDEO|><|vision_eos|>", "<|begin_of_video|><|VIDEO|><|end_of_video|>"
        ).replace("<|vision_bos|><|IMAGE|><|vision_eos|>", "<|begin_of_image|><|IMAGE|><|end_of_image|>"),
    )
    config = hf.Glm4vConfig(
        text_config=_text(tokenizer, sizes, rope_parameters=_rope(sizes) | {"partial_rotary_factor": 1.0}),
        vision_config={
            "depth": sizes.vision_layers,
            "hidden_size": sizes.vision_width,
            "intermediate_size": 2 * sizes.vision_width,
            "num_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "out_hidden_size": sizes.hidden,
            "initializer_range": sizes.initializer_range,
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in borders.items()},
        **_ids(tokenizer, SEEN),
        tie_word_embeddings=True,
    )
    return Made(hf.Glm4vForConditionalGeneration, config, processor)


def _lfm2_vl(tokenizer: Any, sizes: TinySizes) -> Made:
    """Pictures in tiles; layers of short convolutions between those of attention."""

    tiles = [f"<|img_row_{row}_col_{column}|>" for row, column in ((1, 1), (1, 2), (2, 1))]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|img_thumbnail|>", *tiles]})
    around = [MEDIA_TOKENS[name] for name in ("image_token", "vision_bos_token", "vision_eos_token")]
    names = dict(zip(("image_token", "image_start_token", "image_end_token"), around, strict=True))
    tokenizer._set_model_specific_special_tokens(names)
    image = hf.Lfm2VlImageProcessor(
        max_tiles=2,
        min_image_tokens=4,
        max_image_tokens=16,
        encoder_patch_size=8,
        tile_size=64,
        size={"height": 64, "width": 64},
    )
    template = CHAT_TEMPLATE.replace("<|vision_bos|><|IMAGE|><|vision_eos|>", "<|IMAGE|>")
    processor = hf.Lfm2VlProcessor(image, tokenizer, chat_template=template)
    kinds = ["conv"] * (sizes.layers - 1) + ["full_attention"]
    config = hf.Lfm2VlConfig(
        text_config=_text(tokenizer, sizes, model_type="lfm2", layer_types=kinds, block_multiple_of=16),
        vision_config=_siglip(sizes) | {"patch_size": 8, "num_patches": 64, "vision_use_head": False},
        projector_hidden_size=sizes.hidden,
        **_ids(tokenizer, {"image_token_id": "image_token"}),
    )
    return Made(hf.Lfm2VlForConditionalGeneration, config, processor)


def _qwen3_5(tokenizer: Any, sizes: TinySizes) -> Made:
    """Layers of linear attention; the processor of Qwen3-VL; a template that opens thinking."""

    processor = _qwen3_vl(tokenizer, sizes).processor
    begins = "<|im_start|>assistant\n"
    processor.chat_template = CHAT_TEMPLATE.replace(
        f"{begins}{{% endif -%}}",
        f"{begins}{{% if enable_thinking | default(true) %}}{{{{ '<think>\\n' }}}}"
        "{% else %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif -%}",
    )
    kinds = ["linear_attention"] * (sizes.layers - 1) + ["full_attention"]
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    linear |= {"linear_num_value_heads": 4, "head_dim": sizes.hidden // sizes.heads}
    rope = _rope(sizes, mrope_interleaved=True, partial_rotary_factor=1.0)
    vision = {name: value for name, value in _deepstack_vision(sizes).items() if name != "deepstack_visual_indexes"}
    config = hf.Qwen3_5Config(
        text_config=_text(tokenizer, sizes, rope_parameters=rope, layer_types=kinds, **linear),
        vision_config=vision,
        **_ids(tokenizer, SEEN | BORDERS),
        tie_word_embeddings=True,
    )
    return Made(hf.Qwen3_5ForConditionalGeneration, config, processor)


def _music_flamingo(tokenizer: Any, sizes: TinySizes) -> Made:
    """Audio Flamingo 3 with the times of a sound's steps."""

    _, heard, other = _audio_flamingo(tokenizer, sizes)
    names = {name: MEDIA_TOKENS[name] for name in ("audio_token", "audio_bos_token", "audio_eos_token")}
    template = CHAT_TEMPLATE.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", "<|AUDIO|>")
    processor = hf.MusicFlamingoProcessor(other.feature_extractor, tokenizer, chat_template=template, **names)
    config = hf.MusicFlamingoConfig(
        audio_config=heard.audio_config.to_dict(),
        text_config=heard.text_config.to_dict(),
        **_ids(tokenizer, {f"{name}_id": name for name in names}),
    )
    return Made(hf.MusicFlamingoForConditionalGeneration, config, processor)


def _siglip(sizes: TinySizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.vision_width,
        "intermediate_size": 2 * sizes.vision_width,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": 4,
    }


def _gemma3(tokenizer: Any, sizes: TinySizes) -> Made:
    """Images of one size, two-way attention inside them, a token of its own at the end of a turn."""

    ids = _gemma_tokens(tokenizer, GEMMA3_TOKENS)
    image = hf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = hf.Gemma3Processor(image, tokenizer, chat_template=_gemma_template(), image_seq_length=4)
    head = {"head_dim": sizes.hidden // sizes.heads, "query_pre_attn_scalar": 16, "sliding_window": 64}
    config = hf.Gemma3Config(
        text_config=_text(tokenizer, sizes, **head),
        vision_config=_siglip(sizes) | {"image_size": 56, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        tie_word_embeddings=True,
        initializer_range=sizes.initializer_range,
    )
    return Made(hf.Gemma3ForConditionalGeneration, config, processor)


def _gemma4(tokenizer: Any, sizes: TinySizes) -> Made:
    """Sound, images and clips, whose frames carry their times; caps its logits."""

    ids = _gemma_tokens(tokenizer, GEMMA4_TOKENS)
    small: dict[str, Any] = {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    processor = hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessor(**small),
        tokenizer,
        hf.Gemma4VideoProcessor(**small),
        chat_template=_gemma_template("<|video|>"),
        image_seq_length=70,
    )
    head = {"head_dim": sizes.hidden // sizes.heads, "global_head_dim": sizes.hidden // sizes.heads}
    kinds = ["sliding_attention"] * (sizes.layers - 1) + ["full_attention"]
    own = {"sliding_window": 64, "layer_types": kinds, "final_logit_softcapping": 30.0}
    own |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(tokenizer)}
    config = hf.Gemma4Config(
        text_config=_text(tokenizer, sizes, **head, **own),
        vision_config={
            "hidden_size": sizes.vision_width,
            "intermediate_size": 2 * sizes.vision_width,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": sizes.vision_width // 4,
            "pooling_kernel_size": 2,
            "patch_size": 8,
            "position_embedding_size": 256,
            "initializer_range": sizes.initializer_range,
        },
        audio_config={
            "hidden_size": sizes.audio_width,
            "num_hidden_layers": sizes.audio_layers,
            "num_attention_heads": 4,
            "subsampling_conv_channels": [128, 4],
            "output_proj_dims": sizes.audio_width,
            "initializer_range": sizes.initializer_range,
        },
        image_token_id=ids["image_token"],
        boi_token_id=ids["boi_token"],
        eoi_token_id=ids["eoi_token"],
        audio_token_id=ids["audio_token"],
        boa_token_id=ids["boa_token"],
        eoa_token_index=ids["eoa_token"],
        video_token_id=processor.video_token_id,
        tie_word_embeddings=True,
        initializer_range=sizes.initializer_range,
    )
    return Made(hf.Gemma4ForConditionalGeneration, config, processor)


def _gemma3n(tokenizer: Any, sizes: TinySizes) -> Made:
    """Four states a token, sound of one length, and images by a tower of convolutions, which timm has."""

    if find_spec("timm") is None:
        fix = "pip install timm, or use another family."
        raise InputError("sees by a tower of timm, which is not installed", where="gemma3n", fix=fix)
    ids = _gemma_tokens(tokenizer, GEMMA3_TOKENS | GEMMA3N_TOKENS)
    template = GEMMA_TEMPLATE.replace("IMAGE", "<image_soft_token>").replace("AUDIO", "<audio_soft_token>")
    processor = hf.Gemma3nProcessor(
        hf.Gemma3nAudioFeatureExtractor(),
        hf.SiglipImageProcessor(size={"height": 64, "width": 64}, do_normalize=False),
        tokenizer,
        chat_template=template.replace("VIDEO", ""),
        image_seq_length=4,
        audio_seq_length=25,
    )
    kinds = ["full_attention", *["sliding_attention"] * (sizes.layers - 2), "full_attention"]
    own = {"head_dim": sizes.hidden // sizes.heads, "sliding_window": 64, "layer_types": kinds, "laurel_rank": 8}
    own |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(tokenizer), "num_kv_shared_layers": 1}
    own |= {"activation_sparsity_pattern": [0.5] + [0.0] * (sizes.layers - 1)}
    own |= {"pad_token_id": None}  # else its row of the embeddings is zero, whose size has no gradient
    own |= {"vocab_size": len(tokenizer) + 4}  # behind the tokens of text two of images and two of sound
    config = hf.Gemma3nConfig(
        text_config=_text(tokenizer, sizes, **own),
        vision_config={  # an architecture of timm's own tests in place of mobilenetv5_300m_enc
            "architecture": "test_convnext",
            "hidden_size": 64,
            "label_names": ["none"],
            "vocab_size": 2,
            "vocab_offset": len(tokenizer),
        },
        audio_config={
            "hidden_size": sizes.audio_width,
            "conf_num_attention_heads": 4,
            "conf_num_hidden_layers": sizes.audio_layers,
            "sscp_conv_channel_size": (16, 4),
            "vocab_size": 2,
            "vocab_offset": len(tokenizer) + 2,
        },
        image_token_id=ids["image_token"],
        boi_token_id=ids["boi_token"],
        eoi_token_id=ids["eoi_token"],
        audio_token_id=ids["audio_token"],
        boa_token_id=ids["boa_token"],
        eoa_token_id=ids["eoa_token"],
        vision_soft_tokens_per_image=4,
        audio_soft_tokens_per_image=25,
        tie_word_embeddings=True,
        initializer_range=sizes.initializer_range,
    )
    return Made(hf.Gemma3nForConditionalGeneration, config, processor)


def _gemma_tokens(tokenizer: Any, media: Mapping[str, str]) -> dict[str, int]:
    """Put the tokens of a Gemma into a tokenizer; gives the ids of those of media."""
    added = ["<start_of_turn>", "<end_of_turn>", "<bos>", "<|video|>", *media.values()]
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": added})
    tokenizer._set_model_specific_special_tokens(dict(media))
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in media.items()}


def _gemma_template(video: str = "") -> str:
    image = "<|image|>" if video else "<start_of_image>"
    return GEMMA_TEMPLATE.replace("IMAGE", image).replace("VIDEO", video).replace("AUDIO", "<|audio|>" if video else "")


def _llama(tokenizer: Any, sizes: TinySizes) -> Made:
    """Text alone, so that its processor is its tokenizer, whose template takes a turn as one text."""

    tokenizer.chat_template = TEXT_TEMPLATE
    tokenizer._processor_class = tokenizer.init_kwargs["processor_class"] = None  # it may come from another family
    return Made(hf.LlamaForCausalLM, hf.LlamaConfig(**_text(tokenizer, sizes)), tokenizer)


FAMILIES = {
    "qwen2.5-omni": TinyFamily(modalities=("image", "video", "audio"), make=_qwen2_5_omni),
    "qwen3-omni": TinyFamily(modalities=("image", "video", "audio"), make=_qwen3_omni),
    "gemma4": TinyFamily(modalities=("image", "video", "audio"), make=_gemma4),
    "qwen2.5-vl": TinyFamily(modalities=("image", "video"), make=_qwen2_5_vl),
    "qwen3-vl": TinyFamily(modalities=("image", "video"), make=_qwen3_vl),
    "video-llama3": TinyFamily(modalities=("image", "video"), make=_video_llama3),
    "minicpm-v": TinyFamily(modalities=("image", "video"), make=_minicpmv),
    "phi4": TinyFamily(modalities=("image", "video", "audio"), make=_phi4),
    "gemma3": TinyFamily(modalities=("image", "video"), make=_gemma3),
    "gemma3n": TinyFamily(modalities=("image", "video", "audio"), make=_gemma3n),
    "qwen2-audio": TinyFamily(modalities=("audio",), make=_qwen2_audio),
    "qwen3.5": TinyFamily(modalities=("image", "video"), make=_qwen3_5),
    "internvl": TinyFamily(modalities=("image", "video"), make=_internvl),
    "llava-onevision": TinyFamily(modalities=("image", "video"), make=_llava_onevision),
    "smolvlm": TinyFamily(modalities=("image", "video"), make=_smolvlm),
    "glm4v": TinyFamily(modalities=("image", "video"), make=_glm4v),
    "lfm2-vl": TinyFamily(modalities=("image", "video"), make=_lfm2_vl),
    "music-flamingo": TinyFamily(modalities=("audio",), make=_music_flamingo),
    "voxtral": TinyFamily(modalities=("audio",), make=_voxtral),
    "audio-flamingo3": TinyFamily(modalities=("audio",), make=_audio_flamingo),
    "llama": TinyFamily(modalities=(), make=_llama),
}


def atlas_texts(atlas: Atlas) -> Iterator[str]:
    """The prompts and answers of an atlas in every format that comes with the package, for the tokenizer.

    Qwen's tokenizer spells `<think>` and `\\boxed{` in few tokens, and so must this one: a model that has to spell
    them slips.
    """
    formats = [AnswerFormat(path.stem) for path in sorted(FORMATS.glob("*.jinja"))]
    for sample in atlas.with_answers():
        for each in formats:
            yield each.prompt(sample.problem)
            yield each.response(sample.target, sample.target if each.shows_reasoning else None)
