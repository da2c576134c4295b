"""A page as one file to share: its style inside, no script, no form, no player.

The page is made anew with `live` off, and its links, which would lead nowhere, are taken out. Sounds and clips are not
part of it: a table of scores may be shown to others, the recordings behind it often may not.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Match

from hba.errors import InputError
from hba.explorer.app import PAGES, SHARED, explorer_of, form_of

SHOWN = (*(path for path, _ in PAGES), "/run", "/runs/side-by-side")
_ADDRESS = re.compile(r'(<a\b[^>]*?)\shref="[^"]*"')  # values are escaped: no quote ends one early


def snapshot(request: Request) -> Response:
    """The page whose address stands in `of`, as a file. Raises InputError for an address that is none of the pages."""
    asked = urlsplit(form_of(request).text("of"))
    if asked.netloc or not (asked.path in SHOWN or asked.path.startswith("/sample/")):
        raise InputError(f"no page {asked.path!r} to share", where="of", fix="Use the link on a page.")
    scope = {**request.scope, "path": asked.path, "raw_path": asked.path.encode(), "query_string": asked.query.encode()}
    explorer_of(request)
    for route in request.app.routes:
        match, child = route.matches(scope)
        if match is Match.FULL:
            page = child["endpoint"](Request({**scope, **child, SHARED: True}))
            name = re.sub(r"\W+", "-", asked.path).strip("-")
            headers = {"content-disposition": f'attachment; filename="hba-{name}.html"'}
            return HTMLResponse(_ADDRESS.sub(r"\1", page.body.decode()), headers=headers)
    raise InputError(f"no page {asked.path!r} to share", where="of", fix="Use the link on a page.")
