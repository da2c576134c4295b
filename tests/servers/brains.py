"""What the chat server of `chat.py` says: from a request body to a text, or a dict if structured."""

import json
import re
from hashlib import sha256


def texts(asked):
    """All text of the last user message."""
    content = [message for message in asked["messages"] if message["role"] == "user"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def echo(asked):
    """The user's text."""
    return texts(asked)


def kinds(asked):
    """The kinds of the parts that arrived, such as 'input_audio image_url text'."""
    content = asked["messages"][-1]["content"]
    return "text" if isinstance(content, str) else " ".join(part["type"] for part in content)


def key(asked):
    """Whether the request carried a key."""
    return "authorized" if asked["has_key"] else "no key"


def choose(asked):
    """One of the offered labels in a box, by the hash of the prompt; one prompt in eight gets no usable answer."""
    prompt = texts(asked)
    number = int(sha256(prompt.encode()).hexdigest(), 16)
    offered = re.search(r"Choose from: ([^.]*)\.", prompt)
    if number % 8 == 0 or offered is None:
        return "I would rather not say."
    labels = offered.group(1).split(", ")
    return f"<think>Perhaps {labels[0]}.</think>\\boxed{{{labels[number // 8 % len(labels)]}}}"


def judge(asked):
    """A compliant judge: correct if the candidate is the reference, spelling aside. What answers say is data to it."""
    item = judged_item(asked)
    same = item["candidate"].lower().split() == item["reference"].lower().split()
    return {"code": item["code"], "reason": "compared", "correct": same}


def judged_item(asked):
    """The lines of the judge's prompt, decoded, with their code."""
    lines = texts(asked).split("\n")
    code = lines[0][1:17]
    assert len(lines) == 5 and all(line.startswith(f"[{code}] ") for line in lines), lines
    named = (line[19:].split(": ", 1) for line in lines[:4])
    return {name: json.loads(content) for name, content in named} | {"code": code}


def misled(asked):
    """A judge that obeys the answers: it says true in every way that is no verdict of this protocol."""
    item = judged_item(asked)
    code = item["code"]
    good = json.dumps({"code": code, "reason": "x", "correct": True})
    return misled_replies(code, good, item["candidate"])[int(code, 16) % MISLED]


def misled_replies(code, good, candidate):
    """What a misled judge may say about an item with that code."""
    return [
        "true",
        "The answer is true.",
        "True. The candidate talks about the same thing, so my verdict is: correct = true.",
        candidate,
        good[:-1],
        good + good,
        good + "\n" + good.replace("true", "false"),
        f"Sure! {good}",
        f"```json\n{good}\n```\nI hope this helps.",
        good.replace(code, "0" * 16),
        good.replace(code, code[::-1]),
        '{"correct": true}',
        '{"reason": "same", "correct": true}',
        good.replace("true", '"true"'),
        good.replace("true", "1"),
        good.replace("true", "null"),
        good.replace("}", ', "correct": false}'),
        good.replace("}", ', "score": 1}'),
        f"[{good}]",
        '"true"',
        "",
        "{" * 5000,
        "I cannot grade this.",
    ]


MISLED = len(misled_replies("0123456789abcdef", '{"code": "0123456789abcdef", "correct": true}', ""))


def flaky(asked):
    """A judge that gives no verdict to every fifth request (by its code), and else is compliant."""
    return misled(asked) if int(judged_item(asked)["code"], 16) % 5 == 0 else judge(asked)


BRAINS = {
    "echo": echo,
    "kinds": kinds,
    "key": key,
    "choose": choose,
    "judge": judge,
    "misled": misled,
    "flaky": flaky,
}
