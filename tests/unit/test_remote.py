"""The parts of the remote client, without a network: bodies, replies, waits, limits, prices, the cache."""

import asyncio
import json
import sys
import threading
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hba.config import load_config
from hba.errors import ConfigError, InputError
from hba.remote import ChatRequest, ClientConfig, RemoteClient, Reply, RequestError, Schema, ServiceError, bounded
from hba.remote.client import AdaptiveLimit, ResponseCache
from hba.remote.cost import Meter, Price, find_price
from hba.remote.faults import Caller, Response, of_response, retry_after_seconds
from hba.remote.providers import PROVIDERS, TokenChat
from hba.remote.request import TransientError, shown
from hba.rl.config import RlConfig

steady = settings(deadline=None, derandomize=True)
SCHEMA = Schema(name="verdict", schema={"type": "object"})
CALLER = Caller("url", str)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def request(content="hi", **changes):
    return ChatRequest(messages=[{"role": "user", "content": content}], max_tokens=9, **changes)


def reply(text="yes", **changes):
    return Reply(**{"text": text, "finish": "stop", "tokens_in": 3, "tokens_out": 1, "model": "m"} | changes)


def test_openai_bodies():
    api = PROVIDERS["openai"]
    plain = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert api.body("m", request(), official=False) == plain | {"max_tokens": 9}
    assert api.body("m", request(temperature=0.0, extra={"reasoning_effort": "low"}), official=True) == plain | {
        "max_completion_tokens": 9,
        "temperature": 0.0,
        "reasoning_effort": "low",
    }
    wanted = {"name": "verdict", "schema": {"type": "object"}, "strict": True}
    body = api.body("m", request(schema=SCHEMA), official=False)
    assert body["response_format"] == {"type": "json_schema", "json_schema": wanted}


def test_anthropic_bodies():
    api = PROVIDERS["anthropic"]
    image = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,QUJD"}}
    asked = ChatRequest(
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": [image]}],
        max_tokens=9,
        schema=SCHEMA,
    )
    body = api.body("m", asked, official=True)
    source = {"type": "base64", "media_type": "image/jpeg", "data": "QUJD"}
    assert body["system"] == "be brief"
    assert body["messages"] == [{"role": "user", "content": [{"type": "image", "source": source}]}]
    assert body["tool_choice"] == {"type": "tool", "name": "verdict"}
    assert body["tools"][0]["input_schema"] == {"type": "object"}
    with pytest.raises(InputError, match="takes no input_audio"):
        api.body("m", request([{"type": "input_audio"}]), official=True)


@pytest.mark.parametrize(
    ("message", "text", "finish"),
    [
        ({"content": "yes"}, "yes", "stop"),
        ({"content": [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]}, "yes", "stop"),
        ({"content": None, "refusal": "I will not"}, "I will not", "refusal"),
    ],
)
def test_openai_replies(message, text, finish):
    data = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}
    read = PROVIDERS["openai"].read(data)
    assert (read.text, read.finish, read.tokens_in, read.tokens_out) == (text, finish, 3, None)


def test_replies_token_by_token():
    logprobs = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1}]}
    choices = [
        {"index": 1, "message": {"content": "b"}, "finish_reason": "length", "token_ids": [6], "logprobs": None},
        {"index": 0, "message": {"content": "ab"}, "finish_reason": "stop", "token_ids": [5, 2], "logprobs": logprobs},
    ]
    reply = TokenChat().read({"choices": choices, "prompt_token_ids": [1, 2], "model": "m"})
    assert reply.prompt_token_ids == (1, 2) and [choice.token_ids for choice in reply.choices] == [(5, 2), (6,)]
    assert [choice.logps for choice in reply.choices] == [(-0.5, -1.0), None]
    plain = TokenChat().read({"choices": [{"index": 0, "message": {"content": "x"}}]})
    assert plain.prompt_token_ids is None and plain.choices[0].token_ids is None and plain.text == "x"


def test_anthropic_replies():
    used = {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 1}
    call = {"type": "tool_use", "id": "1", "name": "verdict", "input": {"correct": True}}
    data = {"content": [{"type": "text", "text": "Well:"}, call], "stop_reason": "tool_use", "usage": used}
    read = PROVIDERS["anthropic"].read(data)
    assert (read.text, read.tokens_in, read.tokens_out) == ('{"correct": true}', 7, 1)


