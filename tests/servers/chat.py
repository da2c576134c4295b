"""A chat server on the loopback that speaks all three APIs and fails as it is told to. Run as a script of its own.

    python chat.py --seed 3 --brain echo --faults '{"429": 0.05, "drop": 0.02, "retry_after": "0.05"}'

prints its port. What happens to a request depends on the seed, the hash of its body and how often that body came, so
that a run is repeatable in whatever order requests arrive; after `most_faults` faults a body is answered.

Faults (shares of the attempts): 429 (with `retry_after`, also as a header of 503), 500, 503, hang (no answer for
`hang_seconds`), drop (connection closed before the answer), cut (closed in mid-body), malformed (half of the JSON with
a whole header), strange (JSON of another kind), slow (byte by byte, for `slow_seconds`). `latency` seconds pass before
every answer. A body that contains `refuse` gets a 400.

More of a script: `models` (a listing for GET; without it a 404), `needs_key` (401 without one), `takes_no` (parameters
refused as OpenAI does), `bare` (others refused as pydantic does), `balance` (answers before 402; `broke` says it as
that service does), `say` ([words in the body, status, error or reply as JSON], the first that fits), `close_after`
(answers before everything is refused with 503), `together` (numbers of requests: those up to each are answered once
so many have come).

After GET /hold/N, once N requests in all are answered, others wait until GET /release, so that a test that kills its
client in the middle finds it there. GET /stats gives {"requests", "answered", "distinct", "peak", "faults", "early":
requests within a Retry-After}.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from contextlib import suppress
from hashlib import sha256

from brains import BRAINS

FAULTS = ("429", "500", "503", "hang", "drop", "cut", "malformed", "strange", "slow")

KEYS = {"authorization", "x-api-key", "x-goog-api-key", "api-key"}
# How services say that there is no money left.
BROKE = {
    "deepseek": (402, {"error": {"message": "Insufficient Balance", "type": "unknown_error"}}),
    "anthropic": (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "Your credit balance is too low to access the Anthropic API.",
            },
        },
    ),
    "openai": (
        429,
        {
            "error": {
                "message": "You exceeded your current quota, please check your plan and billing details.",
                "type": "insufficient_quota",
                "code": "insufficient_quota",
            }
        },
    ),
    "openrouter": (200, {"error": {"code": 402, "message": "This request requires more credits"}}),
}


class Server:
    def __init__(self, seed, brain, script):
        self.seed, self.brain, self.script = seed, BRAINS[brain], script
        self.seen, self.faults, self.answered = Counter(), Counter(), Counter()
        self.active = self.peak = self.early = self.connections = 0
        self.closed_until = 0.0
        self.listed, self.targets = [], Counter()
        self.arrived, self.num_answered, self.most, self.changed = 0, 0, None, asyncio.Condition()
        settings = {"retry_after", "hang_seconds", "slow_seconds", "latency", "refuse", "most_faults", "models", "say"}
        settings |= {"needs_key", "takes_no", "bare", "balance", "broke", "close_after", "together"}
        unknown = set(script) - {*FAULTS, *settings}
        assert not unknown, unknown

    def fault(self, digest):
        """The fault of this attempt, or None."""
        attempt = self.seen[digest]
        self.seen[digest] += 1
        if attempt >= self.script.get("most_faults", 3):
            return None
        drawn = random.Random(f"{self.seed}/{digest}/{attempt}").random()
        for name in FAULTS:
            drawn -= self.script.get(name, 0.0)
            if drawn < 0:
                return name
        return None

    async def connection(self, reader, writer):
        self.connections += 1
        try:
            while (head := await request_head(reader)) is not None:
                target, headers = head
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if target == "/stats":
                    await send(writer, 200, json.dumps(self.stats()).encode())
                    continue
                if target == "/release" or target.startswith("/hold/"):
                    self.most = None if target == "/release" else int(target.rpartition("/")[2])
                    await send(writer, 200, b"{}")
                    continue
                if not body:
                    self.listed.append(target)
                    await self.list(target, headers, writer)
                    continue
                self.active += 1
                self.peak = max(self.peak, self.active)
                try:
                    keep = await self.answer(target, headers, body, reader, writer)
                finally:
                    self.active -= 1
                if not keep:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def list(self, target, headers, writer):
        """The models, where the script names them."""
        if self.script.get("needs_key") and not KEYS & headers.keys():
            await send(writer, 401, b'{"error": {"message": "You did not provide an API key"}}')
        elif "models" in self.script:
            await send(writer, 200, json.dumps({"data": [{"id": name} for name in self.script["models"]]}).encode())
        else:
            await send(writer, 404, b'{"detail": "Not Found"}')

    def refusal(self, headers, body):
        """Status and body of what the script refuses, or None."""
        asked, script = json.loads(body), self.script
        asked |= asked.get("generationConfig", {})
        if script.get("needs_key") and not KEYS & headers.keys():
            return 401, {"error": {"message": "You did not provide an API key"}}
        for name in script.get("takes_no", ()):
            if name in asked:
                said = f"Unsupported parameter: '{name}' is not supported with this model."
                said += " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                return 400, {"error": {"message": said, "param": name, "code": "unsupported_parameter"}}
        for name in script.get("bare", ()):
            if name in asked:
                return 422, {"detail": [{"loc": ["body", name], "msg": "Extra inputs are not permitted"}]}
        if self.num_answered >= script.get("balance", 1 << 60):
            return BROKE[script.get("broke", "deepseek")]
        if self.num_answered >= script.get("close_after", 1 << 60):
            return 503, {"error": {"message": "we are away"}}
        for words, status, said in script.get("say", ()):
            if words.encode() in body:
                return status, said
        return None

    async def turn(self, reader):
        """Wait until the script and /hold let one more request be answered."""
        async with self.changed:
            self.arrived += 1
            self.changed.notify_all()
            number = self.arrived
            needed = next((total for total in self.script.get("together", ()) if number <= total), number)
            await self.changed.wait_for(lambda: self.arrived >= needed)
        while self.most is not None and self.num_answered >= self.most:
            if reader.at_eof() or reader.exception():
                raise ConnectionError("its client has gone")
            await asyncio.sleep(0.01)

    async def answer(self, target, headers, body, reader, writer):
        """Answer one request; False when the connection is to be closed."""
        digest = sha256(body).hexdigest()
        self.targets[target] += 1
        self.early += time.monotonic() < self.closed_until
        fault = self.fault(digest)
        self.faults[fault or "none"] += 1
        await self.turn(reader)
        await asyncio.sleep(self.script.get("latency", 0.0))
        if (refused := self.refusal(headers, body)) is not None:
            status, said = refused
            await send(writer, status, json.dumps(said).encode())
            self.count(digest, status == 200 and "error" not in said)
            return True
        if self.script.get("refuse") and self.script["refuse"].encode() in body:
            await send(writer, 400, b'{"error": {"message": "this is refused", "type": "invalid_request_error"}}')
            return True
        if self.brain is BRAINS["key"] and b"tell me the key" in body:
            told = json.dumps({"error": {"message": f"Incorrect API key: {headers.get('authorization')}"}})
            await send(writer, 400, told.encode())
            return True
        if fault in ("429", "500", "503"):
            extra = {}
            if fault != "500" and "retry_after" in self.script:
                extra["retry-after"] = self.script["retry_after"]
                self.closed_until = time.monotonic() + float(extra["retry-after"])
            await send(writer, int(fault), b'{"error": {"message": "try later"}}', extra)
            return True
        if fault == "hang":  # until its client has gone, which closes the connection
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), self.script.get("hang_seconds", 30.0))
            return False
        if fault == "drop":
            return False
        return await self.reply(target, headers, body, digest, fault, writer)

    async def reply(self, target, headers, body, digest, fault, writer):
        asked = understood(json.loads(body)) | {"has_key": bool(KEYS & headers.keys())}
        said = json.dumps(shaped(target, asked, self.brain(asked)), ensure_ascii=False).encode()
        if fault == "strange":
            said = b'{"object": "list", "data": []}'
        elif fault == "malformed":
            said = said[: len(said) // 2]
        if fault == "cut":
            await send(writer, 200, said, cut=len(said) // 2)
            return False
        if fault == "slow":
            await send(writer, 200, said, seconds=self.script.get("slow_seconds", 0.2))
        else:
            await send(writer, 200, said)
        self.count(digest, fault in (None, "slow"))
        return True

    def count(self, digest, is_answer):
        self.answered[digest] += is_answer
        self.num_answered += is_answer

    def stats(self):
        return {
            "requests": sum(self.seen.values()),
            "distinct": len(self.seen),
            "answered": self.num_answered,
            "answered_twice": sum(n > 1 for n in self.answered.values()),
            "peak": self.peak,
            "connections": self.connections,
            "early": self.early,
            "faults": dict(self.faults),
            "listed": self.listed,
            "targets": dict(self.targets),
        }


def understood(asked):
    """A request of Google's API with its turns as the others have them."""
    if "contents" not in asked:
        return asked
    kinds = {"audio": "input_audio", "image": "image_url", "video": "video_url"}
    turns = [
        [
            {"type": "text", "text": part["text"]}
            if "text" in part
            else {"type": kinds[part["inlineData"]["mimeType"].partition("/")[0]]}
            for part in turn["parts"]
        ]
        for turn in asked["contents"]
    ]
    return asked | {"messages": [{"role": "user", "content": content} for content in turns]}


