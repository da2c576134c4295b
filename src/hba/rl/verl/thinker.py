"""Policy and processor as verl calls them: the thinker inside a model whose weights are named as in the release.

vLLM's loader expects the prefix `thinker.`, which a bare thinker has not. Both towers run in every pass, on a stand-in
where a medium is absent: ranks whose micro-batches differ in their media would wait for each other's layers forever.
Media tokens have no probability, as in the sampling (the local engine's rule, with a finite number, since verl's
entropy multiplies by it).

Shapes: B rows, T tokens, H hidden size, V vocabulary, M mel bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BatchFeature,
    GenerationMixin,
    Qwen2_5OmniConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniPreTrainedModel

from hba.batch.encode import features_of
from hba.errors import InputError
from hba.model.generate import media_token_ids

# FSDP2 wraps these; a list with a whole tower in it would be wrapped twice.
LEAF_LAYERS = ["Qwen2_5OmniDecoderLayer", "Qwen2_5OmniVisionBlock", "Qwen2_5OmniAudioEncoderLayer"]
TRAINED_LAYERS = ("thinker.model.layers.", "thinker.model.norm.")
NEVER = -1e4  # logit of a token that is not sampled
STAND_IN_FRAMES, STAND_IN_GRID = 8, (1, 4, 4)


class OmniForConditionalGeneration(Qwen2_5OmniPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """`forward` takes what verl collects: padded tokens, positions [4, B, T] and the media of all rows in a row.

    verl tells from the end of the class's name how it writes a checkpoint.
    """

    config_class = Qwen2_5OmniConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = LEAF_LAYERS
    _keys_to_ignore_on_load_unexpected = (r"^talker\.", r"^token2wav\.")
    _tied_weights_keys = {"thinker.lm_head.weight": "thinker.model.embed_tokens.weight"}  # noqa: RUF012  # where tied

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.thinker = Thinker(config.thinker_config)
        self.post_init()
        self._no_split_modules = LEAF_LAYERS  # transformers adds those of the children
        self._banned = getattr(config, "hba_media_token_ids", None) or media_token_ids(config.thinker_config)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> OmniForConditionalGeneration:
        """transformers' own; then, where the config has `hba_language_layers_alone`, nothing else is trained."""
        policy: OmniForConditionalGeneration = super().from_pretrained(*args, **options)
        if getattr(policy.config, "hba_language_layers_alone", False):
            for name, parameter in policy.named_parameters():  # loading makes parameters anew
                parameter.requires_grad = name.startswith(TRAINED_LAYERS)
        return policy

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings."""
        return self.thinker.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.thinker.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """lm_head."""
        return self.thinker.lm_head  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        **media: Any,
    ) -> Any:
        """Output of the thinker, `logits` [B, T, V]. Raises InputError where tokens and features differ in number."""
        thinker = self.thinker
        embeddings_BTH = thinker.get_input_embeddings()(input_ids)
        embeddings_BTH = self._with_audio(embeddings_BTH, input_ids, media)
        embeddings_BTH = self._with_vision(embeddings_BTH, input_ids, media)
        output = thinker(
            inputs_embeds=embeddings_BTH, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )
        banned_V = torch.zeros(output.logits.shape[-1], dtype=torch.bool, device=output.logits.device)
        banned_V[self._banned] = True
        output.logits = output.logits.masked_fill(banned_V, NEVER)
        return output

    def _with_audio(self, embeddings_BTH: Tensor, input_ids: Tensor, media: Mapping[str, Any]) -> Tensor:
        features, mask = media.get("input_features"), media.get("feature_attention_mask")
        if features is not None:
            audio = self.thinker.get_audio_features(features.to(embeddings_BTH.dtype), mask).last_hidden_state
            return _placed(embeddings_BTH, input_ids, audio, self.thinker.config.audio_token_id, "audio")
        bins = self.thinker.config.audio_config.num_mel_bins
        silence_1MF = embeddings_BTH.new_zeros(1, bins, STAND_IN_FRAMES)
        mask_1F = torch.ones(1, STAND_IN_FRAMES, dtype=torch.long, device=input_ids.device)
        silent: Tensor = self.thinker.get_audio_features(silence_1MF, mask_1F).last_hidden_state
        return embeddings_BTH + 0 * silent.sum()

    def _with_vision(self, embeddings_BTH: Tensor, input_ids: Tensor, media: Mapping[str, Any]) -> Tensor:
        thinker, seen = self.thinker, False
        for kind, patches, grid in (
            ("image", media.get("pixel_values"), media.get("image_grid_thw")),
            ("video", media.get("pixel_values_videos"), media.get("video_grid_thw")),
        ):
            if patches is not None:
                found = thinker.get_image_features(patches.to(embeddings_BTH.dtype), grid).pooler_output
                token = getattr(thinker.config, f"{kind}_token_id")
                embeddings_BTH = _placed(embeddings_BTH, input_ids, found, token, kind)
                seen = True
        if seen:
            return embeddings_BTH
        vision = thinker.config.vision_config
        values = 3 * vision.temporal_patch_size * vision.patch_size**2
        count = STAND_IN_GRID[0] * STAND_IN_GRID[1] * STAND_IN_GRID[2]
        grid_13 = torch.tensor([STAND_IN_GRID], device=input_ids.device)
        blank: Tensor = thinker.get_image_features(embeddings_BTH.new_zeros(count, values), grid_13).pooler_output
        return embeddings_BTH + 0 * blank.sum()


def _placed(embeddings_BTH: Tensor, input_ids: Tensor, features: Tensor, token: int, kind: str) -> Tensor:
    mask_BT1 = (input_ids == token).unsqueeze(-1)
    if int(mask_BT1.sum()) != len(features):
        raise InputError(f"{int(mask_BT1.sum())} {kind} tokens for {len(features)} {kind} features")
    return embeddings_BTH.masked_scatter(mask_BT1, features.to(embeddings_BTH))


def register() -> None:
    """Make it what transformers' Auto classes build for a config of Qwen2.5-Omni, as verl asks them."""
    for auto in (AutoModel, AutoModelForImageTextToText):
        auto.register(Qwen2_5OmniConfig, OmniForConditionalGeneration, exist_ok=True)


