"""Tiny chat models of other families than Qwen2.5-Omni: real classes, real processors, random weights."""

import torch

QWEN_VL = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content -%}
{% if item.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif item.type == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>
{%- elif item.type == 'text' %}{{ item.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
QWEN_AUDIO = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content -%}
{% if item.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>
{%- elif item.type == 'text' %}{{ item.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
# As Gemma's: a begin token, the role 'model', and a token of its own at the end of a turn.
GEMMA = """\
{{- bos_token -}}
{%- for message in messages -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{% if message.content is string %}{{ message.content | trim }}{% else %}{% for item in message.content -%}
{% if item.type == 'image' %}<start_of_image>{% elif item.type == 'text' %}{{ item.text | trim }}{% endif %}
{%- endfor %}{% endif %}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif -%}
"""
LLAMA = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
GEMMA_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def text_config(tokenizer, **more):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.1,
        **more,
    }


def qwen_vl(tokenizer):
    """Qwen2.5-VL: images and videos, multimodal rotary positions from the kinds of tokens."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**patches), tokenizer, Qwen2VLVideoProcessor(**patches), chat_template=QWEN_VL
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config=text_config(tokenizer, rope_parameters=rope),
        vision_config={
            "depth": 2, "hidden_size": 48, "intermediate_size": 96, "num_heads": 4, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": 64,
            "fullatt_block_indexes": [1], "initializer_range": 0.1,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMAGE|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|VIDEO|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_bos|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_eos|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration, config, processor


def qwen_audio(tokenizer):
    """Qwen2-Audio: sound alone, every audio padded to the window of its processor."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=4)
    names = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    processor = Qwen2AudioProcessor(extractor, tokenizer, chat_template=QWEN_AUDIO, **names)
    config = Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": 80, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128,
            "d_model": 64, "max_source_positions": 200, "init_std": 0.1,
        },
        text_config=text_config(tokenizer, model_type="qwen2"),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )  # fmt: skip
    return Qwen2AudioForConditionalGeneration, config, processor


def gemma(tokenizer):
    """Gemma 3: images of one size, two-way attention inside them, its own token at the end of a turn."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    added = ["<start_of_turn>", "<end_of_turn>", "<bos>", *GEMMA_TOKENS.values()]
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": added})
    for name, token in GEMMA_TOKENS.items():
        tokenizer._set_model_specific_special_tokens({name: token})
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 56, "width": 56}), tokenizer, chat_template=GEMMA, image_seq_length=4
    )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in GEMMA_TOKENS.items()}
    config = Gemma3Config(
        text_config=text_config(tokenizer, head_dim=16, sliding_window=64, query_pre_attn_scalar=16),
        vision_config={
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        tie_word_embeddings=True,
        initializer_range=0.1,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration, config, processor


def llama(tokenizer):
    """Llama: text alone, so that its processor is its tokenizer, whose template takes a turn as one text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer.chat_template = LLAMA
    tokenizer._processor_class = tokenizer.init_kwargs["processor_class"] = None  # it was saved with another family's
    return LlamaForCausalLM, LlamaConfig(**text_config(tokenizer)), tokenizer


FAMILIES = {"qwen_vl": qwen_vl, "qwen_audio": qwen_audio, "gemma": gemma, "llama": llama}
MODALITIES = {"qwen_vl": ("image", "video"), "qwen_audio": ("audio",), "gemma": ("image", "video"), "llama": ()}


def build(family, backbone, out):
    """Save a tiny model of `family`, whose tokenizer is that of the tiny `backbone`, into the folder `out`."""
    from transformers import AutoTokenizer

    model_class, config, processor = FAMILIES[family](AutoTokenizer.from_pretrained(backbone))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class._from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # Gemma's projector of images starts at zero
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out
