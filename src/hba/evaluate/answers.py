r"""How an answer is read: from what a model wrote to the answer that is judged, and to a canonical label.

The one reading of the project: prediction, rewards, harnesses and the judge all come here. `read` strips what was
thought and then tries `RULES` in their order; the first that finds an answer decides, and its name stands beside the
label. An answer that names no label of the row's dataset, or two, has none: no label is better than a wrong one. What
is denied ("no signs of depression", "not sad but happy") is kept whole: in a task of yes or no it is the other label,
elsewhere it is no mention. Words are those of the taxonomy and, in English, Chinese and Spanish, of `answers.yaml`.

`extract(text, published=True)` and `published_label` are the strict reading of the released evaluation.
Invariant: every text is read without an error, in time linear in its length. A change by which a text may be read as
another label raises `predictions.READING_VERSION`.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hba.taxonomy import BUILTIN, Taxonomy, plain_label, visible

RULES: Mapping[str, str] = {
    "unanswered": "thinking that never ended, or nothing behind it: no answer",
    "json": 'the answer in the last JSON object: {"answer": "sad"}, {"emotion": "sad"}, {"is_sarcastic": false}',
    "box": r"the last \boxed{} that holds something",
    "tag": "the last <answer> that holds something",
    "exact": "the whole text is a label, or yes or no",
    "stated": "what is called the answer: 'Answer: sad', 'the final answer is sad', '答案：悲伤'",
    "bracket": "a label alone in brackets: 'It is [sad]'; never times or citations",
    "mention": "the only label that is mentioned",
    "topic": "of several, the one that is said of the thing asked for: 'The emotion is sad', 'Sentiment: negative'",
    "concluded": "of several, the one behind 'Therefore', 'Overall', 'I would say'",
    "whole": "the whole text, which means no label",
}


class Reading(NamedTuple):
    """What a text says: the rule that found it, the answer (lower-cased, stripped), the label or None."""

    rule: str
    answer: str
    label: str | None


def read(
    text: str,
    dataset: str | None = None,
    taxonomy: Taxonomy = BUILTIN,
    *,
    prompt: str | None = None,
    cut: bool = False,
) -> Reading:
    """`text` read as the answer to a row of `dataset`; free-form rows and `dataset=None` have no label.

    `prompt` is what was asked: a letter or number is an answer where the prompt offers it ("0 or 1", "A. happy"), and
    only there. Without a prompt the taxonomy's own numbers count. `cut` says that the text reached a limit of length:
    thinking that has not ended is then thinking, marked or not, and its last sentence was not finished. Raises
    TaxonomyError for an unknown dataset.
    """
    about = None if dataset is None else taxonomy.dataset(dataset)
    spoken = _spoken(text, cut)
    if spoken is None:
        return Reading("unanswered", "", None)
    if about is None or about.free_form:
        return _free(spoken)
    if about.multilabel:
        found = _free(spoken)
        return found._replace(label=taxonomy.canonical_label(about.key, found.answer))
    return _Labels.of(about.key, taxonomy).read(spoken, prompt, cut)


def to_label(dataset: str, text: str, taxonomy: Taxonomy = BUILTIN, *, prompt: str | None = None) -> str | None:
    """The canonical label that `read` finds in a model's `text`, None if it names no class of the dataset's domain."""
    return read(text, dataset, taxonomy, prompt=prompt).label


def extract(text: str, *, published: bool = False) -> str:
    """The answer that `text` gives whatever was asked, lower-cased and stripped; any text is accepted.

    What `read` finds without labels; where that is no box, the last bracket in it. Of a text that holds nothing but
    thinking it is the box with which it ends, else the whole, as released. `published=True` reproduces the released
    reward extraction to the character: the first box and not the last, content cut at the first closing brace, brackets
    found inside the thinking too, neither lower-cased nor stripped.
    """
    if published:
        return _extract_published(text)
    spoken = _spoken(text)
    if spoken is None:
        box = next(_boxes(text), None)
        ends = box is not None and not _THOUGHT.sub("", text[box.end + 1 :]).strip()
        return (box.content if box is not None and ends else text).lower().strip()
    found = _free(spoken)
    brackets = [] if found.rule in ("json", "box") else _BRACKET.findall(found.answer)
    named = [inside for inside in brackets if not _REFERENCE.fullmatch(inside)]
    return named[-1].strip() if named else found.answer


def published_label(dataset: str, text: str, taxonomy: Taxonomy = BUILTIN) -> str | None:
    """The label by the strict published reading: the released extraction, which must be a label or a synonym whole."""
    return taxonomy.canonical_label(dataset, extract(text, published=True))


def named_label(dataset: str, answer: str, taxonomy: Taxonomy = BUILTIN) -> str | None:
    """The label of an answer that is nothing but a label, in whatever dress."""
    label = taxonomy.canonical_label(dataset, answer)
    return taxonomy.canonical_label(dataset, bare(answer)) if label is None else label


def bare(answer: str) -> str:
    """An answer without what may stand around a label: LaTeX text commands, punctuation, emphasis; lower-cased."""
    return " ".join(without_latex(answer).strip(_DECORATION).lower().split())


def without_latex(text: str) -> str:
    """`text` with the content of ``\\text{...}``, ``\\textbf{...}`` and their like in place of the command."""
    return _LATEX_TEXT.sub(r"\1", text)


_DECORATION = " \t\r\n.,;:!?\"'`*_$(){}[]。！？：；，、“”‘’「」"
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|texttt|textrm|mathrm|mathbf|mathit|emph)\s?\{([^{}]*)\}")


# What was said, without what was thought.

_THINKING = r"think(?:ing)?|thoughts?|reasoning|reflection|analysis|scratchpad|seed:think"
_THOUGHT = re.compile(
    rf"<\s?/?\s?(?:{_THINKING})\s?>|◁/?think▷|\[/?THINK\]|<\|(?:begin|end)_of_thought\|>", re.IGNORECASE
)
_CHANNEL = re.compile(r"<\|channel\|>\s?(\w+)[^<]*<\|message\|>")
_BARE_CHANNEL = re.compile(r"analysis(?=[A-Z])")  # as a tokenizer leaves it that skips special tokens
_BARE_FINAL = "assistantfinal"
_CONTROL = re.compile(r"<\|[^|<>\n]{1,40}\|>|<(?:end_of_turn|eos|/?s)>")
_ROLE = re.compile(r"(?:^|\n)[ \t]{0,9}assistant:", re.IGNORECASE)


def opened_thinking(prompt: str) -> str:
    """The tag with which a prompt ends, as those of chat templates do that open thinking for the model; "" without."""
    tags = list(_THOUGHT.finditer(prompt))
    opened = bool(tags) and _opens(tags[-1]) and not prompt[tags[-1].end() :].strip()
    return prompt[tags[-1].start() :] if opened else ""


def _opens(tag: re.Match[str]) -> bool:
    return "/" not in tag[0] and "end_" not in tag[0]


def _spoken(text: str, cut: bool = False) -> str | None:
    """`text` without its thinking, however that is marked; None if it says nothing else.

    A closing tag without an opening one ends what a chat template opened in the prompt; a text that was `cut` off
    before any, and begins as thinking does, is such thinking. Thinking that never ends hides all behind it but an
    <answer>, with which a model ends that forgot the tag; of a text that was cut off that, too, is a thought.
    """
    channels = list(_CHANNEL.finditer(text))
    if channels:
        return _CONTROL.sub("", text[channels[-1].end() :]) if channels[-1][1] == "final" else None
    if _BARE_CHANNEL.match(text):
        return text.rpartition(_BARE_FINAL)[2] if _BARE_FINAL in text else None
    kept: list[str] = []
    position, opened, thought = 0, -1, False
    for tag in _THOUGHT.finditer(text):
        thought = True
        if _opens(tag):
            opened = tag.start() if opened < 0 else opened
        elif opened >= 0:
            kept.append(text[position:opened])
            position, opened = tag.end(), -1
        else:
            kept, position = [], tag.end()
    if cut and not thought and _pattern(r"\W{0,9}WORDS", "musings").match(text[:_NEAR].lower().replace("’", "'")):
        return None
    if opened >= 0:
        answer = None if cut else _tag(text[opened:])
        kept += [text[position:opened], "" if answer is None else f"<answer>{answer}</answer>"]
        position = len(text)
    spoken = _CONTROL.sub("", "".join(kept) + text[position:])
    for role in _ROLE.finditer(spoken):
        spoken = spoken[role.end() :] if role.end() < len(spoken) else spoken
        break
    return spoken if spoken.strip() or not thought else None


# Where an answer stands, whatever was asked.

_BRACES = re.compile(r"\\boxed\s?\{|\\.|[{}]", re.DOTALL)
_EMPTY_BOX = re.compile(r"\\boxed\s?\{\s{0,9}\}")
_TAG = re.compile(r"<\s?(/?)\s?answer\s?>", re.IGNORECASE)
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_REFERENCE = re.compile(r"[\s\d.,:;/\-–x]*", re.IGNORECASE)  # times, citations, check boxes
_PLACEHOLDERS = frozenset(("", "answer", "your answer", "final answer", "your final answer", "answer here", "label"))
_LONGEST_PLACEHOLDER = 60
_FENCE = re.compile(r"```\w*")
_MOST_BRACES = 200  # tried as the start of a JSON object
_CALLED_FREE = re.compile(
    r"(?:\b(?:final |correct )?answer(?: is)?\**\s{0,2}[:：]|\bfinal answer is\b"
    r"|\brespuesta(?: final)?(?: es)?\**\s{0,2}[:：]|(?:答案|回答)(?:是|为)?\**\s{0,2}[:：])\**",
    re.IGNORECASE,
)


class _Box(NamedTuple):
    start: int  # of its content
    end: int
    content: str


def _boxes(text: str) -> Iterator[_Box]:
    """The complete boxes that hold something, those that open last first; escaped braces do not count."""
    opened: list[int | None] = []  # where the content of an open box starts; None for a plain brace
    spans: list[tuple[int, int]] = []
    for token in _BRACES.finditer(text):
        kind = token[0]
        if kind == "{":
            opened.append(None)
        elif kind == "}":
            start = opened.pop() if opened else None
            if start is not None:
                spans.append((start, token.start()))
        elif kind.endswith("{") and len(kind) > 2:
            opened.append(token.end())
    for start, end in sorted(spans, reverse=True):
        if end - start > _LONGEST_PLACEHOLDER or bare(text[start:end]) not in _PLACEHOLDERS:
            yield _Box(start, end, text[start:end])


def last_box(text: str) -> str | None:
    """Content of the complete box that opens last and holds something; braces inside must balance."""
    box = next(_boxes(text), None)
    return None if box is None else box.content


def _tag(text: str) -> str | None:
    """Content of the last <answer> element that holds something, None without one."""
    content: str | None = None
    opened = -1
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened >= 0:
            inside, opened = text[opened : tag.start()], -1
            content = content if bare(inside) in _PLACEHOLDERS else inside
    return content


class _Json(NamedTuple):
    """The last JSON object or list of a text. `alone`: the text is nothing else, but perhaps for a fence."""

    value: dict[Any, Any] | list[Any]
    alone: bool


def _json(text: str) -> _Json | None:
    """The last JSON object in `text`, also with single quotes, or a list that is all of it; None without one."""
    decoder = json.JSONDecoder()
    found: dict[Any, Any] | None = None
    at, first, end = text.find("{"), -1, 0
    for _ in range(_MOST_BRACES):
        if at < 0:
            break
        value, behind = None, at + 1
        try:
            value, behind = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            closing = text.find("}", at, at + 2000)
            if closing > 0 and "'" in text[at:closing]:
                try:
                    value, behind = ast.literal_eval(text[at : closing + 1]), closing + 1
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    value = None
        if isinstance(value, dict) and value:
            found, first, end = value, at if first < 0 else first, behind
        at = text.find("{", max(behind, at + 1))
    if found is not None:
        return _Json(found, not bare(_FENCE.sub("", text[:first] + text[end:])))
    listed = _FENCE.sub("", text).strip()
    try:
        value = json.loads(listed) if listed.startswith('["') else None
    except (ValueError, RecursionError):
        value = None
    return _Json(value, True) if isinstance(value, list) else None


def _value(found: Any, names: Sequence[str]) -> str | None:
    """The value under the first key of an object that is one of `names`, as text; of a list all its texts."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            if isinstance(key, str) and _plain_key(key) in names:
                return _value(value, names) if isinstance(value, Mapping) else _value([value], names)
        return None
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], (Mapping, list)):
        return _value(found[0], names)
    said = {True: "yes", False: "no", None: ""}
    return ", ".join(said[each] if isinstance(each, bool) or each is None else str(each) for each in found)


