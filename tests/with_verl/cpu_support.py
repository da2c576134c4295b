"""What verl needs to run on a CPU, for tests alone: a platform, an engine for it, and the name of `cpu_rollout`.

Loaded beside hba's plug-in through `verl.modules`. Nothing here is part of hba.
"""

import contextlib
import types

import torch
import torch.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

NAME = "transformers_cpu"


def _nothing(*_, **__):
    return None


DEVICE = types.ModuleType("hba_cpu_device")
for _name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect"):
    setattr(DEVICE, _name, _nothing)
for _name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved", "current_device"):
    setattr(DEVICE, _name, lambda *_: 0)
DEVICE.is_available, DEVICE.device_count, DEVICE.mem_get_info = lambda: True, lambda: 1, lambda *_: (0, 0)
DEVICE.manual_seed = DEVICE.manual_seed_all = torch.manual_seed
DEVICE.get_rng_state, DEVICE.set_rng_state = lambda *_: torch.get_rng_state(), lambda s, *_: torch.set_rng_state(s)
DEVICE.get_device_name = lambda *_: "cpu"


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: DEVICE)

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def get_device_capability(self, *_):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, *_):
        yield

    def ray_resource_name(self):
        return "GPU"  # ray.init(num_gpus=N) says that there are some

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed
    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = _nothing


# These ask for the platform when they are imported.
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp import transformer_impl  # noqa: E402
from verl.workers.rollout import base as rollout_base  # noqa: E402
from verl.workers.rollout.replica import RolloutReplicaRegistry  # noqa: E402

EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(
    transformer_impl.FSDPEngineWithLMHead
)

# verl keeps the policy of the start in pinned memory, which only a GPU has.
_offload = transformer_impl.CPUOffloadPolicy
transformer_impl.CPUOffloadPolicy = lambda **_: _offload(pin_memory=False)

# verl names the backend "cpu:gloo,{device}:{backend}", which on a CPU names one device twice.
_init_process_group = torch.distributed.init_process_group


def _one_backend(backend=None, **options):
    doubled = isinstance(backend, str) and backend.count("cpu:") > 1
    return _init_process_group(backend="gloo" if doubled else backend, **options)


torch.distributed.init_process_group = _one_backend


def _replica():
    from cpu_rollout import Replica

    return Replica


RolloutReplicaRegistry.register(NAME, _replica)
rollout_base._ROLLOUT_REGISTRY[(NAME, "async")] = "cpu_rollout.Adapter"
