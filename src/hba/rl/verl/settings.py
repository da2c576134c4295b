"""What only verl needs to know of a run: the cluster, and the engine that samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hba.config import option

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class VerlConfig:
    """Read by `--engine verl` alone; nothing of it but `overrides` and `modules` changes what is computed."""

    nodes: Count = option(1, "machines", affects_result=False)
    gpus_per_node: Count = option(8, "GPUs of each machine", affects_result=False)
    rollout: str = option("vllm", "engine that samples: vllm, or one that a module of yours registers with verl")
    tensor_parallel: Count = option(1, "GPUs that share one copy of the sampling engine", affects_result=False)
    gpu_memory_utilization: Share = option(0.5, "of a GPU's memory for the sampling engine", affects_result=False)
    agent_workers: Count = option(8, "processes that prepare prompts and await responses", affects_result=False)
    reward_workers: Count = option(
        1, "processes that reward, each with its encoder; one shares it among all", affects_result=False
    )
    offload: bool = option(False, "keep parameters and optimizer in main memory while sampling", affects_result=False)
    modules: tuple[str, ...] = option((), "Python modules that every process of verl imports besides hba's plug-in")
    overrides: tuple[str, ...] = option((), "verl's own keys on top, as hydra takes them: ++trainer.test_freq=5")