def _plain_key(key: str) -> str:
    return plain_label(key.replace("_", " ").replace("-", " "))


def _free(spoken: str) -> Reading:
    """The answer of a text to which no labels are known."""
    found = _json(spoken)
    value = None if found is None else _value(found.value, _words()["answers"])
    if value is not None:
        return Reading("json", _peeled(value), None)
    for rule, place in (("box", last_box), ("tag", _tag), ("stated", _called)):
        inside = place(spoken)
        if inside is not None:
            return Reading(rule, _peeled(inside), None)
    return Reading("whole", _peeled(_EMPTY_BOX.sub("", spoken)), None)


def _called(text: str) -> str | None:
    """What stands behind the last 'Answer:' or 'the final answer is', to the end of its paragraph."""
    markers = list(_CALLED_FREE.finditer(text))
    behind = text[markers[-1].end() :].strip() if markers else ""
    return behind.split("\n\n")[0].strip("* \t\r\n") or None


def _peeled(answer: str) -> str:
    """An answer in lower case, without white space and without brackets around all of it."""
    answer = answer.lower().strip()
    inside = _BRACKET.fullmatch(answer)
    return answer if inside is None else inside[1].strip()


# Which label it is.

_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
_LETTER = r"[0-9a-z\u00df-\u024f]"
_CUT_BOX = re.compile(r"\\boxed\s?\{[^{}]{0,200}\Z")
_MARKUP = re.compile(r"~~[^~\n]{0,200}~~|```\w*|<[a-z/][^<>\n]{0,40}>|(?m:^[ \t]{0,9}[#>]+)|\\[()\[\]]|\\(?=\s)|[*`$_]")
_HYPHEN = re.compile(rf"(?<={_LETTER})[-‐‑](?={_LETTER})")
_SPACES = re.compile(r"\s+")
_SENTENCE = re.compile(r"[.;!?(。！？]")
_SENTENCE_ENDS = re.compile(r"[.!?。！？\n]")
_QUOTED = re.compile(r"[\"“「«]([^\"”」»\n]{1,300})[\"”」»]")
_ALTERNATIVE = re.compile(r"[\s$,]{0,9}(?:or|and|/|或|o|y)[\s$]{0,9}", re.IGNORECASE)
_JSON_PAIR = re.compile(r'"([^"\\]{1,40})"\s{0,9}:\s{0,9}(?:"((?:[^"\\]|\\.){0,2000})"|(true|false|\d))')
_PERSONAL = re.compile(r"\b(?:i|i'm|i'd|you|your|please|sorry|puedo)\b|[我你您]|请|抱歉")
_LONGEST_READ = 20_000  # characters of a text, from its end, and of a place, from its start, in which words are sought
_OPEN = "?"  # in place of a label: yes or no, one cannot tell
_SHORT_WORDS = 3  # an answer of so many words is one, though it names no label
_SHORT_SENTENCE = 6  # words of a last line that needs no full stop
_LONGEST_WORD = 40
_MOST_WORDS = 500  # of labels; a text with more is none that a person reads
_NEAR = 200  # characters in front of a label that say whether it is denied


