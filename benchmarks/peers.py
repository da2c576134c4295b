"""hba beside lmms-eval, ms-swift and Inspect: the same rows, the same tiny models, CPU and wall time of each.

    make peers && python benchmarks/peers.py --rounds 3

Each side is a process of its own, through its own command line, with one thread. It runs with few rows or steps, and
with more; what is printed is the difference for one row or step, so that imports, loading of the model and what comes
once at the end are left out. CPU time is of the process and all that it started (Linux). Rounds alternate; medians are
printed, and the median ratio of the rounds: above 1 hba takes less.

  lmms-eval   `hba predict --backend hf`, and lmms-eval's qwen2_5_vl: tiny Qwen2.5-VL in bfloat16, one row at a time,
              greedy. Its qwen2_5_omni takes its processor from the hub by name and runs on CUDA alone, so that clips
              are asked about without their sound.
  ms-swift    `hba train lm`, and `swift sft`: LoRA of rank 8 on a tiny Qwen2.5-Omni in float32, clips with sounds.
  inspect-ai  `hba predict --backend openai`, and Inspect's openai-api: a server on the loopback that takes 50 ms, texts
              with a sound.

Not equal, and left so: hba batches samples of like length and writes every answer to the disk at once; ms-swift
shuffles; each has its own rule for the frames of a clip and its own records. Wall time beside other work says little.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
HBA = [sys.executable, "-m", "hba"]
FRAMES, PIXELS = 8, 3136  # of a clip, and of each frame: the clips of the mini-atlas have 8 to 10 frames of 56x56
SIZES = [f"encode.num_frames={FRAMES}", f"encode.min_pixels={PIXELS}", f"encode.max_pixels={PIXELS}"]
SWIFT = {
    **{"model_type": "qwen2_5_omni", "template": "qwen2_5_omni", "system": "", "split_dataset_ratio": "0"},
    **{"tuner_type": "lora", "lora_rank": "8", "lora_alpha": "32", "learning_rate": "1e-4", "report_to": "none"},
    **{"torch_dtype": "float32", "attn_impl": "sdpa", "gradient_checkpointing": "false", "use_cpu": "true"},
    **{"logging_steps": "1", "save_strategy": "no", "eval_strategy": "no", "gradient_accumulation_steps": "1"},
}
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


class Cost(NamedTuple):
    cpu: float  # seconds, of the process and its children
    wall: float  # seconds
    peak: int  # MB, of the largest process


def ran(
    command: list[str | Path], folder: Path, environment: dict[str, str] | None = None, *, at: Path | None = None
) -> Cost:
    """What a command took, with whatever it left to be waited for. What it said is in `folder`/said.txt; where it
    fails, the end of that ends the benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **QUIET, **(environment or {})}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    others = children()
    with (folder / "said.txt").open("wb") as said:
        began = time.perf_counter()
        words = [str(each) for each in command]
        process = subprocess.Popen(words, stdout=said, stderr=said, env=given, cwd=at or folder)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
    for orphan in children() - others:
        os.waitpid(orphan, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = (folder / "said.txt").read_text(errors="replace")[-3000:]
        sys.exit(f"{tail}\n\n{' '.join(map(str, command))}\nended with {process.returncode}.")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, wall, used.ru_maxrss // 1024)


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


Side = Callable[[int, Path], Cost]


def compare(what: str, unit: str, hba: Side, peer: Side, few: int, many: int, rounds: int, work: Path) -> Path:
    """Print the cost of one row or step on both sides, and the ratios. Returns the folder of the last round."""
    rows: list[list[float]] = []
    peaks: list[tuple[int, int]] = []
    for number in range(rounds):
        sides = {"hba": hba, "peer": peer}  # runs of one size are neighbours: both see the same machine
        costs = {(name, count): side(count, work / f"{number}-{name}-{count}")
                  for count in (few, many) for name, side in sides.items()}  # fmt: skip
        each: list[float] = []
        peak: list[int] = []
        for name in sides:
            less, more = costs[name, few], costs[name, many]
            each += [(more.cpu - less.cpu) / (many - few), (more.wall - less.wall) / (many - few), less.cpu]
            peak.append(max(less.peak, more.peak))
        rows.append(each)
        peaks.append((peak[0], peak[1]))
        print(f"  round {number + 1}: CPU {each[0]:.4f} and {each[3]:.4f} s, wall {each[1]:.4f} and {each[4]:.4f} s "
              f"a {unit}; the whole of {few}: CPU {each[2]:.1f} and {each[5]:.1f} s", flush=True)  # fmt: skip
    columns = [median(column) for column in zip(*rows, strict=True)]
    for name, at in (("CPU", 0), ("wall", 1)):
        ratio = median(row[at + 3] / row[at] for row in rows)
        print(f"{what}: {name} of a {unit}: hba {columns[at]:.4f} s, {what} {columns[at + 3]:.4f} s: {ratio:.2f} x")
    print(f"{what}: CPU of the whole run of {few}: {columns[2]:.1f} and {columns[5]:.1f} s; peak memory: "
          f"{max(a for a, _ in peaks)} and {max(b for _, b in peaks)} MB", flush=True)  # fmt: skip
    return work / f"{rounds - 1}"


def python_of(peer: str, given: argparse.Namespace) -> Path:
    """The interpreter of a peer's environment; where there is none, the benchmark ends with 2 and how to get one."""
    python = Path(given.environments).absolute() / peer / "bin" / "python"
    if not python.is_file():
        fix = "run `make peers`, or leave it out of --only."
        print(f"{peer} is not installed in {python.parents[1]}: {fix}", file=sys.stderr)
        sys.exit(2)
    return python


def release(python: Path, *packages: str) -> str:
    code = "import sys, importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
    return subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout.strip()


def rows_of(atlas: Path, splits: str, keep: Callable[[dict], bool]) -> list[dict]:
    texts = [(atlas / f"{split}.jsonl").read_text() for split in splits.split()]
    return [row for text in texts for row in map(json.loads, text.splitlines()) if keep(row)]


def atlas_of(mini: Path, folder: Path, rows: list[dict], split: str) -> Path:
    """The mini-atlas with these rows in place of those of a split."""
    shutil.copytree(mini, folder)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def against_lmms_eval(given: argparse.Namespace, mini: Path, work: Path) -> None:
    python = python_of("lmms-eval", given)
    print(release(python, "lmms-eval", "transformers", "torch", "qwen-vl-utils", "decord"))
    model, few, many = work / "model", given.rows, 8 * given.rows
    ran([*HBA, "tiny", model, "--atlas", mini, "--family", "qwen2.5-vl"], work / "tiny")
    of = ("cremad", "daicwoz", "meld_senti", "siq2")
    rows = rows_of(mini, "test", lambda row: row["videos"] and row["dataset"] in of)
    for row in rows:
        row |= {"audios": [], "ext_audio_feats": [], "problem": row["problem"].replace("<audio>", "")}
        row["modality_signature"] = "text_video"
    assert len(rows) >= many, f"--rows {given.rows} wants {many} rows, and the mini-atlas has {len(rows)}"
    atlas = atlas_of(mini, work / "atlas", rows, "test")

    def hba(count: int, folder: Path) -> Cost:
        asked = ["generation.format=plain", f"generation.max_tokens={given.tokens}", "dtype=bfloat16", "batch_size=1"]
        run = [*HBA, "predict", model, "--backend", "hf", "--atlas", atlas, "--split", f"test[:{count}]"]
        return ran([*run, "--run", folder / "run", *asked, *SIZES], folder)

    def peer(count: int, folder: Path) -> Cost:
        tasks = work / f"tasks{count}"
        if not tasks.is_dir():
            ran([*HBA, "export", "lmms-eval", tasks, "--atlas", atlas, "--split", f"test[:{count}]"], work)
        about = f"pretrained={model},device=cpu,device_map=cpu,attn_implementation=sdpa"
        about += f",min_pixels={PIXELS},max_pixels={PIXELS},max_num_frames={FRAMES}"
        run = [python, "-m", "lmms_eval", "--include_path", tasks, "--tasks", "hba", "--batch_size", "1"]
        run += ["--model", "qwen2_5_vl", "--model_args", about, "--gen_kwargs", f"max_new_tokens={given.tokens}"]
        return ran([*run, "--output_path", folder / "out", "--log_samples"], folder, {"HOME": str(work)})

    last = compare("lmms-eval", "row", hba, peer, few, many, given.rounds, work)
    ours, theirs = Path(f"{last}-hba-{many}"), Path(f"{last}-peer-{many}")
    answers = {}
    for line in (ours / "run" / "predictions.jsonl").read_text().splitlines():
        found = json.loads(line)
        answers[found["id"]] = found["output"].strip()
    same = 0
    for file in theirs.glob("out/*/*_samples_hba_*.jsonl"):
        task = file.stem.rpartition("_")[2].upper()
        documents = (work / f"tasks{many}" / "rows" / f"{task}.jsonl").read_text().splitlines()
        for line in file.read_text().splitlines():
            found = json.loads(line)
            said = found["filtered_resps"]
            said = said if isinstance(said, str) else said[0]
            same += answers[json.loads(documents[found["doc_id"]])["id"]] == said.strip()
    print(f"lmms-eval: {same} of {len(answers)} answers are the same, spaces at the ends aside")
    ran([*HBA, "score", ours / "run"], work)
    scores = json.loads((ours / "run" / "metrics.json").read_text())["tasks"]
    (results,) = theirs.glob("out/*/*_results.json")
    for task, about in sorted(json.loads(results.read_text())["results"].items()):
        ours_of = scores.get(task[4:].upper(), {})
        for name, value in about.items():
            if name.split(",")[0] == ours_of.get("metric") and ours_of["score"] is not None:
                print(f"  {task}: {ours_of['metric']} {ours_of['score']:.6f} and {value:.6f}")


def against_ms_swift(given: argparse.Namespace, mini: Path, work: Path) -> None:
    python = python_of("ms-swift", given)
    print(release(python, "ms-swift", "transformers", "torch", "peft", "qwen-omni-utils", "decord"))
    import torch
    from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

    from hba.model.merge import write_thinker

    model, tiny, batch, few, many = work / "model", work / "tiny", 4, given.steps, 8 * given.steps
    ran([*HBA, "tiny", tiny, "--atlas", mini], work / "said")
    AutoProcessor.from_pretrained(tiny).save_pretrained(model)
    write_thinker(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny), model, dtype=torch.float32)
    torch.save({}, model / "spk_dict.pt")  # the voices of the speaking part, which is off
    rows = rows_of(mini, "train", lambda row: row["videos"] and row["audios"])[: batch * many]
    atlas = atlas_of(mini, work / "atlas", rows, "train")
    with (work / "rows.jsonl").open("w") as handle:
        for row in rows:
            talk = [{"role": "user", "content": row["problem"]}, {"role": "assistant", "content": row["answer"]}]
            media = {kind: [str(atlas / path) for path in row[kind]] for kind in ("videos", "audios")}
            handle.write(json.dumps({"messages": talk, **media}) + "\n")

    def hba(count: int, folder: Path) -> Cost:
        run = [*HBA, "train", "lm", "--run", folder / "run", f"atlas={atlas}", "validation_split=validation[:1]"]
        run += [f"model.name={model}", "model.strategy=lora", "model.dtype=float32", "model.lora_r=8"]
        run += [
            "model.lora_alpha=32",
            f"train.max_steps={count}",
            f"train.batch_size={batch}",
            "train.log_every=1",
            *SIZES,
        ]
        return ran(run, folder)

    def peer(count: int, folder: Path) -> Cost:
        limits = {"FPS_MIN_FRAMES": f"{FRAMES}", "FPS_MAX_FRAMES": f"{FRAMES}", "ENABLE_AUDIO_OUTPUT": "0"}
        limits |= {"VIDEO_MIN_PIXELS": f"{PIXELS}", "VIDEO_MAX_PIXELS": f"{PIXELS}", "HOME": str(work)}
        run = [python.parent / "swift", "sft", "--model", model, "--dataset", work / "rows.jsonl"]
        run += [word for name, value in SWIFT.items() for word in (f"--{name}", value)]
        run += ["--max_steps", f"{count}", "--per_device_train_batch_size", f"{batch}", "--output_dir", folder / "out"]
        return ran(run, folder, {**limits, "PYTHONPATH": ""})

    last = compare("ms-swift", "step", hba, peer, few, many, given.rounds, work)
    from safetensors import safe_open

    (adapter,) = Path(f"{last}-hba-{many}").glob("run/checkpoints/*/adapter_model.safetensors")
    with safe_open(adapter, "pt") as held:
        trained = sum(held.get_tensor(name).numel() for name in held.keys())  # noqa: SIM118
    said = (Path(f"{last}-peer-{many}") / "said.txt").read_text(errors="replace")
    told = next(line for line in said.splitlines() if "Trainable [" in line)
    print(f"ms-swift: hba trains {trained / 1e6:.4f}M parameters; {told}")
    log = [json.loads(x) for x in (Path(f"{last}-hba-{many}") / "run" / "log.jsonl").read_text().splitlines()]
    (theirs,) = Path(f"{last}-peer-{many}").glob("out/*/logging.jsonl")
    losses = [x["loss"] for x in map(json.loads, theirs.read_text().splitlines()) if "loss" in x]
    print(f"ms-swift: mean loss {sum(x['loss'] for x in log if x['kind'] == 'train') / many:.3f}; "
          f"{sum(map(float, losses)) / len(losses):.3f}")  # fmt: skip


