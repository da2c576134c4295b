"""What only a GPU shows, in some ten minutes: bfloat16, resumes, sharding, memory of loading and merging, RL, vLLM.

    python benchmarks/gpu.py [--tiny] [--dry-run] [CHECK ...]

Prints a line of JSON a check, and ends with 1 if one of them failed. The model is that of merge_memory.py (the thinker
of Qwen2.5-Omni with the widths of the 3B, five layers, random weights, 2 GB), the data is the mini-atlas: nothing is
downloaded. Every command runs in a process of its own; `gpu_mb` is the most that torch held on the GPU, `main_mb` the
peak of private main memory above that of the imports, `host_waits` the lines of hba at which the host waited for the
GPU, and how often. Without a GPU, or with `--tiny`, the tiny backbone takes the model's place, figures of the GPU are
null, and what a CPU cannot show says so; the commands and what is compared are the same. `--dry-run` lists the checks.

`HBA_VLLM` names the Python of an environment with vLLM and hba, where this one has no vLLM.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import load_memory
import merge_memory

ENCODE = ("encode.num_frames=2", "encode.min_pixels=3136", "encode.max_pixels=3136")
# Seven rows a batch, four at once on the device: losses of parts are added up as at 7B.
SFT = (
    *("train.batch_size=7", "train.device_batch_size=4", "train.log_every=1", "train.max_steps=6", "train.epochs=2"),
    *("train.validate_every=6", "train.save_every=2", "train.learning_rate=1e-3", "validation_split=validation[:9]"),
)
RL = (
    *("model.strategy=full", "train.batch_size=3", "train.max_steps=2", "train.epochs=1", "train.validate_every=2"),
    *("train.learning_rate=1e-5", "loss.kl_weight=0.01", "rollout.per_prompt=3", "rollout.max_new_tokens=24"),
    *("validation_split=validation[:4]", "train_split=train[:24]"),
)
RECIPE_TOKENS, VOCABULARY, WIDTH = 5 * 2048, 151_936, 3584  # of a micro-batch of the recipe `rl` on the 7B
DIES = "HBA_BENCHMARK_DIES_AT_STEP"


class Place(NamedTuple):
    """Data and model of the checks; `tiny` without a GPU."""

    folder: Path
    tiny: bool

    @property
    def model(self) -> list[str]:
        """Overrides that name the data and the model."""
        return [f"atlas={self.folder / 'atlas'}", f"model.name={self.folder / 'base'}", *ENCODE]


def machine(_: Place) -> dict[str, Any]:
    """What is under it, and whether bfloat16 is native."""
    import torch

    from hba.model.checkpoint import resolve_dtype

    found = {"torch": torch.__version__, "auto": str(resolve_dtype("auto"))}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        require(native == (resolve_dtype("auto") is torch.bfloat16), "auto is not what torch calls native")
        found |= {"gpu": card.name, "gpu_gb": round(card.total_memory / 2**30), "native_bfloat16": native}
    return found


def load(place: Place) -> dict[str, Any]:
    """A model in bfloat16 on its way to the GPU."""
    return {"model_mb": size(place.folder / "base"), **child(place, "--load", str(place.folder / "base"))}


def bfloat16(place: Place) -> dict[str, Any]:
    """The same rows in bfloat16 and in float32: heads differ by rounding alone."""
    return child(place, "--bfloat16", str(place.folder))


def sft(place: Place) -> dict[str, Any]:
    """LoRA on a backbone in the precision that the device has: losses are finite, and where the host waits for it."""
    done = train(place, "sft", "sft", *SFT)
    require(len(losses(place.folder / "sft")) == 6, "a step has no finite loss")
    return done


def resume(place: Place) -> dict[str, Any]:
    """Killed at step 4 and resumed, against uninterrupted: bit for bit on a CPU, on a GPU as far as its kernels are."""
    require_made(place, "sft", sft)
    run = place.folder / "resumed"
    killed = train(place, "sft", run.name, *SFT, environment={DIES: "4"}, code=-signal.SIGKILL)
    again = train(place, "sft", run.name, *SFT)
    return {"killed": killed["code"], "main_mb": again["main_mb"], **difference(run, place.folder / "sft")}


def sharded(place: Place) -> dict[str, Any]:
    """FSDP over one GPU, loaded from mapped files: what is computed and saved is what a whole model gives."""
    require_made(place, "sft", sft)
    done = train(place, "sft", "sharded", *SFT, "train.sharding=full", shards=True)
    return {**done, **difference(place.folder / "sharded", place.folder / "sft")}


def everything(place: Place) -> dict[str, Any]:
    """All weights train, float32 masters under autocast, sharded, layers computed twice."""
    more = ("model.strategy=full", "train.sharding=full", "train.activation_checkpointing=true", "train.max_steps=2")
    return train(place, "sft", "full", *SFT, *more, shards=True)


def stages(place: Place) -> dict[str, Any]:
    """Stage 2 on cached features: where the caches are full the GPU holds lm_head, and no backbone."""
    base = train(place, "sft", "speaks", *SFT, "answer_weight=1")
    options = [f"atlas={place.folder / 'atlas'}", f"base={place.folder / 'speaks'}", "train.max_steps=2"]
    options += [f"features.folder={place.folder / 'features'}", "train.batch_size=5", "validation_split=validation"]
    first = child(place, "train", "qa", "--run", str(place.folder / "qa"), *options)
    second = child(place, "train", "qa", "--run", str(place.folder / "qa-again"), *options)
    key = "main_mb" if base["gpu_mb"] is None else "gpu_mb"
    return {f"stage_1_{key}": base[key], f"first_{key}": first[key], f"cached_{key}": second[key]}


def merge(place: Place) -> dict[str, Any]:
    """`hba merge`: main memory against the largest file of the backbone."""
    require_made(place, "sft", sft)
    out = place.folder / "merged"
    done = child(place, "merge", str(place.folder / "sft"), str(out))
    largest = merge_memory.megabytes(*(place.folder / "base").glob("*.safetensors"))
    return {**done, "largest_shard_mb": round(largest), "to_largest_shard": round(done["main_mb"] / largest, 2)}


def predict(place: Place) -> dict[str, Any]:
    """The merged model answers in words, and the heads of the run that it was made of in classes."""
    require_made(place, "merged", merge)
    words = child(place, *asked(place, "hf"))
    heads = child(place, *asked(place, "heads", str(place.folder / "sft")))
    return {"words": words, "heads": heads}


def rl(place: Place) -> dict[str, Any]:
    """Two steps of everything with a KL term: sampler and update compute alike, in the precision of the device."""
    reward = place.folder / "own.py"
    reward.write_text("def letters(responses, **_):\n    return [len(set(r)) / 100 for r in responses]\n")
    done = train(place, "rl", "rl", *RL, f"reward.function={reward}:letters")
    steps = [record for record in records(place.folder / "rl") if record["kind"] == "rl"]
    require(bool(steps) and all(record["sampler_gap"] < 0.05 for record in steps), f"sampler and update: {steps}")
    return {**done, "sampler_gap": max(record["sampler_gap"] for record in steps), "first_kl": steps[0]["kl"]}


def probabilities(place: Place) -> dict[str, Any]:
    """Log-probabilities of all response tokens of a micro-batch of the recipe `rl`, in chunks and at once."""
    found = {way: child(place, "--probabilities", way) for way in ("chunks", "whole")}
    key = "main_mb" if found["chunks"]["gpu_mb"] is None else "gpu_mb"
    chunks, whole = found["chunks"], found["whole"]
    require(abs(whole["sum"] / chunks["sum"] - 1) < 1e-4, f"other numbers: {found}")
    peaks = {"chunks_mb": chunks[key], "whole_mb": whole[key], "whole_to_chunks": round(whole[key] / chunks[key], 1)}
    return {"tokens": chunks["tokens"], "whole_logits_mb": chunks["tokens"] * VOCABULARY * 4 // 2**20, **peaks}


def vllm(place: Place) -> dict[str, Any]:
    """vLLM's engine and transformers answer the same rows with the same merged model."""
    here = importlib.util.find_spec("vllm") is not None
    python = sys.executable if here else os.environ.get("HBA_VLLM")
    if python is None or place.tiny:
        return {"skipped": "no GPU" if place.tiny else "no vLLM here, and HBA_VLLM names no environment with it"}
    require_made(place, "predictions-hf", predict)
    done = child(place, *asked(place, "vllm"), python=python)
    folders = [place.folder / f"predictions-{name}" for name in ("hf", "vllm")]
    said = [{row["id"]: row["output"] for row in records(folder, "predictions.jsonl")} for folder in folders]
    require(said[0].keys() == said[1].keys(), "other rows")
    alike = sum(said[0][row] == said[1][row] for row in said[0])
    return {**done, "rows": len(said[0]), "answers_alike": alike}


