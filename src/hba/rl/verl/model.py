"""verl's `actor_rollout_ref.model._target_`: the model config with the processor that verl has not for Qwen2.5-Omni."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from transformers import AutoProcessor
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from hba.rl.verl.thinker import OmniProcessor


@dataclass
class OmniModelConfig(HFModelConfig):  # type: ignore[misc]
    """verl's own, for a folder or hub id of the whole Qwen2.5-Omni."""

    def __post_init__(self) -> None:
        super().__post_init__()
        text = self.hf_config.thinker_config.text_config
        self.hf_config.tie_word_embeddings = bool(getattr(text, "tie_word_embeddings", False))
        self.hf_config.max_position_embeddings = text.max_position_embeddings
        # By this name verl finds the class with which it writes Hugging Face checkpoints.
        self.hf_config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
        if self.load_tokenizer:
            real = AutoProcessor.from_pretrained(self.local_tokenizer_path, trust_remote_code=False)
            self.processor = OmniProcessor(real, self.hf_config)
            self.hf_config.hba_media_token_ids = self.processor.media_token_ids
            if self.custom_chat_template is not None:
                self.processor.chat_template = self.custom_chat_template


# verl's vLLM replica with our processor: its server builds verl's own model config whatever `_target_` says.
#
# Without it the server has no processor for Qwen2.5-Omni, and sends no media.


class OmniVllmServer(vLLMHttpServer):  # type: ignore[misc]
    """verl's server."""

    def _init_model_config(self, model_config: Any) -> Any:
        return omega_conf_to_dataclass(model_config)


class OmniVllmReplica(vLLMReplica):  # type: ignore[misc]
    """verl's replica, which starts our server."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.server_class = ray.remote(OmniVllmServer)