@pytest.mark.parametrize("data", [None, [], {}, {"choices": []}, {"choices": [{"message": {"content": None}}]}, "x", 3])
def test_what_is_no_reply_is_no_reply(data):
    for api in PROVIDERS.values():
        with pytest.raises((ValueError, KeyError, TypeError, IndexError, AttributeError)):
            api.read(data)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:10 GMT"}, 10.0),
        ({"retry-after": "Thu, 01 Jan 2025 00:00:10 GMT"}, 0.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after_seconds(headers, NOW) == seconds


@steady
@given(st.text())
def test_any_retry_after_is_a_wait_or_none(text):
    seconds = retry_after_seconds({"retry-after": text}, NOW)
    assert seconds is None or seconds >= 0


@pytest.mark.parametrize(
    ("status", "raw", "kind"),
    [
        (429, b"{}", TransientError),
        (529, b"overloaded", TransientError),
        (400, b'{"error": {"message": "bad"}}', RequestError),
        (413, b"", RequestError),
        (401, b"{}", ServiceError),
        (404, b'{"error": "no such model"}', ServiceError),
        (301, b"", ServiceError),
        (429, b'{"error": {"code": "insufficient_quota", "message": "You exceeded"}}', ServiceError),
    ],
)
def test_what_a_status_means(status, raw, kind):
    assert type(of_response(Response(status, {}, raw), CALLER)) is kind


def test_a_403_after_replies_is_about_one_request():
    """A filter on the way may refuse one prompt; that must not end a run of 5,000."""
    blocked = Response(403, {}, b"blocked")
    assert isinstance(of_response(blocked, CALLER._replace(answered=True)), RequestError)
    assert isinstance(of_response(Response(401, {}, b""), CALLER._replace(answered=True)), ServiceError)


def test_messages_of_a_server_are_one_short_printable_line():
    raw = b'{"error": {"message": "\\u001b[31mred\\n\\nlines' + b"x" * 9000 + b'"}}'
    text = str(of_response(Response(400, {}, raw), CALLER))
    assert text.isprintable() and len(text) < 400


def test_the_limit_follows_its_formula():
    limit = AdaptiveLimit(100)
    seen = [limit.limit]
    for overloaded in (0, 0, 0, 8, 26, 0):  # of each round
        size = int(limit.limit + 0.999)
        for i in range(size):
            limit.report(overloaded=i < overloaded)
        seen.append(round(limit.limit, 3))
    assert seen == [4, 8, 16, 32, 29.0, round(29 * (1 - 26 / 29 / 2) + 1, 3), round(29 * (1 - 26 / 29 / 2) + 2, 3)]
    for _ in range(200):
        limit.report(overloaded=True)
    assert limit.limit == 1.0


@steady
@given(st.lists(st.booleans(), max_size=300), st.integers(1, 64))
def test_the_limit_stays_between_one_and_its_maximum(rounds, maximum):
    limit = AdaptiveLimit(maximum)
    for overloaded in rounds:
        limit.report(overloaded=overloaded)
        assert 1 <= limit.limit <= maximum


def test_slots_are_handed_on_when_holders_and_waiters_are_cancelled():
    async def go():
        limit = AdaptiveLimit(2)
        peak = active = 0

        async def work(seconds):
            nonlocal active, peak
            async with limit.slot():
                active += 1
                peak = max(peak, active)
                try:
                    await asyncio.sleep(seconds)
                finally:
                    active -= 1

        tasks = [asyncio.ensure_future(work(0.01)) for _ in range(40)]
        await asyncio.sleep(0.015)
        for task in tasks[::3]:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        return peak

    assert asyncio.run(go()) == 2


def test_bounded_draws_no_more_than_it_works_on_and_ends_with_the_first_error():
    drawn = []

    def items():
        for i in range(100):
            drawn.append(threading.current_thread() is threading.main_thread())
            yield i

    async def work(i):
        await asyncio.sleep(0.001)
        if i == 20:
            raise RequestError("twenty")
        return i

    async def go():
        return [i async for i in bounded(items(), work, 4)]

    with pytest.raises(RequestError, match="twenty"):
        asyncio.run(go())
    assert len(drawn) <= 26 and not any(drawn)


def test_bounded_keeps_requests_going_while_an_item_is_prepared():
    finished = threading.Event()

    def items():
        yield 0
        assert finished.wait(60), "the request before this item ends while it is prepared"
        yield 1

    async def work(i):
        await asyncio.sleep(0.01)
        finished.set()
        return i

    async def go():
        return [i async for i in bounded(items(), work, 4)]

    assert asyncio.run(go()) == [0, 1]


def test_bounded_hands_out_what_came_before_it_raises(capfd):
    async def work(i):
        await asyncio.sleep(0.02)  # all end in one round of the loop
        if i % 2:
            raise RequestError(f"{i}")
        return i

    async def go(items, found):
        async for i in bounded(items, work, 8):
            found.append(i)

    for items in (list(range(8)), iter(range(8))):
        found = []
        with pytest.raises(RequestError):
            asyncio.run(go(items, found))
        assert set(found) <= {0, 2, 4, 6} and (found or not isinstance(items, list))
    assert capfd.readouterr() == ("", "")  # no exception is left for asyncio to complain of


def test_bounded_over_a_sequence_needs_no_thread():
    def work_of(threads):
        async def work(i):
            threads.update(threading.enumerate())
            await asyncio.sleep(0)
            return i

        return work

    async def go(items):
        threads = set()
        return sorted([i async for i in bounded(items, work_of(threads), 3)]), threads

    before = set(threading.enumerate())
    found, threads = asyncio.run(go(list(range(10))))
    assert found == list(range(10)) and threads <= before
    assert asyncio.run(go([])) == ([], set()) and asyncio.run(go(iter(()))) == ([], set())


def test_prices_are_for_the_official_service_and_unknown_otherwise(tmp_path):
    openai, anthropic = (PROVIDERS[name].base_url for name in ("openai", "anthropic"))
    for name, model, base, dollars in (
        ("openai", "gpt-5-nano", openai, (0.05, 0.4)),
        ("openai", "gpt-5-nano-2025-08-07", openai, (0.05, 0.4)),
        ("anthropic", "claude-haiku-4-5-20251001", anthropic, (1.0, 5.0)),
    ):
        found = find_price(name, model, base)
        assert found[:2] == dollars and found.source.startswith("genai-prices ")
    assert find_price("openai", "gpt-5-nano", "http://localhost:8000/v1") is None
    assert find_price("openai", "gpt-5-nano", "https://models.example.org/v1") is None
    assert find_price("openai", "nobody", openai) is None
    own = tmp_path / "own.yaml"
    own.write_text("openai:\n  mine: {input: 1, output: 2}\n  bad: 3\n")
    assert find_price("openai", "mine", "http://localhost:8000/v1", own).cost(1_000_000, 500_000) == 2.0
    with pytest.raises(ConfigError, match=r"own.yaml, openai.bad: no pair of prices"):
        find_price("openai", "bad", openai, own)


def test_a_reply_without_token_counts_makes_the_cost_unknown():
    meter = Meter(Price(1.0, 1.0))
    meter.saw(reply())
    assert meter.cost_usd == pytest.approx(4e-6)
    meter.saw(reply(tokens_out=None))
    assert meter.cost_usd is None and meter.record()["cost_usd"] is None


def test_two_caches_share_a_folder(tmp_path):
    with ResponseCache(tmp_path) as one, ResponseCache(tmp_path) as two:
        one.put("a", reply("one \U0001f600"))
        two.put("b", reply("two", tokens_in=None))
        assert one.get("a").text == "one \U0001f600" and one.get("b") is None
    assert len(list(tmp_path.glob("segment-*.jsonl"))) == 2
    with ResponseCache(tmp_path) as later:
        assert later.get("a") == reply("one \U0001f600", cached=True)
        assert later.get("b") == reply("two", tokens_in=None, cached=True)
        assert later.get("c") is None and len(later) == 2


def test_a_torn_or_foreign_line_of_a_cache_is_no_entry(tmp_path):
    with ResponseCache(tmp_path) as cache:
        cache.put("a", reply())
    segment = tmp_path / "segment-0.jsonl"
    segment.write_bytes(b'[1]\n{"key": 3}\n' + segment.read_bytes() + b'{"key": "b", "te')
    with ResponseCache(tmp_path) as cache:
        assert len(cache) == 1 and cache.get("a") == reply(cached=True)
        cache.put("b", reply("b"))
    with ResponseCache(tmp_path) as cache:
        assert cache.get("b").text == "b"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "not an http"),
        ("ftp://x/v1", "not an http"),
        ("", "not an http"),
        ("http://user:pass@x/v1", "carries a user"),
        ("http://x/v1?key=1", "carries a user"),
    ],
)
def test_base_urls(url, said):
    with pytest.raises(ConfigError, match=said) as refused:
        ClientConfig(base_url=url)
    assert "pass" not in str(refused.value)
    with pytest.raises(ConfigError, match=said):
        load_config(RlConfig, None, ["atlas=a", "rollout.sampler=server", f"remote.base_url={json.dumps(url)}"])


