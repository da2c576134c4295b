"""The client of remote models against a real server on the loopback that fails in every way it can."""

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys

import pytest

from hba.remote import (
    ChatRequest,
    ClientConfig,
    RemoteClient,
    RequestError,
    ServiceError,
    UnansweredError,
    UnusableReplyError,
    bounded,
)

# Every kind of fault, a fifth of the attempts in all.
FAULTS = {"429": 0.03, "500": 0.03, "503": 0.02, "hang": 0.01, "drop": 0.03, "cut": 0.02, "malformed": 0.02,
          "strange": 0.02, "slow": 0.02, "slow_seconds": 0.1, "hang_seconds": 5.0, "retry_after": "0.05"}  # fmt: skip
SECRET = "sk-test-0123456789abcdef"


def config(server, *, timeout=120.0, **changes):
    return ClientConfig(base_url=server.url, first_backoff_seconds=0.01, timeout_seconds=timeout, **changes)


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
    replies, client = run(config(server, provider=provider, timeout=2.0), texts)
    assert {text: reply.text for text, reply in replies.items()} == {text: text for text in texts}
    assert client.meter.replies == 400 and client.meter.failed == 0
    assert client.meter.tokens_out == 5 * 400 and client.meter.cost_usd is None  # unknown: no price for this server
    reasons = " ".join(client.meter.retries)
    assert all(name in reasons for name in ("HTTP 429", "HTTP 500", "HTTP 503", "timeout", "connection", "body"))
    stats = server.stats()
    # On a busy machine an answer may take longer than the client waits: it is asked again then, and only then.
    late = client.meter.retries["timeout"] - stats["faults"]["hang"]
    assert stats["distinct"] == 400 and stats["answered_twice"] <= late
    assert 0 <= client.meter.requests - stats["requests"] <= late


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
    with pytest.raises(ServiceError, match=r"asks to wait 3000 s \(HTTP 429: try later\)"):
        run(config(server), ["a"])


def test_bytes_that_drip_end_with_the_attempt(chat_server):
    """Each byte comes in time, the whole does not."""
    server = chat_server(**{"slow": 1.0, "slow_seconds": 60.0, "most_faults": 1})
    replies, client = run(config(server, timeout=5.0), ["a"])
    assert replies["a"].text == "a" and client.meter.retries == {"timeout": 1}


def test_an_endless_reply_is_cut_off(chat_server, monkeypatch):
    monkeypatch.setattr("hba.remote.client.MAX_REPLY_BYTES", 1 << 20)
    replies, _ = run(config(chat_server()), ["a", "b" * (1 << 20)])
    assert replies["a"].text == "a"
    assert "a reply of more than 1 MiB" in str(replies["b" * (1 << 20)])


def test_concurrency_grows_to_the_limit_and_no_further(chat_server):
    # Each round is answered when all of it is there: 4 at first, then twice as many, then as many as may be.
    server = chat_server(together=[4, 12, 24, 36, 48])
    _, client = run(config(server, max_concurrency=12), [f"q{i}" for i in range(48)])
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
    assert "no reply after 3 attempts (the last: HTTP 500: try later)" in str(replies["a"])
    assert server.stats()["requests"] == 3 and client.meter.retries == {"HTTP 500": 3}


def test_a_server_that_goes_away_stops_the_command(chat_server):
    server = chat_server(close_after=8)
    with pytest.raises(ServiceError, match=r"5 requests in a row had no reply after 2 attempts .*503: we are away"):
        run(config(server, max_attempts=2, stop_after=5), [f"q{i}" for i in range(100)], width=4)
    assert server.stats()["answered"] == 8


# --- the connection, before a run ---


async def tls_server(folder):
    """A server of HTTPS alone, with a certificate of its own."""
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    subprocess.run([*make, "-subj", "/CN=x", "-keyout", folder / "key", "-out", folder / "pem"], check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pem", folder / "key")
    return await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)


