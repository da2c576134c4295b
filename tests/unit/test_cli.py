"""The command line: what it offers is pinned, help is light, --json leaves nothing but JSON on standard output."""

import json
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import hba
from hba.cli import app

# Every command with its arguments and options, `!` behind what is required. A change here is a change for users.
COMMANDS = {
    "demo": "overrides --run --size --seed --json",
    "atlas mini": "out! --size --seed --workers --json",
    "atlas validate": "atlas! --split --out --quick --release --fresh --workers --json",
    "atlas info": "atlas! --split --durations --out --cache --workers --json",
    "atlas download": "repo! out! --split --revision --workers --json",
    "atlas build": "folder out --labels --file-column --label-column --group-column --transcript-column"
    " --split-column --layout --dataset --question --choices --allow-unlabelled --seed --list --allow-broken --json",
    "atlas convert": "source! out! --to! --split --shard-megabytes --workers --allow-quarantined --json",
    "atlas prepare": "atlas! overrides --split --allow-quarantined --json",
    "atlas describe": "root --split --audio --video --transcripts --frames-per-second --workers --executor --out-format"
    " --replace --allow-failed --setup --json",
    "train sft": "overrides --config --run --gpu --allow-quarantined --json",
    "ask": "model! files! --task --dataset --question --transcript --transcribe --transcribe-url --transcribe-key-env"
    " --every --backend --base-url --set --csv --out --json",
    "serve": "model! --backend --host --port --no-token --max-body --max-waiting --timeout --window --set --json",
    "eval": "model! overrides --atlas --split --backend --base-url --judge --judge-url --run --per-dataset"
    " --dry-run --allow-failed --allow-quarantined --json",
    "fit": "model! overrides --gpu! --gpus --config --stage --atlas --tokens --json",
    "transfer": "overrides --config --run --heldout --allow-quarantined --json",
    "train qa": "overrides --config --from --run --allow-quarantined --json",
    "train bam": "overrides --config --from --dataset --all --allow-missing --run --allow-quarantined --json",
    "merge": "run! out! --dtype --backbone --onto --adapters-of --pooling --lora-alpha --json",
    "train lm": "overrides --config --run --gpu --allow-quarantined --json",
    "train rl": "overrides --config --algorithm --base-url --run --engine --dry-run --gpu --allow-quarantined --json",
    "predict": "model! overrides --atlas! --split --backend --base-url --run --modalities --datasets --limit"
    " --per-dataset --shard --retry-failed --dry-run --allow-failed --allow-quarantined --json",
    "push": "run! repo! --license! --merge --private --json",
    "score": "run! --resamples --seed --by --cluster --atlas --partial --published --json",
    "judge": "run overrides --model --backend --base-url --atlas --calibrate --offline --out --retry-unjudged"
    " --dry-run --allow-unjudged --cache --json",
    "report": "run! --atlas --out --json",
    "explore": "--atlas --runs --host --port --cache --browser --models --keep --no-token --json",
    "bundle": "run! out --atlas --prompts --json",
    "verify": "bundle! --atlas --json",
    "compare": "runs! --seeds --allow-other-data --out --flips --resamples --seed --json",
    "leaderboard": "runs! --out --published --tasks --name --max-quarantined --allow-other-data --site --json",
    "export lmms-eval": "out! --atlas! --split --json",
    "export inspect": "out! --atlas! --split --json",
    "export wandb": "run! --project! --offline --predictions --json",
    "tiny": "out! --atlas! --family --seed --json",
    "doctor": "--online --json",
}
GROUPS = ("", "atlas", "train", "export")
# Not pydantic: typer itself imports it when a command has parameters.
HEAVY = {"torch", "transformers", "accelerate", "peft", "torchvision", "sklearn", "av", "numpy", "rich.live"}
SMALL = ["train.max_steps=2", "train.batch_size=4", "train.validate_every=1", "encode.num_frames=2", "loader.workers=0"]


def commands(command, path=()):
    if not hasattr(command, "commands"):
        shown = [f"{p.opts[0]}{'!' if p.required else ''}" for p in command.params]
        return {" ".join(path): " ".join(shown)}
    found = {}
    for name, inner in command.commands.items():
        found |= commands(inner, (*path, name))
    return found


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=900)


def test_commands_and_flags_are_those_of_the_table():
    found = commands(typer.main.get_command(app))
    assert found == COMMANDS
    assert [name for name, flags in found.items() if not flags.endswith("--json")] == []


@pytest.mark.parametrize("name", [*GROUPS, *COMMANDS])
def test_help_has_an_example_that_calls_the_command(name):
    result = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    assert f"Example: hba {name}".strip() in " ".join(result.stdout.split())
    assert result.stdout.index("Example: hba") < result.stdout.index("Options ─")  # what to type stands above the rest


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name):
    command = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    assert command.help
    assert [p.name for p in command.params if not p.help] == []


def test_version_is_that_of_the_package():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, f"hba {hba.__version__}")


def test_help_imports_nothing_heavy():
    code = f"""
import sys
from typer.testing import CliRunner
from hba.cli import app
for name in {[*GROUPS, *COMMANDS]!r}:
    assert CliRunner().invoke(app, [*name.split(), "--help"]).exit_code == 0
print(*sorted({HEAVY!r} & set(sys.modules)))
"""
    assert python("-c", code).stdout.split() == []


