"""The first hour: the demo end to end at size tiny, and every command of the tutorials, typed as it stands.

A page's commands and Python blocks run in their order, in one folder. What a test has not got (a hub, a service, eight
GPUs, hours) is replaced by INSTEAD, and by nothing else. A new command of such a page is run without a word here.
"""

import copy
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from hba.cli import main
from hba.cli.demo import run_demo
from hba.errors import ConfigError
from hba.report.comparison import read_stages, stages_table

ROOT = Path(__file__).parents[2]
FEW_STEPS = ["train.max_steps=12", "train.validate_every=3", "train.batch_size=8", "encode.num_frames=4"]
FEW_STEPS += ["qa.train.max_steps=4", "bam.train.max_steps=8", "speak.train.max_steps=2", "rl.train.max_steps=1"]
FEW_STEPS += ["speak.validation_split=validation[:8]", "rl.validation_rows=8", "rl.rollout.max_new_tokens=4"]
STAGES = ("sft", "qa", "bam")
TASKS = {"SEN", "EMO", "HUM", "SAR", "ANX", "DEP", "PTSD"}


def without_times(metrics):
    metrics = copy.deepcopy(metrics)
    assert metrics["provenance"].pop("created_at")
    return metrics


@pytest.fixture(scope="module")
def demo(tmp_path_factory, mini_atlas):
    """A demo folder and its result; the mini-atlas is the shared one, which the demo finds and keeps."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    shutil.copytree(mini_atlas, folder / "atlas")
    return folder, run_demo(folder, size="tiny", seed=0, overrides=FEW_STEPS)


class References(HTMLParser):
    """Every address that a page would load or link to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "poster", "srcset", "action")]