def against_inspect(given: argparse.Namespace, mini: Path, work: Path) -> None:
    python = python_of("inspect-ai", given)
    print(release(python, "inspect-ai", "openai"))
    few, many = given.requests, 3 * given.requests
    rows = rows_of(mini, "train test", lambda row: row["dataset"] == "mmpsy_anxiety")
    rows += rows_of(mini, "train", lambda row: row["dataset"] == "mmpsy_depression")
    for row in rows:
        row |= {"dataset": "mmpsy_anxiety", "task": "anxiety_cls", "answer": "anxiety", "class_label": "anxiety"}
    assert len(rows) >= many, f"--requests {few} wants {many} rows, and there are {len(rows)}"
    atlas = atlas_of(mini, work / "atlas", rows, "test")
    command = [sys.executable, f"{ROOT}/tests/servers/chat.py", "--brain", "choose", "--faults", '{"latency": 0.05}']
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"

        def hba(count: int, folder: Path) -> Cost:
            asked = ["generation.format=plain", "generation.max_tokens=64", f"remote.max_concurrency={given.at_once}"]
            run = [*HBA, "predict", "m", "--backend", "openai", "--base-url", url, "--atlas", atlas]
            return ran([*run, "--split", f"test[:{count}]", "--run", folder / "run", *asked], folder)

        def peer(count: int, folder: Path) -> Cost:
            tasks = work / f"tasks{count}"
            if not tasks.is_dir():
                ran([*HBA, "export", "inspect", tasks, "--atlas", atlas, "--split", f"test[:{count}]"], work)
            run = [python.parent / "inspect", "eval", "hba_tasks.py", "--model", "openai-api/local/m"]
            run += ["--model-base-url", url, "--max-connections", f"{given.at_once}", "--temperature", "0"]
            run += ["--max-tokens", "64", "--display", "none", "--log-dir", folder / "logs"]
            return ran(run, folder, {"LOCAL_API_KEY": "none", "HOME": str(work)}, at=tasks)

        last = compare("Inspect", "request", hba, peer, few, many, given.rounds, work)
    finally:
        server.kill()
        server.wait()
    ran([*HBA, "score", Path(f"{last}-hba-{many}") / "run"], work)
    ours = json.loads((Path(f"{last}-hba-{many}") / "run" / "metrics.json").read_text())["tasks"]["ANX"]
    (log,) = Path(f"{last}-peer-{many}").glob("logs/*.eval")
    dump = [python.parent / "inspect", "log", "dump", "--header-only", log]
    found = json.loads(subprocess.run(dump, capture_output=True, text=True, check=True).stdout)
    assert found["status"] == "success", found["error"]["message"]
    results = found["results"]
    metrics = {name: each["value"] for score in results["scores"] for name, each in score["metrics"].items()}
    print(f"Inspect: {ours['metric']} {ours['score']:.6f} and {metrics[ours['metric']]:.6f}")


PEERS = {"lmms-eval": against_lmms_eval, "ms-swift": against_ms_swift, "inspect-ai": against_inspect}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PEERS), help="peers, by commas")
    parser.add_argument("--environments", default=ROOT / ".harnesses", help="folder with an environment for each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=25, help="rows of a short evaluation; the long one has 8 times")
    parser.add_argument("--tokens", type=int, default=16, help="longest answer")
    parser.add_argument("--steps", type=int, default=6, help="steps of a short training; the long one has 8 times")
    parser.add_argument("--requests", type=int, default=100, help="of a short run; the long one has 3 times")
    parser.add_argument("--at-once", type=int, default=16, help="requests")
    parser.add_argument("--work", help="keep what the sides write here")
    given = parser.parse_args()
    peers = given.only.split(",")
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to this process, to be counted
    for name in peers:
        python_of(name, given)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(given.work or temporary).absolute()
        if not (work / "mini").is_dir():
            ran([*HBA, "atlas", "mini", work / "mini"], work / "made")
        for name in peers:
            (work / name).mkdir()
            PEERS[name](given, work / "mini", work / name)


if __name__ == "__main__":
    main()