@pytest.mark.parametrize("key", ["sk-proj-0123456789", "AIzaSyD0123456789"])
def test_a_key_in_place_of_its_variable_is_refused_and_not_repeated(key):
    with pytest.raises(ConfigError, match="not the name of an environment variable") as refused:
        ClientConfig(api_key_env=key)
    assert key not in str(refused.value)
    with pytest.raises(ConfigError, match="not the name of an environment variable") as refused:
        load_config(RlConfig, None, ["atlas=a", f"remote.api_key_env={key}"])
    assert key not in str(refused.value)


@pytest.mark.parametrize("raw", [b'{"error": {"message": "%s"}}', b"%s"])
@pytest.mark.parametrize("before", range(280, 300, 3))
def test_a_key_at_the_end_of_a_message_is_cut_out_before_the_message_is_cut_short(monkeypatch, raw, before):
    monkeypatch.setenv("MY_KEY", "AIzaSyD0123456789")
    client = RemoteClient("m", ClientConfig(base_url="http://x/v1", api_key_env="MY_KEY"))
    response = Response(400, {}, raw % (b"x " * (before // 2) + b"AIzaSyD0123456789"))
    assert "AI" not in str(of_response(response, Caller("url", client.redacted)))


@pytest.mark.parametrize("proxy", ["http://me:hunt/er2@127.0.0.1:1", "socks9://me:hunter2@127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_not_repeated(monkeypatch, proxy):
    monkeypatch.setenv("HTTP_PROXY", proxy)

    async def ask():
        async with RemoteClient("m", ClientConfig(base_url="http://x.invalid/v1")):
            pass

    with pytest.raises(InputError, match=r"HTTPS_PROXY.*password") as refused:
        asyncio.run(ask())
    assert "hunt" not in str(refused.value) and refused.value.__suppress_context__


def test_a_socks_proxy_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://me:hunter2@127.0.0.1:1")

    async def ask():
        async with RemoteClient("m", ClientConfig(base_url="http://x.invalid/v1")):
            pass

    with pytest.raises(InputError, match=r"a SOCKS proxy is set.*pip install 'httpx\[socks\]'") as refused:
        asyncio.run(ask())
    assert "hunt" not in str(refused.value)
    asyncio.run(ask_the_loopback())


async def ask_the_loopback():
    """Which no proxy reaches."""
    async with RemoteClient("m", ClientConfig(base_url="http://127.0.0.1:9/v1")):
        pass


@pytest.mark.parametrize(
    ("base", "chat", "models"),
    [
        ("https://r.openai.azure.com", "/openai/v1/chat/completions", "/openai/v1/models"),
        ("https://r.openai.azure.com/openai/v1/", "/openai/v1/chat/completions", "/openai/v1/models"),
        ("https://r.openai.azure.com/?api-version=V", "/openai/deployments/m/chat/completions?api-version=V",
         "/openai/models?api-version=V"),
        ("https://r.services.ai.azure.com/openai/deployments/mine/chat/completions?api-version=V",
         "/openai/deployments/mine/chat/completions?api-version=V", "/openai/models?api-version=V"),
        ("https://gateway.example.org/ai/openai/deployments/mine?api-version=V",
         "/ai/openai/deployments/mine/chat/completions?api-version=V", "/ai/openai/models?api-version=V"),
        ("http://localhost:8000/v1/chat/completions", "/v1/chat/completions", "/v1/models"),
        ("http://localhost:8000", "/chat/completions", "/models"),
    ],
)  # fmt: skip
def test_addresses_of_azure_and_of_others_as_they_are_pasted(base, chat, models):
    ClientConfig(base_url=base)
    urls = PROVIDERS["openai"].urls(base, "m")
    host = "/".join(base.split("/")[:3]).partition("?")[0]
    assert urls == (f"{host}{chat}", f"{host}{models}")


def test_keys_go_in_the_header_of_each_service_and_azures_to_azure_alone(monkeypatch):
    openai, azure = PROVIDERS["openai"], "https://r.openai.azure.com"
    assert openai.headers("k", azure) == {"api-key": "k"}
    assert openai.headers("eyJh.eyJp.c2ln", azure) == {"authorization": "Bearer eyJh.eyJp.c2ln"}
    assert openai.headers("k", "http://localhost:8000/v1") == {"authorization": "Bearer k"}
    assert openai.key_env(azure) == "AZURE_OPENAI_API_KEY" and openai.key_env(openai.base_url) == "OPENAI_API_KEY"
    for foreign in ("https://vm.westeurope.cloudapp.azure.com/v1", "https://x.org/openai/deployments/d", "http://a/v1"):
        assert openai.key_env(foreign) is None
    monkeypatch.delenv("AZURE_OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="AZURE_OPENAI_API_KEY: no API key"):
        RemoteClient("m", ClientConfig(base_url=azure))


def test_an_address_is_shown_without_its_user():
    assert shown("https://me:hunter2@mirror/hf") == "https://mirror/hf"
    assert "hunt" not in shown("https://me:hunt/er2@mirror:1")


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"ANTHROPIC_API_KEY: no API key in the environment"):
        RemoteClient("m", ClientConfig(provider="anthropic"))