def test_the_demo_leaves_every_file_of_the_contract(demo):
    folder, result = demo
    assert result.report == folder / "bam" / "report.html"
    expected = {
        *("config.yaml", "environment.json", "log.jsonl", "checkpoints", "tensorboard"),
        *("predictions.jsonl", "predict.json", "metrics.json", "report.html"),
    }
    for run in STAGES:
        there = {path.name for path in (folder / run).iterdir()} - {".lock", "quarantine.jsonl", "taxonomy.yaml"}
        assert there == expected | ({"stages.json"} if run == "bam" else set()), run
    assert result.quarantined == []
    predicted = {f"predict {run}" for run in STAGES}
    rl = {"speak", "rl grpo", "rl harpo"}
    assert set(result.seconds) == {"mini-atlas", "backbone", *STAGES, *predicted, "score", "compare", "report", *rl}
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_metrics_are_as_the_contract_says(demo):
    folder, result = demo
    metrics = json.loads((folder / "bam" / "metrics.json").read_text())
    assert metrics == result.metrics.record()
    assert set(metrics) >= {"tasks", "datasets", "aggregate", "provenance"}
    scored = {key: task for key, task in metrics["tasks"].items() if task["score"] is not None}
    assert set(scored) >= TASKS
    for task in scored.values():
        low, high = task["ci95"]
        assert 0 <= low <= task["score"] <= high <= 1
        assert 0 <= task["chance"] <= 1
        assert task["n"] > 0
        assert task["n_quarantined"] == 0
    said = metrics["provenance"]
    assert said["synthetic"] is True
    assert (said["seed"], said["split"], said["model"]) == (0, "test", "bam")
    lines = (folder / "bam" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == metrics["aggregate"]["n"]


def test_the_report_needs_nothing_but_itself(demo):
    page = demo[1].report.read_text()
    references = References()
    references.feed(page)
    assert references.found
    assert [address[:60] for address in references.found if not address.startswith(("data:", "#"))] == []
    assert not re.search(r"<script|@import|url\((?!['\"]?(data:|#))", page)
    assert "synthetic" in page.lower()


def test_a_second_call_trains_and_predicts_nothing(demo):
    folder, first = demo
    files = [folder / run / name for run in STAGES for name in ("log.jsonl", "predictions.jsonl")]
    files += sorted((folder / "features").rglob("*.safetensors"))
    before = [(file.read_bytes(), file.stat().st_ino) for file in files]
    again = run_demo(folder, size="tiny", seed=0, overrides=FEW_STEPS)
    assert without_times(again.metrics.record()) == without_times(first.metrics.record())
    assert [(file.read_bytes(), file.stat().st_ino) for file in files] == before


def test_each_stage_is_compared_with_the_one_before(demo):
    folder, result = demo
    found = result.stages
    assert found.names == STAGES
    assert read_stages(folder / "bam") == found
    for name, (_, qa, _) in found.rows.items():
        assert qa.same or name in ("SOC (exact match)", "INT (exact match)", "NVC (exact match)"), "heads stay alone"
    shown = Console(width=120, record=True, file=io.StringIO())
    shown.print(stages_table(found))
    text, page = shown.export_text(), result.report.read_text()
    assert re.search(r"SEN +[\d.]+ +[\d.]+ += ", text)
    assert re.search(r"sft +qa +difference +bam +difference", text)
    assert "Stage by stage" in page and "SOC (exact match)" in page


def test_two_algorithms_start_from_the_model_that_speaks_and_say_what_they_changed(demo):
    folder, result = demo
    assert list(result.rl) == ["grpo", "harpo"]
    before = [[change.before for change in changes] for changes in result.rl.values()]
    assert before[0] == before[1], "the same model, prompts and draws"
    for name in result.rl:
        assert {c.name for c in result.rl[name]} >= {"reward, sampled", "format, sampled", "right answers, greedy"}
        assert f"Reinforcement learning: {name}" in (folder / f"rl-{name}" / "report.html").read_text()
        assert (folder / f"rl-{name}" / "checkpoints" / "step_1" / "rl_state.json").is_file()


def test_one_seed_gives_one_result_wherever_it_runs(demo, tmp_path, mini_atlas, monkeypatch, capfd):
    """The second demo runs through the command line, in another folder, named by a relative path."""
    shutil.copytree(mini_atlas, tmp_path / "again" / "atlas")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hba", "demo", *FEW_STEPS, "--run", "again", "--size", "tiny", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    said = json.loads(capfd.readouterr().out)
    assert without_times(said["metrics"]) == without_times(demo[1].metrics.record())
    page = (tmp_path / said["report"]).read_text()
    assert len(page) == pytest.approx(len(demo[1].report.read_text()), rel=0.05)

    def losses(folder):
        lines = [json.loads(line) for run in STAGES for line in (folder / run / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    assert losses(tmp_path / "again") == losses(demo[0])


def test_what_the_demo_sets_cannot_be_overridden(tmp_path):
    for key in ("atlas=x", "model.name=x", "train.seed=1", "qa.base=x", "bam.train.seed=1"):
        with pytest.raises(ConfigError, match="the demo itself sets"):
            run_demo(tmp_path / "new", size="tiny", seed=0, overrides=[key])
    assert not (tmp_path / "new").exists()


# --- the tutorials, typed ---------------------------------------------------------------------------------------------

HUB_MODEL = r"Qwen/Qwen2\.5-Omni-7B"
SHORT = "train.max_steps=2 train.validate_every=2 train.batch_size=8 encode.num_frames=2"
EVERY_HEAD = "train.max_steps=12 train.validate_every=12"  # once, as stage 3 wants them
TWO = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"

# What a page says, as a pattern: what is typed in its place, in this order.
INSTEAD = {
    r"^(make|source) .*": "",  # the tests have an environment
    r"^(hba demo.*)": rf"\1 {' '.join(FEW_STEPS)} --run {{demo}}",  # the `demo` here: it finds all done
    r"^(hba atlas mini runs/mini)$": r"\1 --size tiny --workers 1",
    r"^(hba explore .*)": r"\1 --port 0 --no-browser",
    # The recipe for a GPU with the release: the one for the tiny model with the mini-atlas.
    r"--config sft --run (\S+) atlas=data/hba": r"--config sft_tiny --run \1 atlas=runs/mini model.name=runs/tiny",
    r"^(hba train (sft|qa|bam|lm) .*|accelerate launch .*)": rf"\1 {SHORT}",
    r"^(hba train sft .* --run runs/sft .*)": rf"\1 {EVERY_HEAD}",
    r"^(hba train qa .*|hba train bam .*) encode\.num_frames=2": r"\1",  # theirs is that of stage 1
    r"^(hba train rl .*)": rf"\1 {SHORT} train.max_steps=1 validation_rows=8 rollout.max_new_tokens=4",
    r"^(hba train lm .*)": r"\1 validation_split=validation[:8]",
    # A model of the hub: the tiny one, which has the same classes, and which speaks no words.
    rf"^(hba ask) {HUB_MODEL}(.*)": r"\1 runs/demo/tiny\2 --set generation.max_tokens=4",
    rf"^(hba eval) {HUB_MODEL}(.*)": r"\1 runs/demo/tiny\2 --split test[:6] generation.max_tokens=4",
    rf"^(hba fit) {HUB_MODEL}": r"\1 runs/demo/tiny",
    # A service: a server on the loopback.
    r"--backend openai(.*?)( --per-dataset \d+)?$": r"--backend openai --base-url {server}\1 --per-dataset 1",
    r"(--judge \S+)": r"\1 --judge-url {server}",
    # Eight GPUs: two processes on this machine.
    r"--num_processes 8": TWO,
}  # fmt: skip
# The parts of the pages, and what has to have been typed before them. What was typed is not typed again.
BEFORE = {
    "quickstart.md: Ten minutes on a laptop": (),
    "quickstart.md: Your clip": ("quickstart.md: Ten minutes on a laptop",),
    "quickstart.md: Your folder": (),
    "quickstart.md: Your model": ("quickstart.md: Ten minutes on a laptop",),
    "quickstart.md: Train OmniSapiens": (),
    "quickstart.md: Reinforcement learning": ("quickstart.md: Train OmniSapiens",),
    "quickstart.md: A cluster": ("quickstart.md: Ten minutes on a laptop", "quickstart.md: Train OmniSapiens"),
    "install.md: Without torch": (),
    "README.md": ("quickstart.md: Your clip", "quickstart.md: Your folder", "quickstart.md: Train OmniSapiens"),
}


def typed(part):
    """The commands and Python blocks of a part of a page: (kind, text), in their order."""
    name, _, title = part.partition(": ")
    page = (ROOT / name if name == "README.md" else ROOT / "docs" / name).read_text(encoding="utf-8")
    text = f"\n{page}".split(f"\n## {title}\n")[1].split("\n## ")[0] if title else page
    for kind, block in re.findall(r"(?ms)^```(bash|python)\n(.*?)^```", text):
        if kind == "python":
            yield kind, block
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for command in re.sub(r"(^|\s)# .*", "", line).split(" && "):
                if command.strip():
                    yield kind, command.strip()


@pytest.fixture(scope="module")
def desk(tmp_path_factory, demo, mini_atlas):
    """The folder in which the pages are typed, with a reader's own files."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "runs").mkdir()
    (folder / "runs/demo").symlink_to(demo[0])
    shutil.copy(next(mini_atlas.rglob("*.mp4")), folder / "clip.mp4")
    for number, sound in enumerate(sorted(mini_atlas.rglob("*.wav"))[:8]):
        label = folder / "recordings" / ("happy", "sad")[number % 2]
        label.mkdir(parents=True, exist_ok=True)
        shutil.copy(sound, label / f"{number}.wav")
    return folder


@pytest.fixture
def walk(desk, hba, chat_server, monkeypatch):
    """Type a part of a page, and first what it says it needs."""
    monkeypatch.chdir(desk)
    monkeypatch.setenv("HBA_CACHE", str(desk / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    server = chat_server("echo")
    done = desk / "typed"
    done.touch()

    def walked(part):
        for other in BEFORE[part]:
            walked(other)
        for kind, text in typed(part):
            if text not in (told := done.read_text(encoding="utf-8").split("\0")):
                type_in(text, hba, server) if kind == "bash" else exec(compile(text, part, "exec"), {})
                done.write_text("\0".join([*told, text]), encoding="utf-8")

    return walked


def replaced(command):
    """What is typed for a command, and which lines of INSTEAD that was."""
    used = set()
    for pattern, replacement in INSTEAD.items():
        command, count = re.subn(pattern, replacement, command)
        used |= {pattern} if count else set()
    return command, used


def type_in(command, hba, server):
    command, _ = replaced(command)
    places = {"{server}": server.url, "{demo}": os.path.realpath("runs/demo")}
    words = shlex.split(re.sub(r"{\w+}", lambda found: places[found[0]], command))
    if words[:2] == ["hba", "explore"]:
        look_and_leave(words[1:])
    elif words[:1] == ["hba"]:
        code, out, err = hba(*words[1:])
        assert code == 0, (command, out, err)
    elif words:
        assert words[:2] == ["accelerate", "launch"], f"how is this run? {command}"
        program = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, (command, ended.stdout, ended.stderr)


def look_and_leave(words):
    """Start the explorer, load its first page by the address that it prints, and press Ctrl-C."""
    program = [sys.executable, "-m", "hba", *words]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as explorer:
        try:
            said = iter(explorer.stdout.readline, "")
            address = next((found[0] for line in said if (found := re.search(r"http://\S+", line))), None)
            assert address is not None
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor())
            with opener.open(address, timeout=60) as page:
                assert b"<html" in page.read()
            explorer.send_signal(signal.SIGINT)
            assert explorer.wait(60) in (0, 130)
        finally:
            explorer.kill()


# What is there afterwards.
MADE = {
    "quickstart.md: Ten minutes on a laptop": "runs/demo/bam/report.html",
    "quickstart.md: Your clip": "clip.mp4",
    "quickstart.md: Your folder": "runs/eval/runs-mine/report.html",
    "quickstart.md: Your model": "runs/eval/gpt-5-mini/report.html",
    "quickstart.md: Train OmniSapiens": "runs/eval/runs-bam/report.html",
    "quickstart.md: Reinforcement learning": "runs/rl/report.html",
    "quickstart.md: A cluster": "runs/omnisapiens/checkpoints",
    "install.md: Without torch": "runs/eval/gpt-5-mini/report.html",
    "README.md": "runs/qwen/report.html",
}


@pytest.mark.parametrize("part", BEFORE)
def test_a_part_of_a_page_can_be_typed(part, walk):
    walk(part)
    assert Path(MADE[part]).exists()
    if part == "quickstart.md: Your folder":
        assert "happy" in Path("data/mine/taxonomy.yaml").read_text()


def test_every_part_of_the_quickstart_is_typed_and_nothing_is_replaced_that_no_page_says():
    said = [text for part in BEFORE for kind, text in typed(part) if kind == "bash"]
    assert set().union(*(replaced(command)[1] for command in said)) == set(INSTEAD)
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    assert {f"quickstart.md: {title}" for title in re.findall(r"(?m)^## (.*)", page)} < set(BEFORE)

STAND_INS = """
srun: while case $1 in -w) shift;; -*) true;; *) false;; esac; do
srun:   case $1 in --nodes=*) nodes=${1#*=};; --ntasks=*) tasks=${1#*=};; esac; shift
srun: done
srun: worst=0 all=${tasks:-$SLURM_NTASKS}
srun: for SLURM_PROCID in $(seq 0 $((all - 1))); do
srun:   each=$((all / ${nodes:-$SLURM_NNODES}))
srun:   export SLURM_PROCID SLURM_NODEID=$((SLURM_PROCID / each)) SLURM_LOCALID=$((SLURM_PROCID % each))
srun:   "$@" || worst=$?
srun: done
srun: exit $worst
scontrol: case $1 in show) seq -f node%g $SLURM_NNODES;; *) echo "scontrol $*" >> calls;; esac
sleep: true
accelerate: echo "accelerate $*" >> calls
ray: echo "ray $*" >> calls
hba: echo "hba RANK=$RANK/$WORLD_SIZE LOCAL=$LOCAL_RANK AT=$MASTER_ADDR:$MASTER_PORT RAY=$RAY_ADDRESS $*" >> calls
hba: exit 75
"""
OF_SBATCH = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "requeue", "open-mode", "signal"}


def test_the_batch_scripts_of_the_page_on_clusters_start_every_process_once(tmp_path):
    """Under stand-ins for SLURM's commands: what each task is started with, and that a stopped job is queued again."""
    for line in STAND_INS.strip().splitlines():
        name, _, code = line.partition(": ")
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        with script.open("a", encoding="utf-8") as file:
            file.write(("" if script.stat().st_size else "#!/bin/bash\n") + code + "\n")
        script.chmod(0o755)
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    scripts = [block for block in re.findall(r"(?ms)^```bash\n(.*?)^```", page) if block.startswith("#!/bin/bash")]
    told = []
    for script in scripts:
        asked = dict(re.findall(r"--([a-z-]+)(?:=(\S+))?", " ".join(re.findall(r"(?m)^#SBATCH (.*)", script))))
        assert set(asked) <= OF_SBATCH
        nodes, tasks = int(asked["nodes"]), int(asked["nodes"]) * int(asked["ntasks-per-node"])
        slurm = {"SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(tasks)}
        slurm |= {"SLURM_JOB_ID": "7", "SCRATCH": "/scratch", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-eo", "pipefail", "-n"], input=script, text=True, check=True)
        script += "\nwait\n"
        subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, env=os.environ | slurm, check=False)
        told.append((tmp_path / "calls").read_text(encoding="utf-8").splitlines())
        (tmp_path / "calls").unlink()
    launched, ranks, ray = told
    for number, line in enumerate(launched):
        assert f" --machine_rank {number} --main_process_ip node1 " in line
    assert len(launched) == 2
    assert all("--num_machines 2 --num_processes 16 " in line and " -m hba train sft " in line for line in launched)
    started = [re.match(r"hba RANK=(\d+)/16 LOCAL=(\d) AT=node1:29500 ", line) for line in ranks[:-1]]
    assert [(int(found[1]), int(found[2])) for found in started if found] == [(n, n % 8) for n in range(16)]
    assert ranks[-1] == "scontrol requeue 7"
    (trains, *starts) = sorted(line.split(" --block")[0] for line in ray)  # in the background, in any order
    assert starts == [*["ray start --address=node1:6379"] * 3, "ray start --head --port=6379"]
    assert "RAY=node1:6379 train rl --engine verl" in trains and trains.endswith("verl.nodes=4")
