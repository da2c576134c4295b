"""What every process of verl imports first (VERL_USE_EXTERNAL_MODULES): all that verl knows by name, the model config
and the agent among it.

verl is not changed: these are its registries. `tests/with_verl/test_contract.py` pins each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoProcessor
from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import RolloutReplicaRegistry

import hba.rl.verl.trainer  # noqa: F401  # registers itself, as the agent does
from hba.evaluate.backends.wire import frame_rate
from hba.model.generate import BANNED_BIAS
from hba.rl.verl import thinker
from hba.rl.verl.config import AGENT


def _vllm_replica() -> Any:
    from hba.rl.verl.vllm_replica import OmniVllmReplica

    return OmniVllmReplica


thinker.register()
RolloutReplicaRegistry.register("vllm", _vllm_replica)


@dataclass
class OmniModelConfig(HFModelConfig):  # type: ignore[misc]
    """verl's `actor_rollout_ref.model._target_`, for a folder or hub id of the whole Qwen2.5-Omni: its model config
    with the processor that verl has not for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        text = self.hf_config.thinker_config.text_config
        self.hf_config.tie_word_embeddings = bool(getattr(text, "tie_word_embeddings", False))
        self.hf_config.max_position_embeddings = text.max_position_embeddings
        # By this name verl finds the class with which it writes Hugging Face checkpoints.
        self.hf_config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
        if self.load_tokenizer:
            real = AutoProcessor.from_pretrained(self.local_tokenizer_path, trust_remote_code=False)
            self.processor = thinker.OmniProcessor(real, self.hf_config)
            self.hf_config.hba_media_token_ids = self.processor.media_token_ids
            if self.custom_chat_template is not None:
                self.processor.chat_template = self.custom_chat_template


# verl's agent loop for one answer to a prompt with media: placeholders collapsed, media tokens banned, times kept.
#
# A sampling engine expands one placeholder a medium itself. verl collapses those of images and videos before it sends a
# prompt, and leaves those of sounds expanded: an audio would arrive with more tokens than it has.


class OmniClient:
    """verl's client of the sampling engines, in front of which prompts and sampling parameters are put right."""

    def __init__(self, client: Any, processor: Any) -> None:
        self._client, self._processor = client, processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(
        self, request_id: str, *, prompt_ids: Sequence[int], sampling_params: dict[str, Any], **request: Any
    ) -> Any:
        """verl's call, for a prompt whose placeholders are expanded."""
        sampling = {**sampling_params, "logit_bias": dict.fromkeys(self._processor.media_token_ids, BANNED_BIAS)}
        rates = [float(metadata["fps"]) for _, metadata in request.get("video_data") or ()]
        request["mm_processor_kwargs"] = {**(request.get("mm_processor_kwargs") or {}), **frame_rate(rates)}
        prompt = self._processor.collapsed(prompt_ids)
        return await self._client.generate(request_id, prompt_ids=prompt, sampling_params=sampling, **request)


@register(AGENT)
class OmniAgentLoop(SingleTurnAgentLoop):  # type: ignore[misc]
    """One answer a rollout."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.server_manager: Any = OmniClient(self.server_manager, self.processor)

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **columns: Any) -> Any:
        """verl's call. Evaluations of verl are greedy; the row says whether this response is sampled."""
        if columns["way"] == "sampled":
            sampling_params = {**sampling_params, "temperature": self.rollout_config.temperature}
        return await super().run(sampling_params, priority, **columns)
