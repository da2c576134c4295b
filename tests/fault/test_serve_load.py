"""`hba serve` under load and attack: right answers, bounded memory, no crash, a stop that loses nothing."""

import asyncio
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import numpy as np
import psutil
import pytest
from holding import PATIENCE, until
from serving import data_url, serving

from hba import serve
from hba.config import load_config
from hba.evaluate import desk
from hba.evaluate.config import PredictConfig
from hba.serve import MEGABYTE, Limits
from hba.storage import CLOCK

MANY = 200
TEXTS = 8


def settings(*more):
    return load_config(PredictConfig, None, ["loader.workers=1", "generation.max_tokens=8", *more])


def body(text, **more):
    files = [{"name": "words.txt", "data": data_url("text/plain", text.encode())}]
    return {"files": files, "tasks": "SAR"} | more


def probs(answer):
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["results"]
    return found["probs"]


def connected(url):
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port), timeout=PATIENCE)


def listens(url):
    try:
        connected(url).close()
    except ConnectionRefusedError:
        return False
    return True


def head(length, path="/v1/classify", host="127.0.0.1", token="secret"):
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {token}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode()


def status(link):
    """Of the answer on a connection; 0 where it was closed without one."""
    try:
        return int((link.recv(65536).split(b" ", 2) + [b"0", b"0"])[1] or 0)
    except ConnectionResetError:
        return 0


def first_answered(links):
    """The connection that hears something first; not by select(), which takes no descriptor from 1,024 on."""
    with selectors.DefaultSelector() as watched:
        for link in links:
            watched.register(link, selectors.EVENT_READ)
        (key, _), *_ = watched.select(PATIENCE)
    return key.fileobj


def test_two_hundred_at_once_beside_slow_cut_and_hostile_ones(answering, tmp_path, monkeypatch):
    """Everybody who asks properly gets the very answer that he gets alone, in whatever batch."""
    texts = [f"Well, that went {'wonderfully ' * (1 + n)}" for n in range(TEXTS)]
    noise = np.random.default_rng(0).integers(0, 256, 1 << 16, dtype=np.uint8).tobytes()
    hostile = [
        ("a.mp4", noise), ("b.wav", b"RIFF" + noise), ("c.png", b"\x89PNG\r\n\x1a\n" + noise),
        ("d.webm", b"\x1a\x45\xdf\xa3" + noise), ("e.txt", b"\xff\xfe"), ("f.mp4", b""), ("../../g.wav", noise),
    ]  # fmt: skip
    limits = Limits(seconds=PATIENCE, waiting=400)
    with serving(answering, tmp_path / "desk", config=settings(), limits=limits) as served:
        alone = [probs(served.client.post("/v1/classify", json=body(text))) for text in texts]
        slow = [connected(served.url) for _ in range(10)]  # headers that never end
        for link in slow:
            link.sendall(b"POST /v1/classify HTTP/1.1\r\n")
        for _ in range(10):  # uploads that are cut
            with connected(served.url) as link:
                link.sendall(head(1_000_000) + b'{"files": [')

        async def everybody():
            limits = httpx.Limits(max_connections=MANY + 20)
            how = {"base_url": served.url, "headers": served.client.headers, "timeout": PATIENCE, "limits": limits}
            async with httpx.AsyncClient(**how) as client:
                asked = [client.post("/v1/classify", json=body(texts[n % TEXTS])) for n in range(MANY)]
                bad = [client.post("/v1/classify", files={"file": each}, data={"tasks": "SAR"}) for each in hostile]
                return await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*bad))

        classify = served.desk.backend.classify

        def held(batch):  # the first until many more are ready
            with served.desk._changed:
                assert served.desk._changed.wait_for(lambda: len(served.desk._ready) >= 20 or crowd.is_set(), PATIENCE)
            crowd.set()
            return classify(batch)

        crowd = threading.Event()
        monkeypatch.setattr(served.desk.backend, "classify", held)
        answers, refused = asyncio.run(everybody())
        for number, answer in enumerate(answers):
            assert probs(answer) == pytest.approx(alone[number % TEXTS], abs=1e-6)
        assert [answer.status_code for answer in refused] == [400] * len(hostile)
        assert {answer.json()["error"]["code"] for answer in refused} == {"invalid_media"}
        assert max(served.desk.batch_sizes) == served.desk.config.batch_size
        monkeypatch.setattr(serve, "HEADER_SECONDS", 1.0)  # not before: whoever asks properly has time to begin
        for link in slow:
            link.settimeout(PATIENCE)
            assert link.recv(100) == b""  # closed by the server
            link.close()
        monkeypatch.undo()
        assert httpx.get(f"{served.url}/health", timeout=PATIENCE).status_code == 200
        assert list(served.desk.folder.iterdir()) == [] and served.desk.waiting == 0
    assert not (tmp_path / "g.wav").exists()