def test_a_server_that_never_answers_is_not_waited_for_row_by_row(chat_server):
    server = chat_server(hang=1.0, hang_seconds=60.0, most_faults=99)
    with pytest.raises(ServiceError, match=r"none of 8 requests was answered within 0\.2 s.*remote\.timeout_seconds"):
        run(config(server, timeout=0.2), [f"question {i}" for i in range(40)])
    assert server.stats()["requests"] < 20


def refused(url, **changes):
    """What is said of a server before the first request of a run, without another try."""
    client = RemoteClient("m", ClientConfig(base_url=url, **changes))

    async def go():
        async with client:
            await client.complete(ask("a"))

    with pytest.raises(ServiceError) as error:
        asyncio.run(go())
    assert client.meter.requests == 0 and not client.meter.retries
    return str(error.value)


def test_a_wrong_port_is_said_to_refuse_at_once(chat_server):
    server = chat_server()
    server.process.kill()
    server.process.wait()
    said = refused(server.url)
    assert "nothing listens there: the connection was refused" in said and "port of remote.base_url" in said


def test_http_in_place_of_https_is_named(chat_server):
    server = chat_server()
    said = refused(server.url.replace("http://", "https://"))
    assert "the server speaks http, not https" in said and f"Fix: remote.base_url={server.url}" in said


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https_in_place_of_http_and_a_certificate_of_ones_own_are_named(tmp_path):
    async def go():
        async with await tls_server(tmp_path) as served:
            place = f"127.0.0.1:{served.sockets[0].getsockname()[1]}/v1"
            return [await asyncio.to_thread(refused, f"{scheme}://{place}") for scheme in ("http", "https")]

    plain, encrypted = asyncio.run(go())
    assert "the server speaks https, not http" in plain and "Fix: remote.base_url=https://127.0.0.1" in plain
    assert "its certificate is not trusted " in encrypted and "SSL_CERT_FILE" in encrypted


def test_an_unknown_host_is_named():
    assert "no connection: unknown host" in refused("http://nobody.invalid/v1")


def test_a_401_says_whether_a_key_was_sent(chat_server, monkeypatch):
    server = chat_server(needs_key=True)
    said = refused(server.url)
    assert "HTTP 401: You did not provide an API key (no key was sent)" in said and "remote.api_key_env=MY_KEY" in said
    assert server.stats()["requests"] == 0
    monkeypatch.setenv("OWN_KEY", SECRET)
    replies, _ = run(config(server, api_key_env="OWN_KEY"), ["a"])
    assert replies["a"].text == "a"


def test_the_check_asks_once_and_takes_any_answer(chat_server):
    server = chat_server()  # which lists no models
    replies, client = run(config(server), [f"q{i}" for i in range(20)])
    assert len(replies) == 20 and server.stats()["listed"] == ["/v1/models"]
    assert client.meter.requests == 20


def test_an_unknown_model_is_told_what_there_is(chat_server):
    server = chat_server(models=["omni", "omni-small"], say=[["omnibus", 404, {"error": {"message": "no such model"}}]])
    with pytest.raises(ServiceError, match=r"HTTP 404: no such model.*The server offers omni, omni-small"):
        run(config(server), ["a"], model="omnibus")


# --- what a server says of a request ---


def test_a_server_that_cannot_do_it_is_asked_once(chat_server):
    """llama.cpp answers 500 to a sound that its model does not take."""
    broken = {"error": {"code": 500, "message": "audio input is not supported - hint: provide the mmproj"}}
    server = chat_server(say=[["sound", 500, broken]])
    replies, client = run(config(server), ["sound", "b"])
    assert "HTTP 500: audio input is not supported" in str(replies["sound"]) and replies["b"].text == "b"
    assert server.stats()["requests"] == 2 and not client.meter.retries


@pytest.mark.parametrize("service", ["deepseek", "anthropic", "openai", "openrouter"])
def test_an_empty_account_stops_the_command(chat_server, service):
    server = chat_server(balance=10, broke=service)
    with pytest.raises(ServiceError, match=r"HTTP 4\d\d: .*add credit, then run the same command again"):
        run(config(server, max_concurrency=2), [f"q{i}" for i in range(50)], width=2)
    assert server.stats()["answered"] == 10 and server.stats()["requests"] <= 12