WRONG_CONFIGS = [["predict", "x", "--atlas", "x", "batch_siz=1"]]
for _stage in ("train sft", "train qa", "train bam --all", "train lm", "train rl", "transfer"):
    WRONG_CONFIGS += [[*_stage.split(), *wrong] for wrong in (["train.epoch=3"], ["--config", "rl_tin"])]


def test_a_wrong_config_is_reported_before_torch_is_imported():
    code = f"""
import sys
from hba.cli import main
for arguments in {WRONG_CONFIGS!r}:
    sys.argv = ["hba", *arguments]
    try:
        main()
    except SystemExit as stop:
        print(stop.code, arguments)
print(*sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = python("-c", code)
    assert done.stdout.splitlines() == [*(f"2 {arguments}" for arguments in WRONG_CONFIGS), ""]
    assert len(re.findall(r"^error: .*(?:unknown key|no config file or recipe) ", done.stderr, re.MULTILINE)) == 13


def test_help_is_there_at_once():
    """It imports nothing but this package, the standard library, and what it is drawn with."""
    code = """
import contextlib, sys
import typer.main, typer.rich_utils, rich.console, rich.markdown, rich.panel, rich.table
theirs = set(sys.modules)
from hba.__main__ import main
sys.argv = ["hba", "--help"]
with contextlib.suppress(SystemExit):
    main()
new = {name.partition(".")[0] for name in set(sys.modules) - theirs}
print("imported:", *sorted(new - set(sys.stdlib_module_names)))
"""
    done = python("-c", code)
    assert done.returncode == 0 and "Start here" in done.stdout, done.stderr
    drawn = {"imported:", "hba", "typer", "rich", "markdown_it", "mdurl", "pygments", "shellingham"}
    assert "hba" in done.stdout.splitlines()[-1] and set(done.stdout.splitlines()[-1].split()) <= drawn


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nope"], "nope"),
        (["train", "nope"], "nope"),
        (["demo", "--nope"], "--nope"),
        (["score"], "RUN"),
        (["predict", "x"], "--atlas"),
        (["atlas", "mini", "x", "--seed", "one"], "--seed"),
        (["score", "x", "--resamples", "1"], "100"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_what_is_wrong(hba, arguments, named):
    code, out, err = hba(*arguments)
    assert (code, out) == (2, "")
    assert named.lower() in err.lower()
    assert "Traceback" not in err


def test_no_command_shows_the_help(hba):
    code, out, err = hba()
    assert code == 2
    assert "Start here" in out + err and "Example: hba demo" in " ".join((out + err).split())


def test_ctrl_c_says_how_to_go_on(hba, monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hba.doctor.diagnose", interrupt)
    code, out, err = hba("doctor")
    assert (code, out) == (130, "")
    assert "run the same command again to resume" in err


# --- --json ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture
def trained(place, mini_atlas, backbone, hba):
    """A run folder of two steps, and what `train sft --json` said."""
    run = place / "run"
    common = [f"atlas={mini_atlas}", f"model.name={backbone}"]
    answer = hba("train", "sft", "--config", "sft_tiny", "--run", run, "--json", *common, *SMALL)
    return run, answer


def test_json_of_training_alone_is_on_standard_output(trained):
    run, (code, out, _) = trained
    assert code == 0
    said = json.loads(out)
    assert said["run"] == str(run)
    assert said["step"] == 2
    assert said["quarantined"] == 0


def test_json_from_predictions_to_report(trained, mini_atlas, hba):
    run, _ = trained
    code, out, _ = hba("predict", run, "--atlas", mini_atlas, "--split", "test[:8]", "loader.workers=1", "--json")
    predicted = json.loads(out)
    assert (code, predicted["predicted"] + predicted["skipped"], predicted["quarantined"]) == (0, 8, 0)
    code, out, _ = hba("score", run, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((run / "metrics.json").read_text())
    code, out, _ = hba("report", run, "--atlas", mini_atlas, "--json")
    assert (code, json.loads(out)) == (0, {"report": str(run / "report.html")})


def test_json_of_the_others(place, mini_atlas, hba):
    code, out, _ = hba("atlas", "mini", mini_atlas, "--size", "tiny", "--json")
    made = json.loads(out)
    assert (code, made["path"], made["size"], made["reused"]) == (0, str(mini_atlas), "tiny", True)
    code, out, _ = hba("tiny", place / "tiny", "--atlas", mini_atlas, "--json")
    assert (code, json.loads(out)) == (0, {"model": str(place / "tiny")})
    code, out, _ = hba("doctor", "--json")
    assert code == 0
    assert json.loads(out)


def test_libraries_stay_silent(place, mini_atlas):
    """In a process of its own, where no test has silenced anything before."""
    command = ["-m", "hba", "tiny", str(place / "silent"), "--atlas", str(mini_atlas), "--json"]
    done = python(*command)
    assert json.loads(done.stdout) == {"model": str(place / "silent")}
    assert done.stderr == ""


def test_markup_in_a_path_is_shown_as_it_is(place, mini_atlas, hba):
    out_folder = place / "[red]name[/red] [0]"
    code, out, _ = hba("tiny", out_folder, "--atlas", mini_atlas)
    assert code == 0
    assert "[red]name[/red] [0]" in out