def test_a_decoder_that_crashes_or_hangs_costs_its_request_alone(answering, tmp_path, monkeypatch):
    look = desk.look_at

    def looks(path):
        text = path.read_bytes()
        if b"crash" in text:
            os.kill(os.getpid(), signal.SIGSEGV)
        if b"hang" in text:
            CLOCK._cells[0] -= 2 * PATIENCE  # it has been at it for so long
            signal.pause()
        return look(path)

    monkeypatch.setattr(desk, "look_at", looks)  # what a decoder in C would do; workers are forked with it
    with serving(answering, tmp_path, config=settings(), decode_seconds=PATIENCE) as served:
        link = connected(served.url)
        texts = ["crash", "fine", "hang", "fine"]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda text: served.client.post("/v1/classify", json=body(text)), texts))
        assert [answer.status_code for answer in answers] == [400, 200, 400, 200]
        assert "SIGSEGV" in answers[0].text and f"takes longer than {PATIENCE} s" in answers[2].text
        (worker,) = [each for each in psutil.Process().children() if each.pid in {t.pid for t in workers(served)}]
        worker.kill()
        assert probs(served.client.post("/v1/classify", json=body("fine")))
        link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        with link, link.makefile("rb") as answer:  # it ends, though workers were forked while the connection was open
            assert answer.read().endswith(b'{"status":"ok"}')


def test_what_waits_behind_a_file_that_hangs_is_decoded_before_it_is_tried_again(answering, tmp_path, monkeypatch):
    look, looked, both = desk.look_at, tmp_path / "looked", tmp_path / "both"

    def looks(path):
        text = path.read_text()
        with looked.open("a") as file:
            file.write(f"{text}\n")
        if text == "hang":
            until(both.exists)
            CLOCK._cells[0] -= 2 * PATIENCE  # it has been at it for so long
            signal.pause()
        return look(path)

    monkeypatch.setattr(desk, "look_at", looks)
    how = {"config": settings(), "decode_seconds": PATIENCE}
    with serving(answering, tmp_path / "desk", **how) as served, ThreadPoolExecutor(2) as pool:
        hanging = pool.submit(served.client.post, "/v1/classify", json=body("hang"))
        until(looked.exists)
        fine = pool.submit(served.client.post, "/v1/classify", json=body("fine"))
        until(lambda: len(served.desk._decoding) == 2)
        both.touch()
        assert (fine.result().status_code, hanging.result().status_code) == (200, 400)
    assert looked.read_text().split() == ["hang", "fine", "hang"]


def workers(served):
    return [worker.process for worker in served.desk._pool._workers]


def test_more_than_may_wait_is_told_to_come_again(answering, tmp_path):
    with serving(answering, tmp_path, config=settings(), limits=Limits(seconds=PATIENCE, waiting=3)) as served:
        limits, served.gate.limits = served.gate.limits, Limits(seconds=0.5)
        with connected(served.url) as link:
            link.sendall(head(1000) + b"{")
            assert status(link) == 408  # what does not come in time is given up
        until(lambda: not served.gate.under_way)
        served.gate.limits = limits
        links = [connected(served.url) for _ in range(3)]
        for link in links:
            link.sendall(head(1000) + b"{")  # three uploads under way
        until(lambda: served.gate.under_way == 3)
        late = served.client.post("/v1/classify", json=body("x"))
        assert late.status_code == 429 and int(late.headers["retry-after"]) > 0
        assert late.json()["error"]["code"] == "rate_limit_exceeded"
        assert served.client.get("/health").status_code == 200
        for link in links:
            link.close()
        until(lambda: not served.gate.under_way)
        assert served.client.post("/v1/classify", json=body("x")).status_code == 200


def test_bodies_that_grow_together_are_refused_as_they_come(answering, tmp_path, monkeypatch):
    """Each may begin, since none has sent anything; all of them together are more than may be held."""
    monkeypatch.setattr(serve, "BODIES_AT_ONCE", 2)
    limits = Limits(seconds=PATIENCE, body_bytes=MEGABYTE)
    with serving(answering, tmp_path, config=settings(), limits=limits) as served:
        links = [connected(served.url) for _ in range(3)]
        for link in links:
            link.sendall(head(MEGABYTE))
        for link in links:
            link.sendall(b" " * (MEGABYTE - 1000))
        refused = first_answered(links)
        assert status(refused) == 503
        for link in {*links} - {refused}:  # their rest still has room
            link.sendall(b" " * 1000)
            assert status(link) == 400
        for link in links:
            link.close()
        until(lambda: not served.gate.under_way)
        assert served.gate.bytes_held == 0
        assert served.client.post("/v1/classify", json=body("x")).status_code == 200


