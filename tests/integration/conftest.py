"""A Hugging Face hub on the loopback: the requests that huggingface_hub makes for datasets, with scripted faults.

Small files are served in place, archives and shards from another host, as the hub does. Every request is recorded.
"""

import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LARGE = (".tar", ".tar.gz", ".tgz", ".parquet")
TOKEN = "hf_secretoftests"


@dataclass
class Fault:
    """What happens to the next `times` requests of `method` whose path ends with `path`."""

    method: str
    path: str
    status: int = 200
    headers: dict = field(default_factory=dict)
    cut_at: int | None = None  # bytes of the body before the connection is dropped
    stall: threading.Event | None = None  # instead of dropping it: wait for this
    times: int = 1


@dataclass
class Repository:
    """Files of a dataset by name, at one commit."""

    files: dict[str, Path]
    commit: str

    @classmethod
    def of(cls, folder):
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        return cls(files, hashlib.sha1(repr(sorted(files)).encode()).hexdigest())

    def entry(self, name):
        data = self.files[name].read_bytes()
        entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry


class Hub:
    """The server: `repos` by id, `faults` in order, and in `requests` the (method, path, status) of every answer."""

    def __init__(self):
        self.repos, self.faults, self.requests, self.tokens = {}, [], [], {}
        self.commits = {}  # every state that a dataset has had
        self.sent = {}  # bytes of the contents of each file
        self.reached = threading.Event()  # a fault with `stall` waits
        self.page = 1000
        self.closed = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, repo, folder):
        self.repos[repo] = Repository.of(folder)
        self.commits[repo, self.repos[repo].commit] = self.repos[repo]
        return self.repos[repo]

    def at(self, repo, revision):
        """The files at a revision, None where there is no such one."""
        return self.repos[repo] if revision == "main" else self.commits.get((repo, revision))

    def fail(self, method, path, **what):
        self.faults.append(Fault(method, path, **what))

    def fetched(self, start=0):
        """Names of the files whose contents were sent, in order."""
        return [path for method, path, status in self.requests[start:] if method == "GET" and status < 400 and path]

    def leave(self):
        """Answer nothing any more."""
        self.closed = True

    def close(self):
        self.leave()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.hub.closed:  # a connection that was open before
            self.close_connection = True
            return
        with suppress(BrokenPipeError, ConnectionResetError):
            self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        length = int(self.headers.get("Content-Length") or 0)
        form = parse_qs(self.rfile.read(length).decode()) if length else {}
        host = self.headers["Host"].split(":")[0]
        self.hub.tokens.setdefault(host, set()).add(self.headers.get("Authorization"))
        fault = self.fault(unquote(url.path))
        if fault is not None and fault.status != 200:
            return self.send(b"{}", status=fault.status, headers=fault.headers)
        if parts[0] == "api":
            return self.api("/".join(parts[2:4]), parts[4:], form, parse_qs(url.query))
        if "/".join(parts[1:3]) not in self.hub.repos:
            return self.error(404, "RepoNotFound")
        name = "/".join(parts[5:])
        repo = self.hub.at("/".join(parts[1:3]), parts[4])
        if repo is None:
            return self.error(404, "RevisionNotFound")
        if name not in repo.files:
            return self.error(404, "EntryNotFound", {"X-Repo-Commit": repo.commit})
        return self.file(repo, name, fault)

    def fault(self, path):
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and path.endswith(fault.path):
                fault.times -= 1
                return fault
        return None

    def api(self, name, rest, form, query):
        if name not in self.hub.repos:
            return self.error(401, None)  # the hub does not tell strangers what exists
        repo = self.hub.at(name, rest[1])
        if repo is None:
            return self.error(404, "RevisionNotFound")
        if rest[0] == "revision":
            siblings = [{"rfilename": name} for name in repo.files]
            value = {"id": "x/y", "sha": repo.commit, "private": False, "disabled": False, "gated": False, "tags": []}
            return self.send_json(value | {"siblings": siblings, "downloads": 0, "likes": 0})
        if rest[0] == "paths-info":
            return self.send_json([repo.entry(name) for name in form["paths"] if name in repo.files])
        return self.tree(repo, "/".join(rest[2:]), query)

    def tree(self, repo, folder, query):
        prefix = folder + "/" if folder else ""
        inside = [name for name in repo.files if name.startswith(prefix)]
        folders = sorted({prefix + name[len(prefix) :].split("/")[0] for name in inside if "/" in name[len(prefix) :]})
        entries = [{"type": "directory", "path": path, "oid": "0"} for path in folders]
        entries += [repo.entry(name) for name in inside if "/" not in name[len(prefix) :]]
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + self.hub.page < len(entries):
            link = f"{self.hub.url}{urlsplit(self.path).path}?cursor={start + self.hub.page}"
            headers["Link"] = f'<{link}>; rel="next"'
        return self.send_json(entries[start : start + self.hub.page], headers)

    def file(self, repo, name, fault):
        data = repo.files[name].read_bytes()
        etag = hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        away = self.headers["Host"].startswith("localhost")
        if name.endswith(LARGE) and not away:
            if fault is not None:
                fault.times += 1  # it is meant for the contents
            place = f"http://localhost:{self.hub.port}{self.path}"
            linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data)), "Location": place}
            return self.send(b"", status=302, headers=headers | linked)
        wanted = self.headers.get("Range")
        status, body = 200, data
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), int(last or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status, body = 206, data[start:stop]
        return self.send(body, status=status, headers=headers, name=name, fault=fault)

    def error(self, status, code, headers=()):
        named = {"X-Error-Code": code, "X-Error-Message": code} if code else {"X-Error-Message": "Invalid username"}
        return self.send(b"{}", status=status, headers=named | dict(headers))

    def send_json(self, value, headers=()):
        return self.send(json.dumps(value).encode(), headers={"Content-Type": "application/json"} | dict(headers))

    def send(self, body, *, status=200, headers=(), name="", fault=None):
        self.hub.requests.append((self.command, name, status))
        if self.command == "GET":
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(body)
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = fault.cut_at if fault is not None else None
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if cut is not None:
            if fault.stall is not None:
                self.hub.reached.set()
                fault.stall.wait(600)
            self.close_connection = True
            self.connection.close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on the loopback that this process uses, with caches of its own."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    served = Hub()
    for name, value in hub_environment(served, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "home" / "assets"))
    close_session()
    yield served
    close_session()
    served.close()


def hub_environment(served, home):
    """The environment in which another process uses the hub."""
    away = {"HF_ENDPOINT": served.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1,localhost"}
    return away | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def away(hub, tmp_path):
    """Variables for a subprocess that shall use the hub."""
    return hub_environment(hub, tmp_path / "home")
