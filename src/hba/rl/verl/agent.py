"""verl's agent loop for one answer to a prompt with media: placeholders collapsed, media tokens banned, times kept.

A sampling engine expands one placeholder a medium itself. verl collapses those of images and videos before it sends a
prompt, and leaves those of sounds expanded: an audio would arrive with more tokens than it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from hba.errors import InputError
from hba.rl.verl.config import AGENT

BANNED_BIAS = -100.0  # as far down as vLLM's logit_bias goes


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
        request["mm_processor_kwargs"] = {**(request.get("mm_processor_kwargs") or {}), **_frame_rate(request)}
        prompt = self._processor.collapsed(prompt_ids)
        return await self._client.generate(request_id, prompt_ids=prompt, sampling_params=sampling, **request)


def _frame_rate(request: dict[str, Any]) -> dict[str, float]:
    """`fps`, from which the engine's processor takes the times of all videos of a prompt.

    Raises InputError for videos of different spans: one number cannot say both.
    """
    exact = [float(metadata["fps"]) for _, metadata in request.get("video_data") or ()]
    rates = {round(rate, 6) for rate in exact}
    if len(rates) > 1:
        fix = "Train on rows of one video, or with the local engine."
        raise InputError(f"videos of one prompt have {len(rates)} different frame rates", fix=fix)
    return {"fps": exact[0]} if exact else {}  # rounded, it would move positions by one


@register(AGENT)
class OmniAgentLoop(SingleTurnAgentLoop):  # type: ignore[misc]
    """One answer a rollout."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.server_manager: Any = OmniClient(self.server_manager, self.processor)

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **columns: Any) -> Any:
        """verl's call. Evaluations of verl are greedy; the row says whether this response is the sampled one."""
        if columns["way"] == "sampled":
            sampling_params = {**sampling_params, "temperature": self.rollout_config.temperature}
        return await super().run(sampling_params, priority, **columns)
