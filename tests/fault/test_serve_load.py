"""`hba serve` under load and attack: right answers, bounded memory, no crash, a stop that loses nothing."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from serving import data_url, serving

from hba import serve
from hba.config import load_config
from hba.evaluate.config import PredictConfig
from hba.serve import MEGABYTE, Limits

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
    return socket.create_connection((address.host, address.port), timeout=30)


def head(length, path="/v1/classify", host="127.0.0.1", token="secret"):
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {token}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode()


def status(link):
    """Of the answer on a connection; 0 where it was closed without one."""
    try:
        return int((link.recv(65536).split(b" ", 2) + [b"0", b"0"])[1] or 0)
    except ConnectionResetError:
        return 0


def test_two_hundred_at_once_beside_slow_cut_and_hostile_ones(answering, tmp_path, monkeypatch):
    """Everybody who asks properly gets the very answer that he gets alone."""
    monkeypatch.setattr(serve, "HEADER_SECONDS", 4.0)
    texts = [f"Well, that went {'wonderfully ' * (1 + n)}" for n in range(TEXTS)]
    noise = np.random.default_rng(0).integers(0, 256, 1 << 16, dtype=np.uint8).tobytes()
    hostile = [
        ("a.mp4", noise), ("b.wav", b"RIFF" + noise), ("c.png", b"\x89PNG\r\n\x1a\n" + noise),
        ("d.webm", b"\x1a\x45\xdf\xa3" + noise), ("e.txt", b"\xff\xfe"), ("f.mp4", b""), ("../../g.wav", noise),
    ]  # fmt: skip
    with serving(answering, tmp_path / "desk", config=settings(), limits=Limits(seconds=60, waiting=400)) as served:
        alone = [probs(served.client.post("/v1/classify", json=body(text))) for text in texts]
        slow = [connected(served.url) for _ in range(10)]  # headers that never end
        for link in slow:
            link.sendall(b"POST /v1/classify HTTP/1.1\r\n")
        for _ in range(10):  # uploads that are cut
            with connected(served.url) as link:
                link.sendall(head(1_000_000) + b'{"files": [')

        async def everybody():
            limits = httpx.Limits(max_connections=MANY + 20)
            how = {"base_url": served.url, "headers": served.client.headers, "timeout": 60, "limits": limits}
            async with httpx.AsyncClient(**how) as client:
                asked = [client.post("/v1/classify", json=body(texts[n % TEXTS])) for n in range(MANY)]
                bad = [client.post("/v1/classify", files={"file": each}, data={"tasks": "SAR"}) for each in hostile]
                return await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*bad))

        answers, refused = asyncio.run(everybody())
        for number, answer in enumerate(answers):
            assert probs(answer) == pytest.approx(alone[number % TEXTS], abs=1e-6)
        assert [answer.status_code for answer in refused] == [400] * len(hostile)
        assert {answer.json()["error"]["code"] for answer in refused} == {"invalid_media"}
        assert max(served.desk.batch_sizes) > 1
        for link in slow:
            assert link.recv(100) == b""  # closed by the server
            link.close()
        assert served.client.get("/health").status_code == 200
        assert list(served.desk.folder.iterdir()) == [] and served.desk.waiting == 0
    assert not (tmp_path / "g.wav").exists()


def test_a_decoder_that_crashes_or_hangs_costs_its_request_alone(answering, tmp_path, monkeypatch):
    look = serve.look_at

    def looks(path):
        text = path.read_bytes()
        if b"crash" in text:
            os.kill(os.getpid(), signal.SIGSEGV)
        if b"hang" in text:
            time.sleep(60)
        return look(path)

    monkeypatch.setattr(serve, "look_at", looks)  # what a decoder in C would do; workers are forked with it
    with serving(answering, tmp_path, config=settings(), decode_seconds=1.0) as served:
        texts = ["crash", "fine", "hang", "fine"]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda text: served.client.post("/v1/classify", json=body(text)), texts))
        assert [answer.status_code for answer in answers] == [400, 200, 400, 200]
        assert "SIGSEGV" in answers[0].text and "takes longer than 1 s" in answers[2].text
        (worker,) = [each for each in psutil.Process().children() if each.pid in {t.pid for t in workers(served)}]
        worker.kill()
        assert probs(served.client.post("/v1/classify", json=body("fine")))


def workers(served):
    return [worker.process for worker in served.desk._pool._workers]


def test_more_than_may_wait_is_told_to_come_again(answering, tmp_path):
    with serving(answering, tmp_path, config=settings(), limits=Limits(seconds=2, waiting=3)) as served:
        links = [connected(served.url) for _ in range(3)]
        for link in links:
            link.sendall(head(1000) + b"{")  # three uploads under way
        deadline = time.monotonic() + 10
        while (late := served.client.post("/v1/classify", json=body("x"))).status_code == 200:
            assert time.monotonic() < deadline
        assert late.status_code == 429 and int(late.headers["retry-after"]) > 0
        assert late.json()["error"]["code"] == "rate_limit_exceeded"
        assert served.client.get("/health").status_code == 200
        for link in links:  # what does not come in time is given up, and makes room
            assert status(link) == 408
            link.close()
        deadline = time.monotonic() + 10  # its place is free once the server, too, has closed
        while served.client.post("/v1/classify", json=body("x")).status_code != 200:
            assert time.monotonic() < deadline


def test_bodies_that_grow_together_are_refused_as_they_come(answering, tmp_path, monkeypatch):
    """Each may begin, since none has sent anything; all of them together are more than may be held."""
    monkeypatch.setattr(serve, "BODIES_AT_ONCE", 2)
    with serving(answering, tmp_path, config=settings(), limits=Limits(seconds=4, body_bytes=MEGABYTE)) as served:
        links = [connected(served.url) for _ in range(3)]
        for link in links:
            link.sendall(head(MEGABYTE))
        for link in links:
            link.sendall(b" " * (MEGABYTE - 1000))
        found = sorted(status(link) for link in links)
        assert found == [408, 408, 503]
        for link in links:
            link.close()
        deadline = time.monotonic() + 10
        while served.client.post("/v1/classify", json=body("x")).status_code != 200:
            assert time.monotonic() < deadline


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
        options = ["--port", "0", "--json", "--max-body", "20", "--set", "loader.workers=1", "--window", "300"]
        options += ["--set", "generation.max_tokens=200"]
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
        self.client = httpx.Client(base_url=self.root, headers={"authorization": f"Bearer {self.token}"}, timeout=60)

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
        started = time.monotonic()
        headers = {"content-length": str(500 * MEGABYTE)} if number % 2 else {}
        how = {"content": blocks(), "headers": headers | {"content-type": "application/json"}}
        try:
            return process.client.post("/v1/classify", **how).status_code, time.monotonic() - started
        except httpx.TransportError:  # it wrote on after the server had closed: the answer was lost on the way
            return None, time.monotonic() - started

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(send, range(8)))
    done.set()
    watching.join()
    assert {code for code, _ in found} <= {413, None} and 413 in {code for code, _ in found}
    assert (peak[0] - before) / MEGABYTE < 150, (peak[0] - before) / MEGABYTE
    # Whole bodies below the limit are read.
    large = body("x" * 1000, transcript="y" * (15 * MEGABYTE))
    for _ in range(2):
        assert process.client.post("/v1/classify", json=large).status_code == 200
    assert process.client.post("/v1/classify", json=body("after")).status_code == 200
    assert (resident(process.process) - before) / MEGABYTE < 300


def test_a_stop_finishes_what_is_under_way_and_a_kill_leaves_what_the_next_start_removes(process, answering):
    assert len(process.folders()) == 1
    talk = {"model": str(answering), "messages": [{"role": "user", "content": "Tell me."}]}
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(process.client.post, "/v1/chat/completions", json=talk) for _ in range(4)]
        deadline = time.monotonic() + 20
        while "hba_rows_waiting 4" not in process.client.get("/metrics").text:
            assert time.monotonic() < deadline
        process.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200] * 4
    assert process.process.wait(30) == 0 and process.folders() == []
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