@lru_cache(maxsize=1)
def _words() -> Mapping[str, Any]:
    """answers.yaml."""
    raw: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

    def listed(entry: Any) -> Any:
        if isinstance(entry, str):
            return tuple(word.strip() for word in entry.split(","))
        return {key: listed(each) for key, each in entry.items()}

    return {key: listed(entry) for key, entry in raw.items()}


def _any_of(words: Iterable[str]) -> str:
    """A pattern for any of the words, the longest first; Latin ones whole, a space is any white space."""
    return "|".join(map(_word, sorted(set(words), key=lambda word: (-len(word), word))))


def _word(word: str) -> str:
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, word) and word != "n't" else ""
    after = rf"(?!{_LETTER})" if re.match(_LETTER, word[-1]) else "(?!常)" if word == "非" else ""
    return before + re.escape(word).replace(r"\ ", r",?\s+") + after


@lru_cache(maxsize=64)
def _pattern(shape: str, *lists: str) -> re.Pattern[str]:
    """`shape` with the words of these lists of answers.yaml in the place of each WORDS, in their order."""
    for name in lists:
        shape = shape.replace("WORDS", f"(?:{_any_of(_words()[name])})", 1)
    return re.compile(shape)


@lru_cache(maxsize=16)
def _word_set(name: str) -> frozenset[str]:
    """The words of a list of answers.yaml; among the fillers the signs of a list, too."""
    return frozenset(_words()[name]) | (frozenset(",/、") if name == "fillers" else frozenset())


