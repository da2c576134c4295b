"""Memory of each rank while a sharded model of 2 GB is loaded: mapped from its files and dealt out, against whole.

    python benchmarks/load_memory.py [--keep FOLDER]

Prints lines of JSON. The model is that of merge_memory.py (1.9 GB in bfloat16). Ranks over gloo load it as `hba train`
does with `train.sharding=full`, everything training (float32 masters, 3.8 GB) or LoRA alone (frozen weights in
bfloat16), one rank after the other so that the machine need not hold what all of them would together. What is summed
over the ranks is the peak of each one's private memory (RssAnon: what is mapped from files is the kernel's to drop, and
there once for all ranks) above what it was before, and what it keeps. `dealt_out_mb` is what a rank's share takes by
arithmetic, over all ranks. Only ratios are comparable between machines. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

WAYS = ("mapped", "whole")


def rank(folder: Path, strategy: str, way: str, turn: int) -> dict[str, float]:
    """Load and shard the model when it is the turn of this process; its private memory, in megabytes."""
    import torch.distributed
    from accelerate import Accelerator

    from hba.model import OmniSapiens
    from hba.model.config import ModelConfig
    from hba.model.omni import apply_strategy
    from hba.train.config import TrainConfig
    from hba.train.ranks import prepare_model

    accelerator = Accelerator()
    import_module("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
    dtype = "float32" if strategy == "full" else "bfloat16"
    found: dict[str, float] = {}
    model: Any = None
    for number in range(accelerator.num_processes):
        if number == turn:
            with Watched() as watched:
                model = OmniSapiens.from_pretrained(folder / "base", dtype=dtype, mapped=way == "mapped")
                apply_strategy(model, ModelConfig(name="base", strategy=strategy))
                model = prepare_model(model, accelerator, TrainConfig(sharding="full"))
            own = sum(p.to_local().nbytes for p in model.parameters())
            found = {"peak": watched.peak, "kept": watched.end, "share": own / 2**20}
        torch.distributed.barrier()
    return found


class Watched:
    """The private memory of this process above what it was at the start, while open."""

    def __enter__(self) -> Watched:
        self.peak, self.end, self._open = 0.0, 0.0, True
        self._start = private_megabytes()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()
        self.end = private_megabytes() - self._start

    def _watch(self) -> None:
        while self._open:
            self.peak = max(self.peak, private_megabytes() - self._start)
            time.sleep(0.002)


def private_megabytes() -> float:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def launch(folder: Path, strategy: str, way: str, world: int) -> dict[str, float]:
    """All ranks of one way; the sums of what they found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    command = [sys.executable, __file__, "--rank", str(folder), strategy, way]
    ranks = [
        subprocess.Popen(
            [*command, str(number)],
            env=os.environ | shared | {"RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(world)
    ]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in ranks]
    return {key: sum(each[key] for each in found) for key in found[0]}


def measure(folder: Path, base: Path | None) -> None:
    """Every strategy, way and number of ranks."""
    sys.path.insert(0, str(Path(__file__).parent))
    import merge_memory

    if base is None:
        merge_memory.peak_megabytes("build", folder)
    for strategy in ("full", "lora"):
        for world in (2, 8):
            found = {way: launch(folder, strategy, way, world) for way in WAYS}
            mapped, whole = found["mapped"], found["whole"]
            print(json.dumps({
                "strategy": strategy,
                "ranks": world,
                "dealt_out_mb": round(mapped["share"]),
                "mapped_peaks_mb": round(mapped["peak"]),
                "whole_peaks_mb": round(whole["peak"]),
                "mapped_kept_mb": round(mapped["kept"]),
                "mapped_peaks_to_dealt_out": round(mapped["peak"] / mapped["share"], 2),
                "whole_peaks_to_dealt_out": round(whole["peak"] / mapped["share"], 2),
            }), flush=True)  # fmt: skip


def main() -> None:
    """Measure in a temporary folder, or over a model that merge_memory.py has kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path, help="a folder of merge_memory.py --keep")
    parser.add_argument("--rank", nargs=4)
    options = parser.parse_args()
    if options.rank:
        place, strategy, way, turn = options.rank
        print(json.dumps(rank(Path(place), strategy, way, int(turn))))
        return
    if options.keep is not None:
        measure(options.keep, options.keep / "base")
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), None)


if __name__ == "__main__":
    main()
