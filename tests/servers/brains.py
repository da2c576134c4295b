"""What the chat server of `chat.py` says: from a request body to a text, or a dict if structured."""


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


BRAINS = {"echo": echo, "kinds": kinds, "key": key}
