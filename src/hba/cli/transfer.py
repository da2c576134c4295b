"""`hba transfer`: the paper's protocol of held-out datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import AllowQuarantined, ConfigOption, JsonFlag, Overrides, answer, finish, recipe_path

TRANSFER_EXAMPLE = "Example: hba transfer --config sft_tiny --run runs/transfer atlas=runs/mini model.name=runs/tiny"


def transfer_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    run: Annotated[Path, typer.Option(help="Folder of all runs; an unfinished one is resumed.")] = Path(
        "runs/transfer"
    ),
    heldout: Annotated[
        list[str] | None, typer.Option(help="Dataset to hold out; repeat it. Those of the paper by default.")
    ] = None,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Pretrain without the held-out datasets, fine-tune on each, compare with no pretraining."""
    from hba.cli.progress import tallied
    from hba.config import load_config
    from hba.train.config import SftConfig

    settings = load_config(SftConfig, recipe_path(config), overrides or [])
    from hba.train.transfer import run_transfer

    result = run_transfer(run, settings, heldout=heldout or None, progress=tallied)
    if result is None:  # another rank reports
        return
    from hba.report.transfer import transfer_markdown, transfer_table
    from hba.storage import atomic_write

    with atomic_write(run / "transfer.md") as handle:
        handle.write(transfer_markdown(result))

    def show() -> None:
        from rich.console import Console

        Console().print(transfer_table(result))

    answer(result.record(), as_json=json, show=show)
    finish(result.quarantined, allow_quarantined)