def _ending(text: str, words: Collection[str]) -> str:
    """The longest of `words` with which a text ends, Latin ones whole; empty without one."""
    for length in range(min(_LONGEST_WORD, len(text)), 0, -1):
        word = text[-length:]
        inside = word != "n't" and re.match(_LETTER, word) and re.match(_LETTER, text[-length - 1 : -length])
        if word in words and not inside:
            return word
    return ""


def _flat(text: str) -> str:
    """`text` as its words are looked for: folded and lower-cased, without markup; lines stay lines, empty ones go."""
    flat = visible(without_latex(_CUT_BOX.sub(" ", _EMPTY_BOX.sub(" ", text)))).lower()
    flat = flat.replace("’", "'").replace("【", "[").replace("】", "]")
    flat = _HYPHEN.sub(" ", _MARKUP.sub(" ", flat))
    return _SPACES.sub(lambda run: "\n" if "\n" in run[0] else " ", flat)


class _Mention(NamedTuple):
    """A label's word in a text, and the label that is said with it: the other one of a yes-or-no task where it is
    denied, None where nothing is said."""

    start: int
    end: int
    label: str | None


class _Labels:
    """Reads the labels of one dataset of a domain."""

    @staticmethod
    @lru_cache(maxsize=256)
    def of(dataset: str, taxonomy: Taxonomy) -> _Labels:
        """Made once for each dataset."""
        return _Labels(dataset, taxonomy)

    def __init__(self, dataset: str, taxonomy: Taxonomy) -> None:
        self.dataset, self.taxonomy = dataset, taxonomy
        about = taxonomy.dataset(dataset)
        domain = taxonomy.domains[str(about.domain)]
        ends = taxonomy.no_and_yes(dataset)
        self.no = None if ends is None else ends[0]
        self.yes = None if ends is None else ends[1]
        self.words = self._vocabulary(domain.name, domain.labels, about.labels or domain.labels)
        self.word = re.compile(_any_of(self.words))

    def _vocabulary(self, domain: str, labels: Sequence[str], listed: Sequence[str]) -> dict[str, str]:
        """Word -> label: of answers.yaml and the taxonomy. What begins with a negation is found as one, not here."""
        more = _words()["labels"].get(domain, {})
        table = {word: label for label, words in more.items() if label in labels for word in words}
        for label in labels:
            degree, _, base = label.partition(" ")
            meant = label if label in listed or base not in listed else base
            for adverb in _words()["degrees"].get(degree, ()) if base in labels else ():
                gap = "" if _CJK.match(adverb) else " "
                table |= {f"{adverb}{gap}{word}": meant for word in [base, *more.get(base, ())]}
        said = {*_words()["yes"], *_words()["no"]}
        for word, label in self.taxonomy.spellings(self.dataset).items():
            if len(word) > 1 and word not in said:
                table[_HYPHEN.sub(" ", word)] = label
        denied = _pattern(r"WORDS\s*\S", "negations")
        return {word: label for word, label in table.items() if self.no is None or not denied.match(word)}

    def read(self, spoken: str, prompt: str | None, cut: bool = False) -> Reading:
        """`spoken` by the first of `RULES` that finds an answer."""
        found = _json(spoken)
        value = None if found is None else self._json_value(found.value)
        if value is None and found is None and spoken.lstrip().startswith(('{"', "{\n", "{ ", "```json")):  # cut off
            value = self._json_value({key: text or sign for key, text, sign in _JSON_PAIR.findall(spoken)}) or ""
        if value is not None or (found is not None and found.alone):
            return self._placed("json", value or "", prompt)
        boxes = list(islice(_boxes(spoken), 2))
        if boxes:
            between = spoken[boxes[-1].end + 1 : boxes[0].start].rpartition("\\")[0]
            tied = len(boxes) == 2 and _ALTERNATIVE.fullmatch(between)
            return self._placed("box", "" if tied else boxes[0].content, prompt)
        tagged = _tag(spoken)
        if tagged is not None:
            return self._placed("tag", tagged, prompt)
        flat = _flat(spoken)[-_LONGEST_READ:]
        exact = self._exact(flat, prompt)
        if exact is not None:
            return Reading("exact", bare(flat), exact)
        return self._stated(flat, prompt) or self._weighed(flat, cut) or _free(spoken)

    def _placed(self, rule: str, answer: str, prompt: str | None) -> Reading:
        return Reading(rule, _peeled(answer), self._meant(_flat(answer)[:_LONGEST_READ], prompt))

    def _json_value(self, found: Any) -> str | None:
        """The answer in a JSON object: under a key for answers, for the topic, or of a yes-or-no task for its label."""
        if isinstance(found, list):
            return _value(found, _words()["answers"])
        for names in (_words()["answers"], _words()["topics"]):
            value = _value(found, names)
            if value is not None:
                return value
        for key, value in found.items() if self.no is not None else ():
            if isinstance(key, str) and self.word.search(_plain_key(key)) and isinstance(value, (bool, int, str)):
                said = {"0": "no", "1": "yes"}.get(str(int(value)) if isinstance(value, bool) else str(value), value)
                return f"{_plain_key(key)}: {said}"
        return None

    def _meant(self, piece: str, prompt: str | None) -> str | None:
        """The label of a piece of flat text that is the answer: it is one, or yes or no, or mentions one alone."""
        exact = self._exact(piece, prompt)
        if exact is not None:
            return exact
        said = {mention.label for mention in self._mentions(piece)} - {None}
        return _only(said | self._yes_or_no(piece, said))

    def _exact(self, piece: str, prompt: str | None) -> str | None:
        """The label that is all of a piece. A single sign is what the prompt offers."""
        bracketed = _BRACKET.fullmatch(piece.strip())
        if bracketed is not None and _REFERENCE.fullmatch(bracketed[1]):
            return None
        word = _OPTION.sub("", bare(piece))
        if prompt is not None and len(word) == 1 and word.isascii():
            return self._offered(_flat(prompt)).get(word)
        label = self.taxonomy.canonical_label(self.dataset, word)
        if label is None:
            label = self.no if word in _words()["no"] else self.yes if word in _words()["yes"] else None
        return label

    def _offered(self, prompt: str) -> dict[str, str]:
        """The letters and numbers that a flat prompt gives labels: 'A. happy', '0 = not sarcastic', '1 for yes'."""
        offered: dict[str, str] = {}
        signs = list(_SIGN.finditer(prompt))
        for sign, behind in zip(signs, [*(s.start() for s in signs[1:]), len(prompt)], strict=False):
            named = _OFFER_ENDS.split(prompt[sign.end() : behind], maxsplit=1)[0]
            label = self._meant(named, None) if len(named) <= _NEAR else None
            if label is not None:
                offered.setdefault(sign[1], label)
        for yes, number in _pattern(r"(WORDS|WORDS)\s?[(=:]\s?([01])", "yes", "no").findall(prompt):
            offered[number] = str(self.yes if yes in _words()["yes"] else self.no)
        if len(set(offered.values())) > 1:
            return offered
        return {"0": self.no, "1": self.yes} if self.no and self.yes and _ZERO_OR_ONE.search(prompt) else {}

    def _stated(self, flat: str, prompt: str | None) -> Reading | None:
        """What is called the answer, the last time that something is."""
        markers = list(_pattern(_CALLED, "answers", "is", "answers").finditer(flat))
        rest = flat[markers[-1].end() :] if markers else ""
        line = next((line for line in rest.split("\n") if bare(line)), None)
        if line is None:
            return None
        head = next((part for part in _SENTENCE.split(line) if bare(part)), line)
        label = self._meant(head, prompt)
        if label is None:
            mentions = self._mentions(head)
            several = len({mention.label for mention in mentions} - {None}) > 1
            if not several and (mentions or len(bare(head).split()) > _SHORT_WORDS):
                label = self._meant(line, None) or self._meant(rest, None)
        return Reading("stated", bare(head), label)

    def _weighed(self, flat: str, cut: bool) -> Reading | None:
        """The label that a text speaks for by what it mentions; None where it speaks for none or several."""
        said = [mention for mention in self._mentions(flat) if mention.label is not None]
        bracketed = {
            mention.label
            for inside in _BRACKET.finditer(flat)
            for mention in said
            if inside.start() < mention.start < inside.end() and self._exact(inside[1], None) == mention.label
        }
        if bracketed:
            return Reading("bracket", ", ".join(sorted(map(str, bracketed))), _only(bracketed))
        topics = _topics(flat)
        whole = _whole_until(flat, cut)
        said = [m for m in said if m.start < whole or (whole >= 0 and any(s <= m.start < e for s, e in topics))]
        labels = {mention.label for mention in said}
        labels |= self._yes_or_no(flat, labels)
        label = _only(labels)
        if label is not None:
            return Reading("mention", flat[said[0].start : said[0].end] if len(said) == 1 else label, label)

        def within(start: int, end: int) -> set[str | None]:
            return {mention.label for mention in said if start <= mention.start < end}

        label = _only({label for start, end in topics for label in within(start, end)})
        if label is not None:
            return Reading("topic", label, label)
        starts = [cue.end() for cue in _pattern(_CONCLUDING, "concluding").finditer(flat)]
        conclusion = next((labels for start in reversed(starts) if (labels := within(start, len(flat)))), set())
        label = _only(conclusion)
        return None if label is None else Reading("concluded", label, label)

    def _yes_or_no(self, flat: str, said: set[str | None]) -> set[str | None]:
        """The label of a task of yes or no that is given by these words at the start or behind a question.

        A polite start ("Yes! I can help.") is none: where nothing else is said, nobody may speak of himself.
        """
        if self.no is None:
            return set()
        found: set[str | None] = set()
        for word in _pattern(_ANSWERED, "yes", "no").finditer(flat):
            polite = not said and word.start() == 0 and _PERSONAL.search(flat, word.end())
            if not polite:
                found.add(self.yes if word["yes"] else self.no)
        return found

    def _mentions(self, flat: str) -> list[_Mention]:
        """Every label's word in flat text, with what is said by it."""
        text = self._masked(flat)
        words = list(islice(self.word.finditer(text), _MOST_WORDS + 1))
        if not words or len(words) > _MOST_WORDS:
            return []
        offered = self._choices(text, words)
        clauses = [0, *(found.end() for found in _pattern(_CLAUSE, "breaks", "subjects").finditer(text))]
        found = []
        for number, word in enumerate(words):
            start = max(clauses[bisect_right(clauses, word.start()) - 1], word.start() - _NEAR)
            label = None if number in offered else self._claim(text, text[start : word.start()], word)
            found.append(_Mention(word.start(), word.end(), label))
        return found

    def _claim(self, text: str, left: str, word: re.Match[str]) -> str | None:
        """What is said by a label's word with `left` in front of it in its clause; None where nothing is.

        In a task of yes or no a denial of unclear reach leaves both open (`_OPEN`), whatever else is said.
        """
        label = self.words[" ".join(word[0].replace(",", " ").split())]
        right = text[word.end() : word.end() + _NEAR]
        if _pattern("WORDS", "unsaid").search(left) or _pattern(_DOUBTED, "doubts").match(right):
            return None
        denied = bool(_pattern(_DENIED, "denials", "denials").match(right))
        ends = _SENTENCE_ENDS.search(text, word.end())
        if not denied and ends is not None and ends[0] == "?" and not _pattern(r"\s*[?]\s*WORDS", "yes").match(right):
            return None
        behind, comma, unsure = denied, False, False
        while True:  # from the word to the left, through fillers and other labels, to a negation
            left = left.rstrip()
            if negation := _ending(left, _word_set("negations")):
                unsure = behind or bool(_ending(left[: -len(negation)].rstrip(), _word_set("negations")))
                denied = behind or not comma  # "no, it is" denies nothing
                break
            filler = _ending(left, _word_set("fillers")) or _ending(left, self.words)
            if not filler or self.words.get(filler) == label:
                unsure = not filler and bool(_pattern("WORDS", "negations").search(left))
                break
            left, comma = left[: -len(filler)], filler == ","
        if _ending(left, _word_set("lessened")):
            return None
        if self.no is None:
            return None if unsure or denied else label
        if unsure:
            return _OPEN
        if not denied:  # a rating or a heading says nothing yet: "sarcasm: 0.2", "Sarcasm: I am not sure"
            headed = _HEADING.match(right) and not _pattern(r"\s*:\s*WORDS", "affirmed").match(right)
            return None if headed else label
        return self.no if label == self.yes else _OPEN

    def _masked(self, flat: str) -> str:
        """Flat text with blanks in place of phrases that mean no label, and of what others are quoted to say."""
        text = _pattern("WORDS", "phrases").sub(lambda phrase: " " * len(phrase[0]), flat)
        whole = bare(text)

        def hidden(quote: re.Match[str]) -> str:
            inside = quote[1]
            told = len(inside.split()) > 2 or bool(_CJK.search(inside))
            keep = not told or bare(inside) == whole or self.word.fullmatch(bare(inside))
            return quote[0] if keep else " " * len(quote[0])

        text = _QUOTED.sub(hidden, text)
        return _pattern(_GLOSS, "answers", "topics").sub(lambda gloss: " " * len(gloss[0]), text)

    def _choices(self, text: str, words: Sequence[re.Match[str]]) -> set[int]:
        """Numbers of the words that stand in a list of what may be answered."""
        listed: set[int] = set()
        run = [0]
        for number in range(1, len(words) + 1):
            gap = text[words[number - 1].end() : words[number].start()] if number < len(words) else None
            if gap is not None and len(gap) < 40 and _pattern(_LISTED, "negations").fullmatch(gap):
                run.append(number)
                continue
            before = text[max(0, words[run[0]].start() - 60) : words[run[0]].start()]
            several = len({text[words[n].start() : words[n].end()] for n in run}) > 1 or self.no is not None
            if len(run) > 1 and several and _pattern(r"WORDS[^.!?。！？]*$", "choices").search(before):
                listed |= set(run)
            run = [number]
        return listed


