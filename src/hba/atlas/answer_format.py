"""How a model is asked to answer, and what a good answer then looks like: one jinja file a format.

A format is a template with two blocks: `prompt` (from `problem`) and `response` (from `answer`, and `reasoning` where
the format has a place for it). Training, prediction and RL ask through the same file, so that a model is evaluated in
the words that it was trained with. `plain`, `boxed` and `think` come with the package; a path names another file.

It refuses to invent: a format that shows reasoning needs some for every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from hba.errors import InputError, nearest

FORMATS = Path(__file__).parent.parent / "formats"
_BLOCKS = ("prompt", "response")


class AnswerFormat:
    """A format by name or file. Raises InputError when there is none, or when it is not a template with both blocks."""

    def __init__(self, name: str) -> None:
        self.name = name
        path = _path(name)
        self.source = path.read_text(encoding="utf-8")
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)  # noqa: S701
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


@lru_cache(maxsize=256)
def expression(source: str) -> jinja2.Template:
    """A jinja text of a config value, such as "{{ reasoning }}". Raises InputError for one that does not parse."""
    try:
        return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(source)  # noqa: S701
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"not a jinja text: {source!r} ({error})", fix="Repair it.") from None
