"""`hba serve`: a model of this machine behind HTTP, from the command's options to `hba.serve`."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from typing import Annotated, Any

import typer

from hba.cli.options import Host, JsonFlag, Port, SetKey, answer, bold, configured, flag, number, takes

SERVE_EXAMPLE = "Example: hba serve runs/demo/sft --port 8378"


def serve_command(
    model: Annotated[str, typer.Argument(help="Run folder, checkpoint, or Hugging Face model.")],
    backend: Annotated[str | None, takes("NAME", "How to ask it: heads or hf.", default="as MODEL was trained")] = None,
    host: Host = "127.0.0.1",
    port: Port = 8378,
    no_token: Annotated[bool, flag("--no-token", "Answer every user of this machine, without a token.")] = False,
    max_body: Annotated[int, number("Largest request, in MB.", least=1)] = 100,
    max_waiting: Annotated[int, number("Requests at once; more are told to retry.", least=1)] = 256,
    timeout: Annotated[float, number("Seconds for an upload, and again for its answer.", least=1)] = 120.0,
    window: Annotated[float, number("Milliseconds that a batch waits for more requests.")] = 50.0,
    key: SetKey = None,
    json: JsonFlag = False,
) -> None:
    """Answer over HTTP: chat for OpenAI's client, and labels with probabilities.

    /v1/chat/completions is for OpenAI's client, /v1/classify for labels. The token is $HBA_SERVE_TOKEN if you set it;
    else a new one is made and printed. Ctrl-C or SIGTERM ends the server.
    """
    from hba.environment import require_extra
    from hba.evaluate.config import PredictConfig

    require_extra("train", "hba serve")
    settings = configured(PredictConfig, None, key)
    from hba.explorer.server import bind, is_loopback

    bound = bind(host, port, with_token=not no_token)
    from hba.evaluate.desk import Desk
    from hba.serve import MEGABYTE, Limits, create_app, run
    from hba.storage import cache_folder, unwinding

    limits = Limits(body_bytes=max_body * MEGABYTE, waiting=max_waiting, seconds=timeout)
    own = None if no_token else os.environ.get("HBA_SERVE_TOKEN")
    token = None if no_token else own or bound.token
    how: dict[str, Any] = {"folder": cache_folder() / "serve", "backend": backend, "config": settings}
    how |= {"most_waiting": 4 * max_waiting, "window_seconds": window / 1000}
    how |= {"decode_seconds": min(settings.loader.decode_timeout_seconds, timeout / 4)}
    with unwinding(), bound.socket, closing(Desk(model, **how)) as desk:
        app = create_app(desk, limits=limits, token=token, only_loopback=is_loopback(host))
        url = bound.url.partition("?")[0] + "v1"
        said = {"url": url, "model": model} | ({} if own or token is None else {"token": token})
        shown = f" Token: [bold]{token}[/bold]." if "token" in said else ""
        answer(said, f"Serving {bold(model)} at [bold]{url}[/bold].{shown} Ctrl-C ends it.", as_json=json)
        sys.stdout.flush()
        run(app, bound.socket, limits)