def test_a_refusal_that_repeats_stops_the_command(chat_server):
    server = chat_server(refuse="bad")
    texts = ["good", *(f"bad {i}" for i in range(60))]
    with pytest.raises(ServiceError, match=r"20 requests in a row were refused, the last: HTTP 400: this is refused"):
        run(config(server, max_concurrency=4), texts, width=4)
    assert server.stats()["requests"] < 30
    mixed = [text for i in range(40) for text in (f"good {i}", f"bad {i}")]
    replies, _ = run(config(server, max_concurrency=1), mixed, width=1)
    assert sum(isinstance(reply, RequestError) for reply in replies.values()) == 40


def test_a_failure_is_a_requests_own_only_where_others_were_answered(chat_server):
    server = chat_server(say=[["hard", 503, {"error": {"message": "worker died"}}]], latency=0.05)
    slow = config(server, max_attempts=6)
    replies, _ = run(slow, ["hard", *(f"q{i}" for i in range(60))], width=8)
    assert type(replies["hard"]) is RequestError and "503: worker died" in str(replies["hard"])
    replies, _ = run(slow, ["hard"])
    assert type(replies["hard"]) is UnansweredError


@pytest.mark.parametrize("how", ["takes_no", "bare"])
def test_a_parameter_that_is_refused_is_left_out_once_and_said(chat_server, tmp_path, how):
    server = chat_server(**{how: ["temperature", "top_p", "seed", "max_tokens"]})

    async def go():
        async with RemoteClient("m", config(server, cache=tmp_path, max_concurrency=1)) as client:
            asked = [ask(text, temperature=0.0, top_p=0.5, extra={"seed": 1}) for text in "abcab"]
            return [await client.complete(request) for request in asked], client.meter

    replies, meter = asyncio.run(go())
    assert [reply.text for reply in replies] == list("abcab")
    gone = {"temperature left out", "top_p left out", "seed left out", "max_tokens sent as max_completion_tokens"}
    assert {frozenset(reply.left_out) for reply in replies} == {frozenset(gone)} and replies[3].cached
    assert server.stats()["requests"] == 3 + 4  # each refusal once
    assert len(meter.warnings()) == 4 and all("refuses a parameter" in text for text in meter.warnings())
    assert meter.record()["left_out"] == dict.fromkeys(gone, 5)


def test_a_value_that_is_refused_is_the_requests_error(chat_server):
    """What is out of range must not be dropped in silence."""
    said = {"message": "temperature must be between 0 and 2", "param": "temperature", "code": "invalid_value"}
    server = chat_server(say=[["a", 400, {"error": said}]])

    async def go():
        async with RemoteClient("m", config(server)) as client:
            await client.complete(ask("a", temperature=7.0))

    with pytest.raises(RequestError, match="must be between 0 and 2"):
        asyncio.run(go())


def test_another_model_that_answers_is_told(chat_server):
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    choice = {"message": {"content": "x"}, "finish_reason": "stop"}
    reply = {"model": "llama-3", "choices": [choice], "usage": usage}
    dated = reply | {"model": "gpt-4o-2024-08-06"}
    server = chat_server(say=[["zzz", 200, reply], ["yyy", 200, dated]])
    _, client = run(config(server), ["zzz", "yyy"], model="gpt-4o")
    assert client.meter.warnings() == ["gpt-4o was asked for, and replies say that llama-3 answered"]
    assert client.meter.record()["models"] == {"llama-3": 1, "gpt-4o-2024-08-06": 1}


# --- what a reply says ---


def chat(message, finish="stop", **more):
    return {"model": "m", "choices": [{"message": message, "finish_reason": finish, **more}]}