def shaped(target, asked, said):
    """The reply of each API; `said` is a text, or a dict for a structured one."""
    text = said if isinstance(said, str) else json.dumps(said)
    prompt = sum(len(json.dumps(message)) for message in asked["messages"]) // 4
    if target.endswith("/messages"):
        block = {"type": "text", "text": text}
        if "tools" in asked and isinstance(said, dict):
            block = {"type": "tool_use", "id": "t1", "name": asked["tools"][0]["name"], "input": said}
        usage = {"input_tokens": prompt, "output_tokens": 5}
        said = {"content": [block], "stop_reason": "end_turn", "usage": usage}
        return {"type": "message", "model": asked["model"]} | said
    if target.endswith(":generateContent"):
        parts = [{"text": "let me see", "thought": True}, {"text": text}]
        usage = {"promptTokenCount": prompt, "candidatesTokenCount": 3, "thoughtsTokenCount": 2}
        candidate = {"content": {"role": "model", "parts": parts}, "finishReason": "STOP"}
        return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "g"}
    usage = {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"object": "chat.completion", "model": asked["model"], "choices": [choice], "usage": usage}


async def request_head(reader):
    """(target, headers) of the next request, None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    return first.split()[1], headers


async def send(writer, status, body, headers=None, cut=None, seconds=0.0):
    head = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(body)}"]
    head += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join([*head, "", ""]).encode())
    if seconds:
        for start in range(0, len(body), max(1, len(body) // 20)):
            writer.write(body[start : start + max(1, len(body) // 20)])
            await writer.drain()
            await asyncio.sleep(seconds / 20)
    else:
        writer.write(body if cut is None else body[:cut])
    await writer.drain()


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--brain", choices=BRAINS, default="echo")
    parser.add_argument("--faults", type=json.loads, default={})
    options = parser.parse_args()
    chat = Server(options.seed, options.brain, options.faults)
    server = await asyncio.start_server(chat.connection, "127.0.0.1", 0, limit=1 << 26, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201 - whoever started it reads the port
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
