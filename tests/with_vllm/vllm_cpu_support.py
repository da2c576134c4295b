"""What verl's own vLLM replica needs beside `cpu_support` to run on the CPU build of vLLM, for tests alone.

Loaded through `verl.modules`. Nothing here is part of hba.
"""

from hba.rl.verl import plugin


def _replica():
    from hba.rl.verl.vllm_replica import OmniVllmReplica, OmniVllmServer

    OmniVllmServer._get_worker_extension_cls = lambda self: "vllm_cpu_worker.CpuWorker"
    return OmniVllmReplica


plugin.RolloutReplicaRegistry.register("vllm", _replica)
