"""The `hba` command: parse, call, print. Commands live in this package, one file a group; nothing heavy is imported
before a command runs, so that `hba --help` answers at once.

Exit codes: 0 done, 1 failed, 2 bad usage or bad input (a quarantined sample that was not allowed for included), 75
stopped by SIGTERM or SIGUSR1 (training; the same command goes on), 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from typing import Annotated, ClassVar

import typer

from hba.cli.ask import ASK_EXAMPLE, ask_command
from hba.cli.atlas import atlas_app
from hba.cli.evaluate import (
    EVAL_EXAMPLE,
    bundle_command,
    compare_command,
    eval_command,
    leaderboard_command,
    report_command,
    score_command,
    verify_command,
)
from hba.cli.judge import JUDGE_EXAMPLE, judge_command
from hba.cli.options import Commands, say
from hba.cli.predict import predict_command
from hba.cli.release import LMMS_EXAMPLE, export_app, merge_command, push_command
from hba.cli.serve import SERVE_EXAMPLE, serve_command
from hba.cli.start import demo_command, doctor_command, explore_command, tiny_command
from hba.cli.train import FIRST, FIT_EXAMPLE, SFT_EXAMPLE, TRANSFER_EXAMPLE, fit_command, train_app, transfer_command
from hba.environment import EXTRAS, install_fix
from hba.errors import HbaError, InputError, StoppedError
from hba.storage import lacks_memory

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED = 130  # what typer makes of Ctrl-C
MORE_ROOM = "Take a smaller model, 4 bits (quantization=nf4) or a larger GPU; `hba fit MODEL --gpu GB` tells what fits."

# Under `hba` alone: what to type next.
BEGIN = """Example: hba demo                       all steps on made-up data, in minutes
Or:      hba ask MODEL clip.mp4         labels for a file of yours
Or:      hba eval MODEL --atlas ATLAS   score a model
Help:    hba COMMAND --help             an example and the options of a command"""


class Root(Commands):
    """`hba`: its commands by what a person wants to do."""

    PANELS: ClassVar[dict[str, tuple[str, ...]]] = {
        "Start here": ("demo", "ask", "eval", "explore", "doctor"),
        "Data": ("atlas",),
        "Train a model": ("train", "fit", "merge", "transfer", "tiny"),
        "Evaluate, step by step": ("predict", "judge", "score", "report", "compare", "leaderboard"),
        "Share": ("serve", "push", "bundle", "verify", "export"),
    }
    OPTIONS: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {
        "merge": {"What the authors released": ("backbone", "onto", "adapters_of", "pooling", "lora_alpha")},
        "ask": {
            "The question": (
                *("task", "dataset", "question", "transcript", "every"),
                *("transcribe", "transcribe_url", "transcribe_key_env"),
            ),
            "The model": ("backend", "base_url", "key"),
        },
        "serve": {"Limits": ("max_body", "max_waiting", "timeout", "window"), "The model": ("key",)},
        "predict": {
            "The model": ("backend", "base_url"),
            "Which rows": ("modalities", "datasets", "limit", "per_dataset", "shard"),
        },
        "eval": {
            "The model": ("backend", "base_url"),
            "The judge": ("judge", "judge_url"),
            "Which rows": ("per_dataset",),
        },
        "judge": {"The model": ("backend", "base_url"), "How good is the judge?": ("calibrate", "offline")},
        "leaderboard": {
            "Where to": ("out", "site"),
            "Which rows": ("published", "tasks", "name", "max_quarantined", "allow_other_data"),
        },
        "explore": {"The Try page": ("models", "keep")},
    }


app = typer.Typer(
    name="hba",
    cls=Root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Open the Human Behavior Atlas, train OmniSapiens on it, evaluate any model.",
    epilog=BEGIN,
)


def _print_version(asked: bool) -> None:
    if asked:
        import hba

        say(f"hba {hba.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of `hba` itself."""


app.command("demo", epilog="Example: hba demo --run runs/demo")(demo_command)
app.add_typer(atlas_app, name="atlas", epilog="Example: hba atlas mini runs/mini")
app.add_typer(train_app, name="train", epilog=SFT_EXAMPLE + FIRST)
app.command("fit", epilog=FIT_EXAMPLE)(fit_command)
app.command("transfer", epilog=TRANSFER_EXAMPLE)(transfer_command)
app.command("merge", epilog="Example: hba merge runs/sft models/omnisapiens")(merge_command)
app.command("push", epilog="Example: hba push runs/sft my-org/omnisapiens --license apache-2.0")(push_command)
app.command("ask", epilog=ASK_EXAMPLE)(ask_command)
app.command("serve", epilog=SERVE_EXAMPLE)(serve_command)
app.command("predict", epilog="Example: hba predict runs/demo/sft --atlas runs/demo/atlas")(predict_command)
app.command("eval", epilog=EVAL_EXAMPLE)(eval_command)
app.command("score", epilog="Example: hba score runs/demo/sft")(score_command)
app.command("judge", epilog=JUDGE_EXAMPLE)(judge_command)
app.command("report", epilog="Example: hba report runs/demo/sft")(report_command)
app.command("bundle", epilog="Example: hba bundle runs/demo/sft")(bundle_command)
app.command("verify", epilog="Example: hba verify runs/demo/sft.zip")(verify_command)
app.command("compare", epilog="Example: hba compare runs/sft runs/rl")(compare_command)
app.command("leaderboard", epilog="Example: hba leaderboard runs/sft runs/rl --out board.html")(leaderboard_command)
app.command("explore", epilog="Example: hba explore --atlas runs/demo/atlas --runs runs")(explore_command)
app.add_typer(export_app, name="export", epilog=LMMS_EXAMPLE)
app.command("tiny", epilog="Example: hba tiny runs/tiny --atlas runs/mini")(tiny_command)
app.command("doctor", epilog="Example: hba doctor --json")(doctor_command)


def main() -> None:
    """Entry point. The one place where an hba error becomes a message and an exit code."""
    try:
        app()
    except HbaError as error:
        sys.stderr.write(f"{error}\n" if isinstance(error, StoppedError) else f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except ModuleNotFoundError as error:
        # A command of a light install that needs more, where it was not asked at its start.
        extra = next((extra for extra, names in EXTRAS.items() if str(error.name).partition(".")[0] in names), None)
        if extra is None:
            raise
        sys.stderr.write(f"error: needs {error.name}, which is not installed. Fix: {install_fix(extra)}.\n")
        raise SystemExit(InputError.exit_code) from None
    except (RuntimeError, MemoryError, OSError) as error:
        # Where nobody knew what it was for: a model on its way to its device, a merge.
        if lacks_memory(error):
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            sys.stderr.write(f"error: no room in memory ({said}). Fix: {MORE_ROOM}\n")
            raise SystemExit(1) from None
        if not isinstance(error, OSError):
            raise
        # A file that cannot be read or written for a reason that no module foresaw: the user's disk, not a bug.
        name = error.filename2 or error.filename  # the second is where a finished file should have gone
        if name is None and error.errno not in NO_SPACE:
            raise
        place = "" if name is None else f"{name}: "
        sys.stderr.write(f"error: {place}{error.strerror}. Fix: Check the path, its permissions and the free space.\n")
        raise SystemExit(InputError.exit_code) from None
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            sys.stderr.write("interrupted; run the same command again to resume\n")
        raise