@pytest.fixture(scope="module")
def process(answering, tmp_path_factory):
    """The command, in a process of its own: (url, token, process, cache)."""
    started = Command(answering, tmp_path_factory.mktemp("served"))
    yield started
    started.process.kill()
    started.process.wait()


class Command:
    def __init__(self, model, cache):
        self.cache = cache
        options = ["--port", "0", "--json", "--max-body", "20", "--set", "loader.workers=1", "--timeout", str(PATIENCE)]
        command = [sys.executable, "-m", "hba", "serve", str(model), *options]
        kept = os.environ | {"HBA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kept)
        said = ""
        while not said.rstrip().endswith("}"):
            line = self.process.stdout.readline()
            assert line, "the server did not start"
            said += line
        told = json.loads(said)
        self.root, self.token = told["url"].removesuffix("/v1"), told["token"]
        headers = {"authorization": f"Bearer {self.token}"}
        self.client = httpx.Client(base_url=self.root, headers=headers, timeout=PATIENCE)

    def folders(self):
        return list((self.cache / "serve").iterdir())


def resident(process):
    return psutil.Process(process.pid).memory_info().rss


def test_bodies_of_500_mb_are_refused_as_they_come(process):
    """With a length and without one, eight at once; the memory of the server does not grow with them."""
    assert process.client.post("/v1/classify", json=body("warm")).status_code == 200
    before, peak, done = resident(process.process), [0], threading.Event()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], resident(process.process))

    watching = threading.Thread(target=watch)
    watching.start()
    block = b"A" * MEGABYTE

    def blocks():
        yield b'{"files": [{"name": "a.mp4", "data": "data:video/mp4;base64,'
        for _ in range(500):
            yield block

    def send(number):
        headers = {"content-length": str(500 * MEGABYTE)} if number % 2 else {}
        how = {"content": blocks(), "headers": headers | {"content-type": "application/json"}}
        try:
            return process.client.post("/v1/classify", **how).status_code
        except httpx.TransportError:  # it wrote on after the server had closed: the answer was lost on the way
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(send, range(8)))
    done.set()
    watching.join()
    assert set(found) <= {413, None}
    with connected(process.root) as link:  # who waits for the answer gets it
        link.sendall(head(500 * MEGABYTE, token=process.token))
        assert status(link) == 413
    assert (peak[0] - before) / MEGABYTE < 150, (peak[0] - before) / MEGABYTE
    # Whole bodies below the limit are read.
    large = body("x" * 1000, transcript="y" * (15 * MEGABYTE))
    for _ in range(2):
        assert process.client.post("/v1/classify", json=large).status_code == 200
    assert process.client.post("/v1/classify", json=body("after")).status_code == 200
    assert (resident(process.process) - before) / MEGABYTE < 300


def test_a_stop_finishes_what_is_under_way_and_a_kill_leaves_what_the_next_start_removes(process, answering):
    assert len(process.folders()) == 1
    talk = json.dumps({"model": str(answering), "messages": [{"role": "user", "content": "Tell me."}]}).encode()
    with ExitStack() as stack:
        links = [stack.enter_context(connected(process.root)) for _ in range(4)]
        for link in links:  # all but their last byte
            link.sendall(head(len(talk), "/v1/chat/completions", token=process.token) + talk[:-1])
        until(lambda: "hba_requests_under_way 5" in process.client.get("/metrics").text)
        process.process.send_signal(signal.SIGTERM)
        until(lambda: not listens(process.root))
        for link in links:
            link.sendall(talk[-1:])
        assert [status(link) for link in links] == [200] * 4
    assert process.process.wait(PATIENCE) == 0 and process.folders() == []
    again = Command(answering, process.cache)
    again.process.kill()
    again.process.wait()
    assert len(again.folders()) == 1
    with serving(answering, again.cache / "serve", config=settings()) as served:
        assert again.folders() == [served.desk.folder]


def test_the_token_is_that_of_the_environment_and_is_not_printed(hba, answering, monkeypatch, tmp_path):
    monkeypatch.setenv("HBA_SERVE_TOKEN", "of-my-own")
    monkeypatch.setenv("HBA_CACHE", str(tmp_path))
    monkeypatch.setattr(serve, "run", lambda app, listening, limits: listening.close())
    code, out, err = hba("serve", answering, "--port", "0", "--json", "--set", "loader.workers=0")
    assert code == 0 and json.loads(out).keys() == {"url", "model"} and "of-my-own" not in out + err
    for arguments, said in (
        ([answering, "--backend", "openai"], "has no model in this process"),
        ([tmp_path / "gone"], "gone"),
        ([answering, "--host", "0.0.0.0", "--no-token"], "without a token"),
        ([answering, "--set", "batch_siz=2"], "batch_size"),
    ):
        code, out, err = hba("serve", *arguments, "--port", "0")
        assert (code, out) == (2, "") and said in err, err
    assert list((tmp_path / "serve").iterdir()) == []