_CALLED = (
    r"(?:WORDS(?:\s*\([^()\n]{0,60}\))?(?:\s+(?:of|for|to)\b[^.:;!?\n]{0,60}?)?"
    r"(?:\s*[:=]\s*|\s+[-–]\s+|\s*WORDS\s*:?\s*)|(?:\A|\n)\s*WORDS\s*\n)"
)
_TOPIC = (
    r"WORDS(?:\s+(?:of|in|for|behind|expressed|conveyed|shown)\b[^.:;!?\n]{0,60}?)?\s*(?:[:=]|\s[-–]\s|WORDS|\n)\s*"
)
_CONCLUDING = r"WORDS|(?:\A|[.!?,;\n])\s*so,?\s(?=the|it|this|that|i|he|she|we|my)"
_ANSWERED = r"(?:\A|[?])\s*(?:i'd say |i would say |diría que )?(?:(?P<yes>WORDS)|(?P<no>WORDS))\s*(?=[.,;:!\n。]|\Z)"
_DENIED = (
    r"\s*[-–:=?|]?\s*WORDS\s*(?=[.,;!)\n|。]|\Z)"
    r"|\s*(?:[:=]\s*|mood\s+|tone\s+|symptoms?\s+|signs?\s+|intent\s+)?(?:(?:is|was|are|were|has|have|been|does|do|did|seems?|appears?|could|es|está|fue|是|并)\s*)+WORDS"
)
_CLAUSE = (
    rf"[.!?;:。！？；\n()\[\]|]|,(?={_CJK.pattern})|(?<={_CJK.pattern}),|(?<!anything )(?=WORDS)"
    r"|(?<!initially)(?<!at first)(?:,|\band\b|\by\b)\s+(?=WORDS)"
)
_GLOSS = r"(?:WORDS|WORDS)\s*\([^()\n]{1,80}\)"  # "the category (humorous or not)"
_LISTED = r"[\s,/|;'\"()\-.\d:、&=]*(?:(?:and\b|or\b|y\b|o\b|和|或者|或)[\s'\"(]*)?(?:WORDS\s*)?"
_DOUBTED = r"\s*WORDS|[^.!?\n]{0,30}\bany ?more\b"
_HEADING = re.compile(r"\s{0,3}:(?!\s{0,3}\Z)|\s{0,3}[=(]?\s{0,3}[<>~]?\d")
_CUT = r"(?:WORDS|,|、)\s*\Z"
_SIGN = re.compile(
    rf"(?<!{_LETTER})([a-h]|\d)(?:\s?[.):=]\s?|\s?\(\s?|\s+(?:is|means|for|if|stands for|para|表示|代表)\s+)"
)
_OPTION = re.compile(r"\A(?:option|choice|opción)\s\(?|\A选项")
_OFFER_ENDS = re.compile(r"[,;\n)]|\s(?:and|or|y|o)\s|。")
_ZERO_OR_ONE = re.compile(r"(?<![\d.])(?:0\s*(?:or|and|/|,|o|或|和)\s*1|1\s*(?:or|and|/|,|o|或|和)\s*0)(?!\d|\.\d)")