Check = Callable[[Place], dict[str, Any]]
CHECKS: tuple[Check, ...] = (
    *(machine, load, bfloat16, sft, resume, sharded, everything, stages),
    *(merge, predict, rl, probabilities, vllm),
)


# --- commands in processes of their own ------------------------------------------------------------------------------


def train(
    place: Place,
    command: str,
    run: str,
    *overrides: str,
    shards: bool = False,
    environment: dict[str, str] | None = None,
    code: int = 0,
) -> dict[str, Any]:
    """`hba train COMMAND`; with `shards` this one process has a process group, as one of many would."""
    arguments = ["train", command, "--run", str(place.folder / run), *place.model, *overrides]
    own = {"HBA_BENCHMARK_GROUP": str(place.folder / f"group-{run}")} if shards else {}
    return child(place, *arguments, environment=own | (environment or {}), code=code)


def asked(place: Place, backend: str, model: str | None = None) -> list[str]:
    """`hba predict` of some rows of the test split."""
    arguments = ["predict", model or str(place.folder / "merged"), "--backend", backend, "--limit", "40"]
    arguments += ["--atlas", str(place.folder / "atlas"), "--run", str(place.folder / f"predictions-{backend}")]
    return [*arguments, *ENCODE, *([] if backend == "heads" else ["generation.max_tokens=16"])]


