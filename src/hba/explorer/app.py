"""The app: which address gives which page, and what every page has in common.

`create_app` puts the index, the runs, the database and the decoder together; pages are functions of a request and these
in `pages_*`. An error of hba becomes a page that says what, where and what to do; nothing else is caught.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from hba.errors import HbaError, InputError
from hba.explorer.database import Database
from hba.explorer.decode import Decoder
from hba.explorer.drawings import level
from hba.explorer.guard import Guard
from hba.explorer.index import AtlasIndex, index_name, located
from hba.explorer.query import Form
from hba.explorer.runs import Runs
from hba.report import html

HERE = Path(__file__).parent
PAGES = (
    ("/atlas", "Atlas"), ("/runs", "Runs"), ("/predictions", "Predictions"), ("/scores", "Scores"),
    ("/compare", "Compare"), ("/rl", "RL"), ("/judge", "Judge review"), ("/quarantine", "Quarantine"),
)  # fmt: skip


SHARED = "hba.shared"  # set in the scope of a page that is made to be saved


@dataclass(frozen=True)
class Explorer:
    """What pages are made from. `index` is None when no atlas was given."""

    index: AtlasIndex | None
    runs: Runs
    database: Database
    decoder: Decoder
    templates: Environment

    def atlas(self) -> AtlasIndex:
        """The atlas. Raises InputError when none was given."""
        if self.index is None:
            raise InputError("no atlas is open", fix="Start with `hba explore --atlas FOLDER`.")
        return self.index

    def page(self, request: Request, template: str, title: str, **values: Any) -> HTMLResponse:
        """A page of the app: the template with navigation, title and the form of the address around it."""
        form = form_of(request)
        common = {"title": title, "navigation": PAGES, "path": request.url.path, "form": form, "index": self.index}
        common |= {"here": request.url.path + form.link(), "live": SHARED not in request.scope, "sheet": _sheet()}
        text = self.templates.get_template(template).render(**common, **values)
        return HTMLResponse(text)


def explorer_of(request: Request) -> Explorer:
    """The explorer that serves a request."""
    found: Explorer = request.app.state.explorer
    return found


def form_of(request: Request) -> Form:
    """The values of the address."""
    return Form(dict(request.query_params))


def create_app(
    *,
    atlas: str | Path | None,
    runs: Path | None,
    cache_folder: Path,
    token: str | None = None,
    only_loopback: bool = True,
) -> Starlette:
    """The app over an atlas (a folder, or org/name on the hub) and a folder of runs; `cache_folder` keeps the index.

    Without a `token` everybody who reaches the server may read everything. `only_loopback` answers to the names of this
    machine alone.
    Raises InputError for a folder that holds no atlas, and for a dataset on the hub that cannot be had.
    """
    root = located(atlas) if atlas else None
    scratch = tempfile.TemporaryDirectory(prefix="hba-explore-")
    rows = cache_folder / "explorer" / index_name(root) if root else Path(scratch.name) / "rows.sqlite"
    database = Database(rows, Path(scratch.name) / "runs.sqlite")
    index = AtlasIndex(root, database, cache_folder) if root else None
    explorer = Explorer(index, Runs(runs, database), database, Decoder(), _templates())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if index is not None:
            index.start()
        yield
        explorer.decoder.close()
        scratch.cleanup()

    guard = Middleware(Guard, token=token, only_loopback=only_loopback)
    app = Starlette(routes=_routes(), middleware=[guard], lifespan=lifespan, exception_handlers={HbaError: _error_page})
    app.state.explorer = explorer
    return app


def _templates() -> Environment:
    made = html.environment(HERE / "templates")
    made.globals["level"] = level
    return made


@cache
def _sheet() -> Markup:
    """The style of every page: that of the report and the explorer's own."""
    own = (HERE / "static" / "explorer.css").read_text(encoding="utf-8")
    return html.style("style.css") + Markup(own)  # noqa: S704  our own


def _style(request: Request) -> Response:
    return Response(_sheet(), media_type="text/css")


def _routes() -> list[BaseRoute]:
    from hba.explorer import pages_atlas, pages_judge, pages_predictions, pages_rl, pages_runs, pages_scores, snapshot

    get: dict[str, Callable[[Request], Response]] = {
        "/": lambda request: RedirectResponse("/atlas" if explorer_of(request).index else "/runs"),
        "/atlas": pages_atlas.atlas,
        "/atlas/progress": pages_atlas.progress,
        "/sample/{split}/{number:int}": pages_atlas.sample,
        "/media/{split}/{number:int}/{field}/{place:int}": pages_atlas.medium,
        "/picture/{kind}/{split}/{number:int}/{field}/{place:int}": pages_atlas.picture,
        "/quarantine": pages_atlas.quarantine,
        "/runs": pages_runs.runs,
        "/runs/side-by-side": pages_runs.side_by_side,
        "/run": pages_runs.run,
        "/run/curves": pages_runs.run_curves,
        "/predictions": pages_predictions.predictions,
        "/prediction": pages_predictions.prediction,
        "/scores": pages_scores.scores,
        "/compare": pages_scores.compare,
        "/rl": pages_rl.rl,
        "/judge": pages_judge.judge,
        "/snapshot": snapshot.snapshot,
        "/style.css": _style,
    }
    posts = [Route("/judge", pages_judge.save, methods=["POST"])]
    return [
        *(Route(path, page, methods=["GET"]) for path, page in get.items()),
        *posts,
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]


def _error_page(request: Request, error: Exception) -> Response:
    assert isinstance(error, HbaError)
    response = explorer_of(request).page(request, "error.html.jinja", "That did not work", error=error)
    response.status_code = 404 if isinstance(error, InputError) else 500
    return response
