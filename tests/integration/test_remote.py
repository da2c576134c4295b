"""The client of remote models against a real server on the loopback that fails in every way it can."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest

from hba.remote import (
    ChatRequest,
    ClientConfig,
    RemoteClient,
    RequestError,
    ServiceError,
    UnusableReplyError,
    bounded,
)

# Every kind of fault, a fifth of the attempts in all.
FAULTS = {"429": 0.03, "500": 0.03, "503": 0.02, "hang": 0.01, "drop": 0.03, "cut": 0.02, "malformed": 0.02,
          "strange": 0.02, "slow": 0.02, "slow_seconds": 0.1, "hang_seconds": 5.0, "retry_after": "0.05"}  # fmt: skip
SECRET = "sk-test-0123456789abcdef"


def config(server, **changes):
    return ClientConfig(base_url=server.url, first_backoff_seconds=0.01, timeout_seconds=1.0, **changes)


def ask(text, **changes):
    return ChatRequest(messages=[{"role": "user", "content": text}], max_tokens=9, **changes)


def run(settings, texts, width=64, model="m"):
    """Ask all texts; {text: reply or error} and the client."""

    async def go():
        async with RemoteClient(model, settings) as client:

            async def one(text):
                try:
                    return text, await client.complete(ask(text))
                except RequestError as error:
                    return text, error

            return {text: reply async for text, reply in bounded(texts, one, width)}, client

    return asyncio.run(go())


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_every_request_is_answered_through_every_fault(chat_server, provider):
    server = chat_server(seed=4, **FAULTS)
    texts = [f"question {i}" for i in range(400)]
    replies, client = run(config(server, provider=provider), texts)
    assert {text: reply.text for text, reply in replies.items()} == {text: text for text in texts}
    assert client.meter.replies == 400 and client.meter.failed == 0
    assert client.meter.tokens_out == 5 * 400 and client.meter.cost_usd is None  # unknown: no price for this server
    reasons = " ".join(client.meter.retries)
    assert all(name in reasons for name in ("HTTP 429", "HTTP 500", "HTTP 503", "timeout", "connection", "body"))
    stats = server.stats()
    assert stats["distinct"] == 400 and stats["answered_twice"] == 0
    assert client.meter.requests == stats["requests"]


def test_retry_after_holds_all_requests_back(chat_server):
    server = chat_server(seed=1, **{"429": 0.2, "retry_after": "0.2", "most_faults": 1})
    replies, _ = run(config(server, max_concurrency=8), [f"q{i}" for i in range(60)])
    stats = server.stats()
    assert len(replies) == 60 and stats["faults"]["429"] >= 5
    # Only what was already on its way when the 429 came arrives early.
    assert stats["early"] <= 7 * stats["faults"]["429"]
    assert stats["requests"] - stats["early"] >= 8


def test_a_wait_that_is_too_long_stops_the_command(chat_server):
    server = chat_server(**{"429": 1.0, "retry_after": "3000"})
    with pytest.raises(ServiceError, match=r"asks to wait 3000 s \(HTTP 429\)"):
        run(config(server), ["a"])


def test_bytes_that_drip_end_with_the_attempt(chat_server):
    """Each byte comes in time, the whole does not."""
    server = chat_server(**{"slow": 1.0, "slow_seconds": 4.0, "most_faults": 1})
    replies, client = run(config(server), ["a"])
    assert replies["a"].text == "a" and client.meter.retries == {"timeout": 1}


def test_an_endless_reply_is_cut_off(chat_server, monkeypatch):
    monkeypatch.setattr("hba.remote.client.MAX_REPLY_BYTES", 1 << 20)
    replies, _ = run(config(chat_server()), ["a", "b" * (1 << 20)])
    assert replies["a"].text == "a"
    assert "a reply of more than 1 MiB" in str(replies["b" * (1 << 20)])


def test_concurrency_grows_to_the_limit_and_no_further(chat_server):
    server = chat_server(latency=0.2)
    _, client = run(config(server, max_concurrency=12), [f"q{i}" for i in range(90)])
    assert server.stats()["peak"] == 12 and client.limit.limit == 12


def test_concurrency_shrinks_on_a_server_that_bears_little(chat_server):
    server = chat_server(seed=2, **{"503": 0.9, "most_faults": 4, "latency": 0.01})
    replies, _ = run(config(server, max_concurrency=64), [f"q{i}" for i in range(100)])
    assert len(replies) == 100 and not any(isinstance(r, Exception) for r in replies.values())
    assert server.stats()["peak"] <= 16


def test_a_refused_request_fails_alone_and_names_the_reason(chat_server):
    server = chat_server(refuse="poison")
    replies, client = run(config(server), ["a", "poison", "b"])
    assert replies["a"].text == "a" and replies["b"].text == "b"
    assert "HTTP 400: this is refused" in str(replies["poison"]) and client.meter.failed == 1
    assert server.stats()["requests"] == 3  # a refusal is not tried again


def test_a_request_that_fails_at_every_attempt_fails_alone(chat_server):
    server = chat_server(**{"500": 1.0, "most_faults": 99})
    replies, client = run(config(server, max_attempts=3), ["a"])
    assert "no reply after 3 attempts (the last: HTTP 500)" in str(replies["a"])
    assert server.stats()["requests"] == 3 and client.meter.retries == {"HTTP 500": 3}


def test_a_server_that_is_down_stops_the_command(chat_server):
    server = chat_server()
    server.process.kill()
    server.process.wait()
    with pytest.raises(ServiceError, match="5 requests in a row had no reply after 2 attempts"):
        run(config(server, max_attempts=2, stop_after=5), [f"q{i}" for i in range(100)], width=4)


def test_what_was_answered_is_not_asked_again_in_another_process(chat_server, tmp_path):
    server = chat_server(seed=4, **FAULTS)
    settings = config(server, cache=tmp_path / "cache")
    texts = [f"question {i}" for i in range(50)]
    first, _ = run(settings, texts)
    asked = server.stats()["requests"]
    again, client = run(settings, [*texts, "new"])
    assert {t: r.text for t, r in again.items()} == {t: t for t in [*texts, "new"]}
    assert client.meter.cached == 50 and client.meter.replies == 1
    assert all(again[text].cached and not first[text].cached for text in texts)
    assert server.stats()["distinct"] == 51 and server.stats()["requests"] < asked + 5
    other, _ = run(settings, texts[:3], model="another")
    assert not any(reply.cached for reply in other.values())


def test_repeated_draws_of_a_sampled_request_are_requests_of_their_own(chat_server, tmp_path):
    server = chat_server()

    async def go():
        async with RemoteClient("m", config(server, cache=tmp_path)) as client:
            return [(await client.complete(ask("a", temperature=1.0, draw=i % 2))).cached for i in range(4)]

    assert asyncio.run(go()) == [False, False, True, True]


def test_an_unusable_reply_is_paid_but_not_cached(chat_server, tmp_path):
    server = chat_server()

    def refuse(reply):
        raise UnusableReplyError(f"not what was asked: {reply.text}")

    async def go():
        async with RemoteClient("m", config(server, cache=tmp_path)) as client:
            with pytest.raises(UnusableReplyError):
                await client.complete(ask("a"), accept=refuse)
            assert client.meter.tokens_out == 5
            return await client.complete(ask("a"))

    assert not asyncio.run(go()).cached


def test_media_arrive_as_parts(chat_server):
    server = chat_server(brain="kinds")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    parts = [audio, image, {"type": "text", "text": "what is this?"}]

    async def go(provider, content):
        async with RemoteClient("m", config(server, provider=provider)) as client:
            request = ChatRequest(messages=[{"role": "user", "content": content}], max_tokens=9)
            return (await client.complete(request)).text

    assert asyncio.run(go("openai", parts)) == "input_audio image_url text"
    assert asyncio.run(go("anthropic", parts[1:])) == "image text"


KILLED = """
import asyncio, sys
from pathlib import Path
from hba.remote import ChatRequest, ClientConfig, RemoteClient, bounded
async def main(url, cache):
    async with RemoteClient("m", ClientConfig(base_url=url, cache=Path(cache))) as client:
        async def one(i):
            return await client.complete(ChatRequest(messages=[{"role": "user", "content": f"q{i}"}], max_tokens=9))
        async for reply in bounded(range(3000), one, 16):
            print(reply.text, flush=True)
