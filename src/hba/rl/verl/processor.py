"""The processor as verl calls it: hba's features, and what verl asks of a processor beyond transformers' interface.

verl gives no processor for Qwen2.5-Omni, and its way of calling one loses the times of frames and pads sounds to 30 s.
`OmniProcessor` stands in front of the real one and answers verl's calls with `omni_features`, so that prompts and
features are those of the local engine, token for token.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import BatchFeature, Qwen2_5OmniThinkerForConditionalGeneration

from hba.atlas.omni_features import omni_features
from hba.model.generate import media_token_ids

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
        return BatchFeature(omni_features(self._processor, prompt, *media, spans, pixels=pixels))

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
