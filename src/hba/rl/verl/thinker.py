"""The policy as verl's FSDP actor trains it: the thinker inside a model whose weights are named as in the release.

vLLM's loader expects the prefix `thinker.`, which a bare thinker has not. Both towers run in every pass, on a stand-in
where a medium is absent: ranks whose micro-batches differ in their media would wait for each other's layers forever.
Media tokens have no probability, as in the sampling (the local engine's rule, with a finite number, since verl's
entropy multiplies by it).

Shapes: B rows, T tokens, H hidden size, V vocabulary, M mel bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, GenerationMixin, Qwen2_5OmniConfig
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniPreTrainedModel

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
