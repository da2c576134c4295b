"""What every process of verl imports first (VERL_USE_EXTERNAL_MODULES): all that verl knows by name.

verl is not changed: these are its registries. `tests/with_verl/test_contract.py` pins each of them.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.replica import RolloutReplicaRegistry

import hba.rl.verl.agent
import hba.rl.verl.trainer  # noqa: F401  # registers itself, as the agent does
from hba.rl.verl import thinker


def _vllm_replica() -> Any:
    from hba.rl.verl.vllm import OmniVllmReplica

    return OmniVllmReplica


thinker.register()
RolloutReplicaRegistry.register("vllm", _vllm_replica)