def child(
    place: Place,
    *arguments: str,
    environment: dict[str, str] | None = None,
    code: int = 0,
    python: str = sys.executable,
) -> dict[str, Any]:
    """Run this file for one command; what it measured. AssertionError with the end of its errors for another code."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if place.tiny else {}
    # What is freed goes back to the kernel at once: main memory is what is held, not what the allocator kept.
    shared = {"HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    given = os.environ | shared | hidden | (environment or {})
    command = [python, __file__, "--child", *arguments]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    require(done.returncode == code, f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) if code == 0 else {"code": done.returncode}


def run_child(arguments: Sequence[str]) -> None:
    """In the child: one command, or a look at one thing; then its measurements, as the last line."""
    import torch

    import hba.cli

    import_module("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
    on_gpu, started = torch.cuda.is_available(), time.perf_counter()
    if file := os.environ.get("HBA_BENCHMARK_GROUP"):
        store = torch.distributed.FileStore(file, 1)
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
    if step := os.environ.get(DIES):
        die_at(int(step))
    waits: list[str] = []
    on_gpu = on_gpu and "vllm" not in arguments  # whose engine is a process of its own, and wants to be the first
    if on_gpu:

        def shown(message: Warning | str, category: type[Warning], name: str, line: int, *_: Any) -> None:
            if "synchroniz" in str(message):
                waits.append(f"{name}:{line}")

        torch.cuda.set_sync_debug_mode("warn")
        warnings.showwarning = shown
        warnings.simplefilter("always")
    found: dict[str, Any] = {}
    with load_memory.Watched() as watched:
        if arguments[0] in LOOKS:
            found = LOOKS[arguments[0]](*arguments[1:])
        else:
            sys.argv = ["hba", *arguments]
            try:
                hba.cli.main()
            except SystemExit as stop:
                if stop.code:
                    raise
    found |= {"seconds": round(time.perf_counter() - started, 1), "main_mb": round(watched.peak)}
    found["gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None
    ours = [place.split("/hba/")[-1] for place in waits if "/hba/" in place]
    found["host_waits"] = {place: ours.count(place) for place in sorted(set(ours))} if on_gpu else None
    print(json.dumps(found), flush=True)


def die_at(step: int) -> None:
    """Have this process kill itself when it adds up the gradients of that step."""
    from hba.train.ranks import Ranks

    whole, steps = Ranks.add_up_gradients, iter(range(1, step + 1))

    def fatal(*given: Any) -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(*given)

    Ranks.add_up_gradients = fatal  # type: ignore[method-assign]


def look_at_loading(base: str) -> dict[str, Any]:
    """Weights in their own precision, to the device."""
    import torch

    from hba.model import OmniSapiens

    model = OmniSapiens.from_pretrained(base, dtype="bfloat16")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def look_at_bfloat16(folder: str) -> dict[str, Any]:
    """The largest difference of a logit to the one in float32, as a share of their spread."""
    import torch

    from hba import open_atlas
    from hba.batch.config import EncodeConfig
    from hba.batch.encode import Encoder, collate
    from hba.model import OmniSapiens

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = open_atlas(Path(folder) / "atlas", split="test").filter(datasets=["tess"])
    logits = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = OmniSapiens.from_pretrained(Path(folder) / "base", dtype=dtype).eval().to(device)
        encoder = Encoder(model.processor, EncodeConfig(num_frames=2, min_pixels=3136, max_pixels=3136), rows.taxonomy)
        batch = collate([encoder.encode(sample) for sample in rows], pad_token_id=encoder.pad_token_id).to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            found_BC = model(batch).logits_BC
        logits.append(found_BC[torch.isfinite(found_BC)].float())
    spread = float(logits[0].std())
    worst = float((logits[0] - logits[1]).abs().max()) / spread
    require(worst < 0.5, f"logits differ by {worst} of their spread")
    return {"rows": len(rows), "largest_difference": round(worst, 4)}


def look_at_probabilities(way: str) -> dict[str, Any]:
    """Forward and backward through lm_head and the log-probabilities of as many tokens as the device has room for."""
    import torch

    from hba.rl import rollout

    on_gpu = torch.cuda.is_available()
    room = torch.cuda.mem_get_info()[0] if on_gpu else 4 << 30
    device, tokens = "cuda" if on_gpu else "cpu", min(RECIPE_TOKENS, room // (8 * 4 * VOCABULARY))
    width = WIDTH if on_gpu else 32
    torch.manual_seed(0)
    head = torch.nn.Linear(width, VOCABULARY, bias=False, device=device, dtype=torch.bfloat16 if on_gpu else None)
    states_NH = torch.randn(tokens, width, device=device, dtype=head.weight.dtype, requires_grad=True)
    ids_N = torch.randint(VOCABULARY, (tokens,), device=device)
    if way == "whole":
        rollout.CHUNK_VALUES = tokens * VOCABULARY
    options = {"banned": [7], "temperature": 1.0, "vocabulary": VOCABULARY}
    found_N2 = rollout._of_tokens(states_NH, head, ids_N=ids_N, **options)
    found_N2[:, 0].sum().backward()
    return {"tokens": tokens, "sum": round(float(found_N2.detach().double().sum()), 1)}


LOOKS: dict[str, Callable[..., dict[str, Any]]] = {
    "--load": look_at_loading,
    "--bfloat16": look_at_bfloat16,
    "--probabilities": look_at_probabilities,
}


# --- what they left --------------------------------------------------------------------------------------------------


def require(holds: bool, what: str) -> None:
    """End the check with `what` where it does not hold."""
    if not holds:
        raise AssertionError(what)


def require_made(place: Place, name: str, check: Check) -> None:
    """Run the check that leaves the folder `name`, where it is not there."""
    if not (place.folder / name).is_dir():
        check(place)


def records(run: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Of every step, those that are finite."""
    return [record["loss"] for record in records(run) if record["kind"] == "train" and abs(record["loss"]) < 1e9]


