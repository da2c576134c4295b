"""The `hba` command: parse, call, print. Commands live in this package, one file a group; nothing heavy is imported
before a command runs, so that `hba --help` answers at once.

Exit codes: 0 done, 1 failed, 2 bad usage or bad input (a quarantined sample that was not allowed for included).
"""

from __future__ import annotations

import sys

import typer

from hba.cli.atlas import atlas_app
from hba.cli.evaluate import predict_command, report_command, score_command
from hba.cli.start import demo_command, doctor_command, tiny_command
from hba.cli.train import train_app
from hba.errors import HbaError

app = typer.Typer(
    name="hba",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Open the Human Behavior Atlas, train OmniSapiens on it, evaluate any model, read the results.",
    epilog="Example: hba demo",
)
app.command("demo", epilog="Example: hba demo --run runs/demo")(demo_command)
app.add_typer(atlas_app, name="atlas")
app.add_typer(train_app, name="train")
app.command("predict", epilog="Example: hba predict runs/demo/sft --atlas runs/demo/atlas")(predict_command)
app.command("score", epilog="Example: hba score runs/demo/sft")(score_command)
app.command("report", epilog="Example: hba report runs/demo/sft")(report_command)
app.command("tiny", epilog="Example: hba tiny runs/tiny --atlas runs/mini")(tiny_command)
app.command("doctor", epilog="Example: hba doctor --json")(doctor_command)


def main() -> None:
    """Entry point. The one place where an hba error becomes a message and an exit code."""
    try:
        app()
    except HbaError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to resume\n")
        raise SystemExit(130) from None
