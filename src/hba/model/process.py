"""What every process with a model does first: threads, seeds, accelerator."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers.utils import logging as transformers_logging

from hba.environment import usable_cores
from hba.errors import ConfigError
from hba.model.checkpoint import resolve_dtype

FEW_CORES = 4
_SHARDING_LAUNCHERS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


def prepare_process(seed: int) -> None:
    """Seed every generator; use no more threads than this process has cores, on a CPU with few of them one.

    Two threads that wait for each other are slower than one.
    """
    # Its bars for weights and shards would mix with the command's own progress.
    transformers_logging.disable_progress_bar()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if not torch.cuda.is_available():
        # Denormal numbers, common in tiny networks, slow a CPU down many times.
        torch.set_flush_denormal(True)
    cores = usable_cores()
    alone = cores <= FEW_CORES and not torch.cuda.is_available()
    torch.set_num_threads(1 if alone else min(torch.get_num_threads(), cores))


def start_accelerator(dtype: str) -> Accelerator:
    """The accelerator of this process; forward passes run in bfloat16 where `dtype` resolves to it.

    Raises ConfigError when the launcher would shard models by itself: there is one way, which checkpoints know of.
    """
    launched = [name for name in _SHARDING_LAUNCHERS if os.environ.get(name, "false").lower() == "true"]
    if launched:
        fix = "Launch without it and set train.sharding=full."
        raise ConfigError("the launcher shards models in a way of its own", where=launched[0], fix=fix)
    mixed = "bf16" if resolve_dtype(dtype) is torch.bfloat16 else "no"
    # A notebook trains in one precision, then in another; accelerate keeps the first for the life of the process.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=mixed)