@pytest.mark.parametrize(
    ("said", "text", "finish"),
    [
        (chat({"content": None, "reasoning_content": "let me think"}, "length"), "", "length"),
        (chat({"content": None, "reasoning": "let me think"}), "", "stop"),
        (chat({"content": None}, "content_filter"), "", "content_filter"),
        (chat({"content": "half \ud83d"}), "half \ufffd", "stop"),
        (chat({"content": "pair \ud83d\ude00"}), "pair \U0001f600", "stop"),
        (chat({"content": "x"}, {"not": "a word"}), "x", None),
        (chat({"content": "x"}) | {"usage": {"prompt_tokens": 10**30, "completion_tokens": -1}}, "x", "stop"),
    ],
)
def test_what_one_reply_says_is_read_as_far_as_it_goes(chat_server, tmp_path, said, text, finish):
    server = chat_server(say=[["zzz", 200, said]])
    for cached in (False, True):
        replies, client = run(config(server, cache=tmp_path), ["zzz", "b"])
        assert (replies["zzz"].text, replies["zzz"].finish) == (text, finish) and replies["zzz"].cached is cached
        assert replies["b"].text == "b" and not client.meter.retries
        assert replies["zzz"].tokens_in is None


@pytest.mark.parametrize(
    "said",
    [
        chat({"content": ""}, "error", error={"code": 502, "message": "upstream died"}),
        chat({"content": ""}, "error"),
        {"error": {"code": 503, "message": "upstream died"}},
        {"error": "upstream died"},
    ],
)
def test_an_error_inside_a_reply_is_no_answer_and_asked_again(chat_server, said):
    server = chat_server(say=[["zzz", 200, said]])
    replies, client = run(config(server, max_attempts=3), ["zzz", "b"])
    assert isinstance(replies["zzz"], RequestError) and replies["b"].text == "b"
    assert sum(client.meter.retries.values()) == 3


def test_a_body_that_is_nested_without_end_is_an_attempt_that_failed(chat_server):
    deep: object = 1
    for _ in range(900):
        deep = [deep]
    server = chat_server(say=[["zzz", 200, deep]])
    replies, _ = run(config(server, max_attempts=2), ["zzz", "b"])
    assert "no reply after 2 attempts (the last: body: no reply)" in str(replies["zzz"]) and replies["b"].text == "b"


# --- Azure ---


def test_azure_is_asked_at_its_address_with_its_header(chat_server, monkeypatch):
    monkeypatch.setenv("OWN_KEY", SECRET)
    server = chat_server(needs_key=True, takes_no=["max_tokens"])
    base = server.url.removesuffix("/v1") + "/openai/deployments/mine?api-version=2024-10-21"
    settings = ClientConfig(base_url=base, api_key_env="OWN_KEY", first_backoff_seconds=0.01)
    replies, _ = run(settings, ["a"])
    assert replies["a"].text == "a"
    assert set(server.stats()["targets"]) == {"/openai/deployments/mine/chat/completions?api-version=2024-10-21"}
    assert server.stats()["listed"] == ["/openai/models?api-version=2024-10-21"]


def test_what_was_answered_is_not_asked_again_in_another_process(chat_server, tmp_path):
    server = chat_server(seed=4, **FAULTS)
    settings = config(server, cache=tmp_path / "cache", timeout=2.0)
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


ASK_THE_HUB = """
import sys
sys.modules["socksio"] = None
from hba.errors import InputError
from hba.atlas import open_atlas
from hba.model.checkpoint import hub_checkpoint
for ask in (lambda: open_atlas("some/atlas", split="test"), lambda: hub_checkpoint("some/model", None, "hba.json")):
    try:
        ask()
    except InputError as error:
        print(error)
"""


def test_the_hub_behind_a_socks_proxy_without_its_package_says_what_to_install(tmp_path):
    away = {"ALL_PROXY": "socks5://me:hunter2@127.0.0.1:1", "HF_ENDPOINT": "http://hub.invalid", "HF_HUB_OFFLINE": "0"}
    environment = os.environ | away | {"HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", ASK_THE_HUB]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    said = done.stdout.splitlines()
    assert len(said) == 2 and all("pip install 'httpx[socks]'" in line for line in said), done.stderr
    assert "hunter2" not in done.stdout + done.stderr
