"""The prompt of a row: from its `problem` and its media tags to a processor's chat messages, and the answer format.

A medium whose tag is missing gets one in front: images first, then videos, then audios, each in front of what stands
there, so that audio comes first (as the release does). By default a tag without a medium is an error and tags of
modalities that are switched off vanish; `published=True` keeps the released behaviour (a medium is promised that
nobody supplies), so that published prompts can be compared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jinja2
from jinja2 import meta

from hba.atlas.rows import Sample
from hba.errors import InputError, MediaError, nearest
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


# How a model is asked to answer, and what a good answer then looks like: one jinja file a format.
#
# A format is a template with two blocks: `prompt` (from `problem`) and `response` (from `answer`, and `reasoning` where
# the format has a place for it). Training, prediction and RL ask through the same file, so that a model is evaluated in
# the words that it was trained with. `plain`, `boxed` and `think` come with the package; a path names another file.
#
# It refuses to invent: a format that shows reasoning needs some for every row.


FORMATS = Path(__file__).parent.parent / "formats"
_BLOCKS = ("prompt", "response")


class AnswerFormat:
    """A format by name or file. Raises InputError when there is none, or when it is not a template with both blocks."""

    def __init__(self, name: str) -> None:
        self.name = name
        path = _path(name)
        self.source = path.read_text(encoding="utf-8")
        environment = _environment()
        try:
            self._template = environment.from_string(self.source)
            self._needs = meta.find_undeclared_variables(environment.parse(self.source))
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"not a jinja template ({error})", where=str(path), fix="Repair the file.") from None
        missing = [block for block in _BLOCKS if block not in self._template.blocks]
        if missing:
            fix = "Write {% block prompt %}...{% endblock %} and {% block response %}...{% endblock %}."
            raise InputError(f"a format without the block {missing[0]!r}", where=str(path), fix=fix)

    def __reduce__(self) -> tuple[Any, ...]:
        return (AnswerFormat, (self.name,))  # templates do not pickle, and loader workers need the format

    @property
    def shows_reasoning(self) -> bool:
        """Whether a response of this format holds reasoning."""
        return "reasoning" in self._needs

    def prompt(self, problem: str) -> str:
        """The problem as the model is asked it; media tags stay where they were."""
        return self._render("prompt", {"problem": problem})

    def response(self, answer: str, reasoning: str | None = None) -> str:
        """A right answer in this format. Raises InputError when it shows reasoning and there is none."""
        values = {"answer": answer} if reasoning is None else {"answer": answer, "reasoning": reasoning}
        return self._render("response", values)

    def _render(self, block: str, values: Mapping[str, str]) -> str:
        context = self._template.new_context(dict(values))
        try:
            return "".join(self._template.blocks[block](context))
        except jinja2.UndefinedError as error:
            fix = "Use a format that needs less, or give the value."
            raise InputError(f"block {block!r}: {error}", where=f"format {self.name}", fix=fix) from None


def _path(name: str) -> Path:
    bundled = FORMATS / f"{name}.jinja"
    if bundled.is_file():
        return bundled
    if Path(name).is_file():
        return Path(name)
    known = [path.stem for path in FORMATS.glob("*.jinja")]
    raise InputError(f"no answer format {name!r}", fix=f"{nearest(name, known)} A path to a .jinja file works, too.")


class FormatMix:
    """The `Wording` of samples in one format or several: which one a sample has is fixed by its id and the seed.

    Every name has an equal share of the samples, so that one given twice has twice the share. `reasoning` is a jinja
    text over the sample's answer, problem, dataset, task and the further fields of its row, for the formats that show
    reasoning.
    """

    def __init__(self, names: Sequence[str], *, reasoning: str = "{{ reasoning }}", seed: int = 0) -> None:
        """Raises InputError for no format, an unknown one, or a reasoning that is no jinja text."""
        if not names:
            raise InputError("no answer format", where="formats", fix="Name at least one, such as plain.")
        self.names, self.reasoning, self.seed = tuple(names), reasoning, seed
        self._formats = [AnswerFormat(name) for name in names]
        try:
            self._reasoning = _environment().from_string(reasoning)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"not a jinja text ({error})", where="reasoning", fix="Repair it.") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return (partial(FormatMix, reasoning=self.reasoning, seed=self.seed), (self.names,))

    def format_of(self, sample: Sample) -> AnswerFormat:
        """The format of a sample."""
        digest = hashlib.sha256(f"{self.seed}:{sample.split}:{sample.id}".encode()).digest()
        return self._formats[int.from_bytes(digest[:8], "big") % len(self._formats)]

    def question(self, sample: Sample) -> str:
        """The problem as its format asks it."""
        return self.format_of(sample).prompt(sample.problem)

    def answer(self, sample: Sample, target: str) -> str:
        """`target` in the sample's format. Raises InputError naming the row that has no reasoning to show."""
        answer_format = self.format_of(sample)
        if not answer_format.shows_reasoning:
            return answer_format.response(target)
        known = {"answer": target, "problem": sample.problem, "dataset": sample.dataset, "task": sample.task}
        try:
            return answer_format.response(target, self._reasoning.render({**sample.extra, **known}))
        except jinja2.UndefinedError as error:
            fix = "Add the field to the rows, set `reasoning` to a text that needs less, or use another format."
            raise InputError(f"no reasoning: {error}", where=sample.where, fix=fix) from None


def _environment() -> jinja2.Environment:
    return jinja2.Environment(undefined=jinja2.StrictUndefined)  # noqa: S701  # prompts are no HTML
