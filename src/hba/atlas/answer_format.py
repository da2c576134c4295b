"""How a model is asked to answer, and what a good answer then looks like: one jinja file a format.

A format is a template with two blocks: `prompt` (from `problem`) and `response` (from `answer`, and `reasoning` where
the format has a place for it). Training, prediction and RL ask through the same file, so that a model is evaluated in
the words that it was trained with. `plain`, `boxed` and `think` come with the package; a path names another file.

It refuses to invent: a format that shows reasoning needs some for every row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from hba.atlas.sample import Sample
from hba.errors import InputError, nearest

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
