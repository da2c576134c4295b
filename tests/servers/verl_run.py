"""verl on a CPU as tests start it: the keys and the environment that `hba train rl --engine verl` needs there."""

import json
import os
from pathlib import Path

TESTS = Path(__file__).parents[1]


def on_a_cpu(gpus):
    """Overrides of verl's own keys: `gpus` are processes of the actor, which Ray takes for GPUs."""
    return [
        *("trainer.device=cpu", f"++ray_kwargs.ray_init.num_gpus={gpus}", "ray_kwargs.ray_init.num_cpus=16"),
        "++ray_kwargs.ray_init.include_dashboard=false",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    ]


def environment(*folders):
    """Of a process that finds hba and the modules in `folders`."""
    paths = os.pathsep.join(map(str, [TESTS.parent / "src", *folders]))
    # Ray would start its workers at niceness 15, and end them when whoever fills the machine's memory.
    ray = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0", "RAY_memory_monitor_refresh_ms": "0"}
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **ray}


def lines(path):
    """The records of a file of JSON lines, none of a missing one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