def difference(run: Path, other: Path) -> dict[str, Any]:
    """Losses that differ (relative), and trained tensors that differ in a bit."""
    from safetensors.torch import load_file

    ours, theirs = losses(run), losses(other)
    require(len(ours) == len(theirs), f"{len(ours)} and {len(theirs)} steps")
    worst = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    require(worst < 1e-2, f"losses differ: {ours}, {theirs}")
    names = [path.relative_to(run) for path in sorted((run / "checkpoints" / "step_6").glob("*.safetensors"))]
    names = [name for name in names if not name.name.startswith("optimizer")]
    pairs = [(load_file(run / name), load_file(other / name)) for name in names]
    differ = [key for a, b in pairs for key in a if not a[key].equal(b[key])]
    total = sum(len(a) for a, _ in pairs)
    return {"loss_difference": worst, "tensors": total, "tensors_that_differ": len(differ)}


def size(folder: Path) -> int:
    """The weights of a folder, in megabytes."""
    return round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20)


def build(place: Place) -> None:
    """Data, model and processor."""
    from hba import open_atlas
    from hba.mini import build_mini_atlas
    from hba.model.tiny import atlas_texts, build_tiny

    if not place.tiny:
        merge_memory.peak_megabytes("build", place.folder)
        shutil.rmtree(place.folder / "lora")
        return
    build_mini_atlas(place.folder / "atlas", size="tiny", seed=0, workers=1)
    build_tiny(place.folder / "base", atlas_texts(open_atlas(place.folder / "atlas", split="train")), seed=0)


def main() -> None:
    """Every check that is named, or all."""
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2:])
        return
    known = {check.__name__: check for check in CHECKS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(known))
    parser.add_argument("--tiny", action="store_true", help="the tiny backbone on the CPU")
    parser.add_argument("--dry-run", action="store_true", help="list the checks, and stop")
    options = parser.parse_args()
    if wrong := set(options.checks) - set(known):
        parser.error(f"no check {', '.join(sorted(wrong))}; there are {', '.join(known)}")
    import torch

    chosen = [known[name] for name in options.checks] or list(CHECKS)
    if options.dry_run:
        for check in chosen:
            print(f"{check.__name__:14}{(check.__doc__ or '').strip()}")
        return
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch), options.tiny or not torch.cuda.is_available())
        build(place)
        for check in chosen:
            started = time.perf_counter()
            try:
                found = check(place)
            except Exception as error:  # noqa: BLE001 -- the others run, and the exit code says it
                failed, found = True, {"failed": str(error), "at": traceback.format_exc().splitlines()[-3].strip()}
            line = {"check": check.__name__, **found, "check_seconds": round(time.perf_counter() - started, 1)}
            print(json.dumps(line), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
