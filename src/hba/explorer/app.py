"""What every page has in common.

Pages are functions of a request (`pages`), which ask its `Explorer` for the atlas, the runs and the database behind
them. `server` says which address gives which page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

from hba.errors import InputError
from hba.explorer.drawings import level
from hba.explorer.index import AtlasIndex, Database, Form
from hba.explorer.media import Decoder
from hba.explorer.runs import Runs
from hba.report import html

HERE = Path(__file__).parent
PAGES: tuple[tuple[str, str], ...] = (
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
        common |= {"here": request.url.path + form.link(), "live": SHARED not in request.scope, "sheet": sheet()}
        text = self.templates.get_template(template).render(**common, **values)
        return HTMLResponse(text)


def explorer_of(request: Request) -> Explorer:
    """The explorer that serves a request."""
    found: Explorer = request.app.state.explorer
    return found


def form_of(request: Request) -> Form:
    """The values of the address."""
    return Form(dict(request.query_params))


def templates() -> Environment:
    """Jinja over the explorer's own templates and those of reports."""
    made = html.environment(HERE / "templates")
    made.globals["level"] = level
    return made


@cache
def sheet() -> Markup:
    """The style of every page: that of the report and the explorer's own."""
    own = (HERE / "static" / "explorer.css").read_text(encoding="utf-8")
    return html.style("style.css") + Markup(own)  # noqa: S704  our own


