"""What the chat server of `chat.py` says: from a request body to a text, or a dict if structured."""

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


BRAINS = {"echo": echo, "kinds": kinds, "key": key, "choose": choose}