asyncio.run(main(*sys.argv[1:]))
"""


def test_kill_9_loses_no_reply_that_was_seen(chat_server, tmp_path):
    server = chat_server(latency=0.005)
    command = [sys.executable, "-c", KILLED, server.url, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    seen = [process.stdout.readline().strip() for _ in range(100)]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with next(tmp_path.glob("segment-0.jsonl")).open("ab") as handle:
        handle.write(b'{"key": "torn')  # as a kill in mid-write leaves it
    replies, client = run(config(server, cache=tmp_path), seen)
    assert client.meter.cached == 100 and {r.text for r in replies.values()} == set(seen)
    assert all(json.loads(line) for line in (tmp_path / "segment-0.jsonl").read_text().splitlines())


def test_the_key_goes_to_the_server_and_nowhere_else(chat_server, tmp_path, monkeypatch, caplog):
    """In a header, and not in the cache, an exception, a log or a repr."""
    monkeypatch.setenv("OWN_KEY", SECRET)
    server = chat_server(brain="key")
    settings = config(server, api_key_env="OWN_KEY", cache=tmp_path)
    caplog.set_level(0)
    replies, client = run(settings, ["hello", "tell me the key"])
    assert str(replies["hello"].text) == "authorized"
    refused = replies["tell me the key"]
    assert isinstance(refused, RequestError) and "[key]" in str(refused)
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for text in (kept.decode(), str(refused), repr(refused), caplog.text, repr(client), repr(settings)):
        assert SECRET not in text


def test_no_key_is_sent_to_a_server_that_it_was_not_named_for(chat_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    replies, _ = run(config(chat_server(brain="key")), ["hello"])
    assert replies["hello"].text == "no key"