def _only(labels: set[str | None]) -> str | None:
    return next(iter(labels)) if len(labels) == 1 and _OPEN not in labels else None


def _whole_until(flat: str, cut: bool) -> int:
    """Where the last sentence of a text begins that stops in its middle, as one that reached its limit may (one that
    was `cut` off did); -1 where that sentence turns to something else: all that was said is then open."""
    ends = [end.end() for end in _SENTENCE_ENDS.finditer(flat.rstrip())]
    start = ends[-1] if ends else 0
    stops = flat[-1:].isalnum() and start and (cut or len(flat[start:].split()) > _SHORT_SENTENCE)
    if not stops and _pattern(_CUT, "cut").search(flat[-_NEAR:]) is None:
        return len(flat)
    return -1 if _pattern("WORDS", "contrasts").search(flat, start) else start


def _topics(flat: str) -> list[tuple[int, int]]:
    """Where it is said what the emotion or the sentiment is: the rest of each such sentence."""
    starts = [topic.end() for topic in _pattern(_TOPIC, "topics", "is").finditer(flat)]
    ends = [_SENTENCE_ENDS.search(flat, start) for start in starts]
    return [(start, len(flat) if end is None else end.start()) for start, end in zip(starts, ends, strict=True)]


# Free-form answers, compared word for word.


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


# The released extraction.

_PUBLISHED = (("\\boxed{", "}"), ("[", "]"), ("<answer>", "</answer>"))


def _extract_published(text: str) -> str:
    """What the released patterns give, up to the first closing sign; found without their quadratic time."""
    for opening, closing in _PUBLISHED:
        start = text.find(opening)
        end = text.find(closing, start + len(opening)) if start >= 0 else -1
        if end >= 0:
            return text[start + len(opening) : end]
    return text
