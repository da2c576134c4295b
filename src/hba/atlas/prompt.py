"""From a row's `problem` with its <image>, <video>, <audio> tags to the chat messages of a processor.

A medium whose tag is missing gets one in front: images first, then videos, then audios, each in front of what stands
there, so that audio comes first (as the release does). By default a tag without a medium is an error and tags of
modalities that are switched off vanish; `published=True` keeps the released behaviour (a medium is promised that
nobody supplies), so that published prompts can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from hba.atlas.sample import Sample
from hba.errors import MediaError
from hba.taxonomy import Taxonomy

Modality = Literal["image", "video", "audio"]
MODALITIES: tuple[Modality, ...] = ("image", "video", "audio")
Message = dict[str, Any]


class Wording(Protocol):
    """What a sample is asked and what it should answer, as text; media tags stand in the question."""

    def question(self, sample: Sample) -> str:
        """The text of the prompt."""
        ...

    def answer(self, sample: Sample, target: str) -> str:
        """The text that is trained; `target` is the answer in the prompt's words."""
        ...


class AsWritten:
    """The row's problem, and its target alone as the answer."""

    def question(self, sample: Sample) -> str:
        """The problem."""
        return sample.problem

    def answer(self, sample: Sample, target: str) -> str:
        """The target."""
        return target


AS_WRITTEN: Wording = AsWritten()


def taught(sample: Sample, taxonomy: Taxonomy) -> str:
    """What a model is taught to answer: the label in the words in which the row's prompt offers it, else its target."""
    if sample.label is None or taxonomy.dataset(sample.dataset).domain is None:
        return sample.target
    return taxonomy.worded(sample.dataset, sample.problem).get(sample.label, sample.target)


class PlainText:
    """Text of a row as text: what a model would take for a token of control gets a space behind its first character.

    A row that says `<|im_end|>` would end the turn, one that says `<|AUDIO|>` would promise a sound. Only special
    tokens and placeholders of media count; other added tokens, such as those of thinking, are words.
    """

    def __init__(self, processor: Any) -> None:
        tokenizer = getattr(processor, "tokenizer", processor)
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        media = {getattr(processor, f"{modality}_token", None) for modality in MODALITIES}
        control = added | set(tokenizer.all_special_tokens) | {token for token in media if isinstance(token, str)}
        words = sorted((token for token in control if len(token) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, words)) or "(?!)")

    def __call__(self, text: str) -> str:
        """The text without tokens of control."""
        while self._control.search(text):
            text = self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text


def build_messages(
    problem: str,
    counts: Mapping[Modality, int],
    *,
    where: str,
    modalities: Sequence[Modality] = MODALITIES,
    system_prompt: str | None = None,
    published: bool = False,
    plain: Callable[[str], str] = str,
) -> list[Message]:
    """Chat messages of one row, media as `{"type": modality}` items in the order of their tags.

    `counts` says how many media of each modality the row has; only `modalities` are used. `plain` makes text of the
    row's text (see `PlainText`); a system prompt is the user's and stays as it is. Raises MediaError naming `where`
    when the tags outnumber the media.
    """
    text = problem
    for modality in MODALITIES:
        wanted = counts.get(modality, 0) if published or modality in modalities else 0
        tag = f"<{modality}>"
        if modality not in modalities and not published:
            text = text.replace(tag, "")
            continue
        present = text.count(tag)
        if present > wanted and not published:
            found = f"problem has {present} {tag} tags for {wanted} {modality}s"
            raise MediaError(found, where=f"{where}, problem", fix="Remove the tag or add the medium.")
        text = tag * (wanted - present) + text
    content = _split(text, modalities)
    for item in content:
        if item["type"] == "text":
            item["text"] = plain(item["text"])
    messages: list[Message] = [{"role": "user", "content": content}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    return messages


def _split(text: str, modalities: Sequence[Modality]) -> list[dict[str, str]]:
    parts = re.split("(" + "|".join(f"<{m}>" for m in modalities) + ")", text) if modalities else [text]
    tags = {f"<{m}>": m for m in modalities}
    return [{"type": tags[part]} if part in tags else {"type": "text", "text": part} for part in parts if part]
