"""`hba explore`: the atlas, the runs and their mistakes in a browser."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from hba.cli.options import JsonFlag, answer, say
from hba.errors import InputError
from hba.storage import cache_folder

NO_SERVER = "Install it: pip install 'human-behavior-atlas[explorer]'."


def explore_command(
    atlas: Annotated[
        Path | None, typer.Option(help="Atlas folder, or org/name on the hub; none shows runs alone.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder below which run folders are looked for.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 is every network's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8377,
    cache: Annotated[
        Path | None, typer.Option(help="Where the index is kept; else $HBA_CACHE or ~/.cache/hba.")
    ] = None,
    browser: Annotated[
        bool | None, typer.Option(help="Open the page in a browser; as it is, where a screen seems to be.")
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Let everybody who has an account on this machine read everything.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """See and hear the data, the predictions and the mistakes: a local web app. Ctrl-C ends it."""
    try:
        from hba.explorer.app import create_app
        from hba.explorer.guard import is_loopback
        from hba.explorer.server import bind, has_screen, open_browser, serve
    except ImportError as error:
        raise InputError(f"the explorer's server is not installed ({error.name})", fix=NO_SERVER) from None
    folder = cache or cache_folder()
    bound = bind(host, port, with_token=not no_token)
    only_loopback = is_loopback(host)
    app = create_app(atlas=atlas, runs=runs, cache_folder=folder, token=bound.token, only_loopback=only_loopback)
    answer({"url": bound.url}, as_json=json, show=lambda: say(f"Open [bold]{bound.url}[/bold] (Ctrl-C ends it)."))
    sys.stdout.flush()
    with TemporaryDirectory(prefix="hba-explore-") as private:
        if browser if browser is not None else (not json and has_screen()):
            open_browser(bound, Path(private))
        serve(bound, app)
