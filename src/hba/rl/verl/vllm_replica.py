"""verl's vLLM replica with our processor: its server builds verl's own model config whatever `_target_` says.

Without it the server has no processor for Qwen2.5-Omni, and sends no media. Read where vLLM samples, and nowhere else:
verl's module of it can be imported only beside vLLM.
"""

from __future__ import annotations

from typing import Any

import ray
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica


class OmniVllmServer(vLLMHttpServer):  # type: ignore[misc]
    """verl's server."""

    def _init_model_config(self, model_config: Any) -> Any:
        return omega_conf_to_dataclass(model_config)


class OmniVllmReplica(vLLMReplica):  # type: ignore[misc]
    """verl's replica, which starts our server."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.server_class = ray.remote(OmniVllmServer)
