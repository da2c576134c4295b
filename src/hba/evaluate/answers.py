"""Answer extraction: from what a model wrote to the answer that is scored, and from there to a canonical label.

The one extractor of the project: rewards, evaluation and the judge all call `extract`. In this order: the
last complete ``\\boxed{...}``, the last ``[...]``, the last ``<answer>...</answer>``, else the whole text. All are
looked for outside the reasoning (a closed ``<think>...</think>``) wherever anything stands outside it: what a
model cites or boxes while it thinks, and may reject a line later, is not its answer. A box that is never closed is
no box, and an empty box is an empty answer.

It refuses to guess: a text that names no class of the dataset's domain has no label (None) and counts as
wrong. Invariant: every text gives an answer without an error, in time linear in its length.
"""

from __future__ import annotations

import re
import unicodedata

from hba.taxonomy import BUILTIN, Taxonomy

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_THINK = re.compile(r"<\s*(/?)\s*think\s*>", re.IGNORECASE)
_ANSWER = re.compile(r"<\s*(/?)\s*answer\s*>", re.IGNORECASE)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|texttt|mathrm|mathbf)\s*\{([^{}]*)\}")
_DECORATION = " \t\r\n.,;:!?\"'`*_$()。，！？；：“”‘’「」"

_PUBLISHED = (("\\boxed{", "}"), ("[", "]"), ("<answer>", "</answer>"))


def extract(text: str, *, published: bool = False) -> str:
    """The answer that `text` gives, lower-cased and stripped; any text is accepted.

    `published=True` reproduces the released reward extraction to the character: the first box and not the
    last, content cut at the first closing brace, brackets found inside the reasoning too, neither lower-cased
    nor stripped.
    """
    if published:
        return _extract_published(text)
    spoken = _without_reasoning(text)
    answer = last_box(spoken)
    if answer is None:
        brackets = _BRACKET.findall(spoken)
        answer = brackets[-1] if brackets else _last_tagged(spoken)
        if answer is None:
            answer = spoken
    return answer.lower().strip()


def to_label(dataset: str, text: str, taxonomy: Taxonomy = BUILTIN) -> str | None:
    """The canonical label that a model's `text` gives for `dataset`, or None if it names no class of its domain.

    Synonyms are those of the taxonomy; punctuation, quotes, Markdown emphasis and ``\\text{...}`` around the
    answer do not count. A free-form dataset has no labels: None. Raises TaxonomyError for an unknown dataset.
    """
    return named_label(dataset, extract(text), taxonomy)


def named_label(dataset: str, answer: str, taxonomy: Taxonomy = BUILTIN) -> str | None:
    """`to_label` of an answer that is already extracted."""
    label = taxonomy.canonical_label(dataset, answer)
    return taxonomy.canonical_label(dataset, bare(answer)) if label is None else label


def bare(answer: str) -> str:
    """An answer without what may stand around a label: LaTeX text commands, punctuation, emphasis; lower-cased."""
    return " ".join(without_latex(answer).strip(_DECORATION).lower().split())


def without_latex(text: str) -> str:
    """`text` with the content of ``\\text{...}``, ``\\textbf{...}`` and their like in place of the command."""
    return _LATEX_TEXT.sub(r"\1", text)


class _Unmarked(dict[int, str]):
    """For str.translate: without punctuation and symbols, every white space a space; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        unseen = category[0] in "PS" or category == "Cf"
        self[code] = kept = "" if unseen else " " if category[0] in "ZC" else chr(code)
        return kept


_UNMARKED = _Unmarked()
_ARTICLES = frozenset(("a", "an", "the"))


def plain(text: str) -> str:
    """`text` as exact match compares it: case, punctuation, articles (a, an, the) and runs of white space do not count.

    The normalisation of SQuAD over all of Unicode (compatibility forms are folded: full-width letters are letters). A
    text that is nothing but such signs is compared by them.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = folded.translate(_UNMARKED).split()
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(folded.split())


def same_answer(answer: str, target: str) -> bool:
    """Whether two free-form answers match exactly, compared as `plain` leaves them."""
    return answer == target or plain(answer) == plain(target)


def _extract_published(text: str) -> str:
    """What the released patterns give, up to the first closing sign; found without their quadratic time."""
    for opening, closing in _PUBLISHED:
        start = text.find(opening)
        end = text.find(closing, start + len(opening)) if start >= 0 else -1
        if end >= 0:
            return text[start + len(opening) : end]
    return text


def last_box(text: str) -> str | None:
    """Content of the complete box that opens last; braces inside must balance, escaped ones do not count."""
    opened: list[int | None] = []  # where the content of an open box starts; None for a plain brace
    start, end = -1, -1
    for token in _BRACES.finditer(text):
        kind = token.group()
        if kind == "{":
            opened.append(None)
        elif kind == "}":
            box = opened.pop() if opened else None
            if box is not None and box > start:
                start, end = box, token.start()
        elif kind.endswith("{") and len(kind) > 2:
            opened.append(token.end())
    return text[start:end] if end >= 0 else None


def _without_reasoning(text: str) -> str:
    """`text` without its closed think sections; the whole of it if nothing else is left."""
    kept: list[str] = []
    position, opened = 0, -1
    for tag in _THINK.finditer(text):
        if not tag.group(1):
            opened = tag.start() if opened < 0 else opened
        elif opened >= 0:
            kept.append(text[position:opened])
            position, opened = tag.end(), -1
        else:  # a chat template may have opened the section in the prompt
            kept, position = [], tag.end()
    rest = "".join(kept) + text[position:]
    return rest if rest.strip() else text


def _last_tagged(text: str) -> str | None:
    """Content of the last <answer> element, None without one."""
    content: str | None = None
    opened = -1
    for tag in _ANSWER.finditer(text):
        if not tag.group(1):
            opened = tag.end()
        elif opened >= 0:
            content, opened = text[opened : tag.start()], -1
    return content