# The processor as verl calls it: hba's features, and what verl asks of a processor beyond transformers' interface.
#
# verl gives no processor for Qwen2.5-Omni, and its way of calling one loses the times of frames and pads sounds to 30
# s. `OmniProcessor` stands in front of the real one and answers verl's calls with `features_of`, so that prompts and
# features are those of the local engine, token for token.
#
# Shapes: T tokens.


Clip = tuple[Tensor, dict[str, Any]]  # frames [N, 3, H, W], and when they were


class RopeIndex:
    """`get_rope_index` of the thinker without its weights."""

    get_rope_index = Qwen2_5OmniThinkerForConditionalGeneration.get_rope_index
    get_llm_pos_ids_for_vision = Qwen2_5OmniThinkerForConditionalGeneration.get_llm_pos_ids_for_vision
    get_chunked_index = Qwen2_5OmniThinkerForConditionalGeneration.get_chunked_index

    def __init__(self, thinker_config: Any) -> None:
        self.config = thinker_config
        self.spatial_merge_size = thinker_config.vision_config.spatial_merge_size


class OmniProcessor:
    """A Qwen2.5-Omni processor with multimodal positions; what is not here is the processor's own."""

    def __init__(self, processor: Any, config: Any) -> None:
        """`config` is that of the whole Qwen2.5-Omni."""
        self._processor = processor
        self._rope = RopeIndex(config.thinker_config)
        self.config = config
        for name in ("image", "video", "audio"):
            token = getattr(processor, f"{name}_token")
            setattr(self, f"{name}_token_id", int(processor.tokenizer.convert_tokens_to_ids(token)))
        self.media_token_ids = media_token_ids(config.thinker_config, processor)

    @property
    def real(self) -> Any:
        """The processor behind this one."""
        return self._processor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_processor":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._processor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "chat_template":  # a template that the user gives verl
            self._processor.chat_template = value
        else:
            super().__setattr__(name, value)

    def __call__(
        self,
        text: Sequence[str],
        images: Sequence[Any] | None = None,
        videos: Sequence[Tensor] | None = None,
        audio: Sequence[Any] | None = None,
        *,
        video_metadata: Sequence[Mapping[str, Any]] = (),
        min_pixels: int,
        max_pixels: int,
        **_: Any,
    ) -> BatchFeature:
        """Features of one prompt; the spans of its videos are the `duration` of their metadata."""
        (prompt,) = text
        spans = [float(metadata["duration"]) for metadata in video_metadata]
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        media = (audio or (), images or (), videos or ())
        return BatchFeature(features_of(self._processor, prompt, *media, spans, pixels=pixels))

    def collapsed(self, ids: Sequence[int]) -> list[int]:
        """`ids` with one placeholder a medium, as a sampling engine takes a prompt and expands it itself."""
        placeholders = {self.image_token_id, self.video_token_id, self.audio_token_id}
        return [token for i, token in enumerate(ids) if not (token in placeholders and i and ids[i - 1] == token)]

    def get_rope_index(self, **inputs: Any) -> Any:
        """Multimodal rotary positions [3, 1, T] of one prompt with its response, and their offsets."""
        return self._rope.get_rope_index(**inputs)

    def get_rope_index_kwargs(self, features: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """What the positions depend on besides tokens and grids."""
        mask_AF = features.get("feature_attention_mask")
        lengths = None if mask_AF is None else mask_AF.sum(-1)
        return {"audio_seqlens": lengths, "second_per_grids": features.get("video_second_per_grid")}
