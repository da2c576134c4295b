"""The tiny backbone: the real Qwen2.5-Omni thinker and processor classes with small dimensions, built offline.

About 0.4 million parameters, random weights, and a tokenizer trained on an atlas' own prompts. It is saved like any
checkpoint and loaded through `from_pretrained`, so that nothing downstream knows it from Qwen2.5-Omni-7B.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hba.atlas import Atlas
from hba.batch.prompt import FORMATS, AnswerFormat
from hba.errors import InputError
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


def build_tiny(out: str | Path, texts: Iterable[str], *, seed: int, sizes: TinySizes | None = None) -> Path:
    """Write a tiny backbone and its processor to `out` and return it. `texts` trains the tokenizer.

    Deterministic in (texts, seed, sizes); works without a network. Raises InputError when `out` holds anything else
    than this backbone: nothing is ever written over.
    """
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    sizes = sizes or TinySizes()
    processor = _processor(_tokenizer(list(texts), sizes.vocabulary))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = _config(processor.tokenizer, sizes)
        model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config)
    with atomic_folder(Path(out).absolute()) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
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
    from transformers import Qwen2Tokenizer

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
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        padding_side="left",
        extra_special_tokens=MEDIA_TOKENS,
    )


def _processor(tokenizer: Any) -> Any:
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    extractor = WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16000, hop_length=160, chunk_length=300, n_fft=400, return_attention_mask=True
    )
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        video_processor=Qwen2VLVideoProcessor(**patches),
        feature_extractor=extractor,
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def _config(tokenizer: Any, sizes: TinySizes) -> Any:
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in MEDIA_TOKENS.items()}
    scale = {"initializer_range": sizes.initializer_range}
    return Qwen2_5OmniThinkerConfig(
        text_config=_text_config(tokenizer, sizes) | scale,
        audio_config=_audio_config(sizes) | scale,
        vision_config=_vision_config(sizes) | scale,
        audio_token_index=ids["audio_token"],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        # Not a field of the config class, but its rope index reads it for video.
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        tie_word_embeddings=True,
        **scale,
    )


def _text_config(tokenizer: Any, sizes: TinySizes) -> dict[str, Any]:
    half = sizes.hidden // sizes.heads // 2
    temporal, height = half // 4, (half - half // 4) // 2
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
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [temporal, height, half - temporal - height],
        },
    }


def _audio_config(sizes: TinySizes) -> dict[str, Any]:
    return {
        "num_mel_bins": 128,
        "encoder_layers": sizes.audio_layers,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * sizes.audio_width,
        "d_model": sizes.audio_width,
        "max_source_positions": 1500,
        "n_window": 100,
        "output_dim": sizes.hidden,
    }


def _vision_config(sizes: TinySizes) -> dict[str, Any]:
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
    }


def atlas_texts(atlas: Atlas) -> Iterator[str]:
    """The prompts and answers of an atlas in every format that comes with the package, for the tokenizer.

    Qwen's tokenizer spells `<think>` and `\\boxed{` in few tokens, and so must this one: a model that has to spell
    them slips.
    """
    formats = [AnswerFormat(path.stem) for path in sorted(FORMATS.glob("*.jinja"))]
    for sample in atlas:
        for each in formats:
            yield each.prompt(sample.problem)
            yield each.response(sample.target, sample.target if each.shows_reasoning else None)
