"""Tasks, domains, datasets, labels and published figures of the atlas: a typed view of `taxonomy.yaml`.

The one place that turns a raw answer into a canonical label and a label into its global index. Global indices are
part of the released checkpoints and never change. A `Taxonomy` is immutable; `BUILTIN` is the published one, and
`extended` makes another from a user's own entries.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import yaml

from hba.errors import InputError, TaxonomyError, nearest
from hba.storage import atomic_write

# Several labels in one text: how rows write them, how models answer with them, and their one canonical spelling.
#
# Labels are listed with commas, semicolons, bars, slashes or lines, numbered or not, the last perhaps after 'and';
# 'none' (or one of its words) says that there is none. Canonical: labels in the taxonomy's order, joined by ', ', or
# 'none'. A part that is no label is left out of an answer (`read_labels`), and refused in a row (`read_labels(...,
# strict=True)`); a text without any label that does not say 'none' is no answer.


NONE = "none"
NONE_WORDS = frozenset((NONE, "no label", "none of these", "none of the above", "background", "n/a", "nothing"))
_SEPARATORS = re.compile(r"[,;|/\n、，；]+")
_AND = re.compile(r"\band\b|&")
_BULLET = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):])\s*")
_DECORATION = " \t\r\n.:!?\"'`*_$()[]。！？：“”‘’"


def visible(raw: str) -> str:
    """`raw` as a reader sees it: compatibility forms are folded (full-width letters are letters), and signs that nobody
    sees (zero-width spaces, byte order marks, marks of direction) are left out."""
    if raw.isascii():
        return raw
    return "".join(sign for sign in unicodedata.normalize("NFKC", raw) if unicodedata.category(sign) != "Cf").strip()


def plain_label(raw: str) -> str:
    """`raw` as labels are compared: `visible`, in lower case, runs of white space one space."""
    return " ".join(visible(raw).lower().split())


def read_labels(text: str, labels: Sequence[str], synonyms: Mapping[str, str], *, strict: bool = False) -> str | None:
    """The canonical spelling of the labels that `text` gives, None if it gives none and does not say so.

    `strict`: None as well if any part of it is not a label.
    """
    table = {plain_label(label): label for label in labels}
    table |= {plain_label(raw): label for raw, label in synonyms.items()}
    text = visible(text).lower()
    if " ".join(text.strip(_DECORATION).split()) in NONE_WORDS:
        return NONE
    parts = [part for piece in _SEPARATORS.split(text) for part in _label_parts(piece, table)]
    found = {table[part] for part in parts if part in table}
    unknown = any(part not in table for part in parts)
    if not found or (strict and unknown):
        return None
    return ", ".join(label for label in labels if label in found)


def split(canonical: str) -> tuple[str, ...]:
    """The labels of a canonical spelling."""
    return () if canonical == NONE else tuple(canonical.split(", "))


def _label_parts(piece: str, table: Mapping[str, str]) -> list[str]:
    """The labels in a piece between separators; one that is no label is cut at 'and'."""
    whole = _clean_label(piece)
    if whole in table or not whole:
        return [whole] if whole else []
    return [part for part in map(_clean_label, _AND.split(piece)) if part]


def _clean_label(piece: str) -> str:
    return " ".join(_BULLET.sub("", piece).strip(_DECORATION).split())


# Which metric of a task suits which rows. Said when a taxonomy is read, not by a score that cannot be made later.


SENTIMENT = "sentiment_intensity"


def require_fit(task: str, metric: str, dataset: Dataset) -> None:
    """Raise TaxonomyError naming task and dataset unless answers of `dataset` can be scored by `metric`."""
    if dataset.multilabel:
        fitting = ["multilabel_macro_f1"]
    elif dataset.free_form:
        fitting = ["llm_judge_accuracy"]
    else:
        fitting = ["weighted_f1", "mean_weighted_accuracy"]
        fitting += ["binary_weighted_f1"] if dataset.domain == SENTIMENT else []
    if metric not in fitting:
        kind = "multilabel" if dataset.multilabel else "free-form" if dataset.free_form else f"{dataset.domain}"
        what = f"metric {metric} does not suit the {kind} dataset {dataset.key!r}"
        raise TaxonomyError(what, where=f"task {task!r}", fix=f"Use {' or '.join(fitting)}, or another task.")


# --- the taxonomy -----------------------------------------------------------------------------------------------------


_DENIAL = re.compile(r"^(?:(?:no|not|non|without|sin)[\s-]+|无|没有|不|非)")
_YES_WORDS = ("yes", "true", "1", "是", "有", "sí")
_YES_NO_WORDS = frozenset((*_YES_WORDS, "no", "false", "0", "否", "无", "没有"))
_BETWEEN = r"['\"\s]*(?:or|and|/|,|o|或|、)['\"\s]*"
_YES_OR_NO = re.compile(
    "(?<!\\w)(?:"
    + "|".join(
        f"({a}){_BETWEEN}({b})"
        for pair in (("yes", "no"), ("true", "false"), ("1", "0"), ("是", "否"), ("有", "没有"), ("sí", "no"))
        for a, b in (pair, pair[::-1])
    )
    + ")(?!\\w)",
    re.IGNORECASE,
)
QA, MULTILABEL = "qa", "multilabel"
CARE = "Labels of mental health are for research and no diagnosis."
FILE = "taxonomy.yaml"
ZERO_SHOT = "zero_shot"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One behavioural task: `key` such as EMO, `metric` the one that the paper reports."""

    key: str
    name: str
    metric: str
    datasets: tuple[str, ...]

    @property
    def judged(self) -> bool:
        """Whether answers are free-form and need a judge."""
        return self.metric == "llm_judge_accuracy"


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One classification head: its labels in the order of their global indices."""

    name: str
    labels: tuple[str, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One dataset key. `domain` is None for free-form answers; `labels` are those that occur in it.

    A multilabel dataset has no domain either (there is no head for it), but labels, of which a row has any number.
    `group` is a pattern for file names whose first parenthesis is the speaker or dialogue. `licence`, `users` (who may
    use it), `source` and `consent` (of the people in it) are what the source's own page states.
    """

    key: str
    domain: str | None
    labels: tuple[str, ...]
    language: str = "en"
    task: str | None = None
    group: str | None = None
    multilabel: bool = False
    licence: str = "unknown"
    users: str = "unknown"
    source: str = "unknown"
    consent: str = "unknown"

    @property
    def mental_health(self) -> bool:
        """Whether its labels are of mental health: `CARE` is said beside them."""
        return (self.domain or "").startswith("mental_health")

    @property
    def free_form(self) -> bool:
        """Whether answers are free-form, with no labels to map them to."""
        return self.domain is None and not self.multilabel


class Taxonomy:
    """An immutable set of tasks, domains and datasets. Raises TaxonomyError when `raw` contradicts itself."""

    def __init__(self, raw: Mapping[str, Any], added: Mapping[str, Any] | None = None) -> None:
        """`raw` has the keys of taxonomy.yaml; `added` are those of its entries that are not the published ones."""
        self._raw = raw
        self.added = added or {}
        self.tasks = MappingProxyType(
            {
                key: Task(key=key, name=t["name"], metric=t["metric"], datasets=tuple(t["datasets"]))
                for key, t in raw["tasks"].items()
            }
        )
        self.domains = MappingProxyType(
            {
                name: Domain(name=name, labels=tuple(map(str, labels.values())), indices=tuple(map(int, labels)))
                for name, labels in raw["domains"].items()
            }
        )
        task_of = {dataset: task.key for task in self.tasks.values() for dataset in task.datasets}
        self.datasets = MappingProxyType(
            {key: self._dataset(key, entry, task_of.get(key)) for key, entry in raw["datasets"].items()}
        )
        for task in self.tasks.values():
            for dataset in task.datasets:
                require_fit(task.key, task.metric, self.dataset(dataset))

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes get a taxonomy by pickle, which cannot hold mapping proxies.
        return (_restored, (self.added,))

    def _dataset(self, key: str, entry: Mapping[str, Any], task: str | None) -> Dataset:
        multilabel = entry["domain"] == MULTILABEL
        domain = None if entry["domain"] in (QA, MULTILABEL) else str(entry["domain"])
        if domain is not None and domain not in self.domains:
            where = f"dataset {key!r}"
            raise TaxonomyError(f"unknown domain {domain!r}", where=where, fix=nearest(domain, self.domains))
        labels = tuple(map(str, entry.get("labels", ())))
        if multilabel and (not labels or any("," in label for label in labels)):
            fix = "List them under `labels`, without commas."
            raise TaxonomyError("needs labels that can be listed", where=f"dataset {key!r}", fix=fix)
        for label in () if multilabel else labels:
            if domain is None or label not in self.domains[domain].labels:
                known = self.domains[domain].labels if domain else ()
                raise TaxonomyError(f"unknown label {label!r}", where=f"dataset {key!r}", fix=nearest(label, known))
        said = {**self._raw.get("terms", {}).get(key, {}), **entry}
        told = ("language", "group", "licence", "users", "source", "consent")
        options = {name: said[name] for name in told if said.get(name) is not None}
        options |= {"task": task, "multilabel": multilabel}
        return Dataset(key=key, domain=domain, labels=labels, **options)

    @cached_property
    def num_classes(self) -> int:
        """Size of the global class space (25 as published)."""
        return 1 + max(index for domain in self.domains.values() for index in domain.indices)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The label at each global index; 'neutral' occurs in two domains."""
        names = {i: label for d in self.domains.values() for i, label in zip(d.indices, d.labels, strict=True)}
        return tuple(names[i] for i in range(self.num_classes))

    @cached_property
    def _lookup(self) -> dict[str, dict[str, str]]:
        return {name: self._raw_to_label(name) for name in self.domains}

    def _raw_to_label(self, domain: str) -> dict[str, str]:
        labels = self.domains[domain].labels
        table = {plain_label(label): label for label in labels}
        table |= {plain_label(raw): label for raw, label in self._raw["synonyms"].get(domain, {}).items()}
        if domain in self._raw["synonyms"].get("boolean_domains", ()):
            booleans = self._raw["synonyms"]["boolean"]
            table |= {str(raw): labels[0] for raw in booleans["false"]}
            table |= {str(raw): labels[1] for raw in booleans["true"]}
        return table

    def dataset(self, key: str) -> Dataset:
        """The dataset of that key. Raises TaxonomyError listing the known ones."""
        if key not in self.datasets:
            own = "One of your own is declared in taxonomy.yaml beside the rows: docs/extend.md."
            raise TaxonomyError(f"unknown dataset {key!r}", fix=f"{nearest(key, self.datasets)} {own}")
        return self.datasets[key]

    def canonical_label(self, dataset: str, raw: str) -> str | None:
        """The canonical label that `raw` means in `dataset`, or None if it means none of its domain's.

        Case, runs of white space, full-width forms and signs that nobody sees do not count; synonyms are those of the
        taxonomy. Of a multilabel dataset it is the canonical list of labels (`read_labels`). Free-form datasets have
        no labels: None. Raises TaxonomyError for an unknown dataset.
        """
        about = self.dataset(dataset)
        if about.multilabel:
            return read_labels(raw, about.labels, self._raw["synonyms"].get(dataset, {}))
        domain = about.domain
        return None if domain is None else self._lookup[domain].get(plain_label(raw))

    def offered(self, dataset: str) -> tuple[str, ...]:
        """The labels among which heads choose an answer.

        All of the domain, as published; of a user's own dataset, which may be of a published domain, those that it
        lists.
        """
        about = self.dataset(dataset)
        whole = self.domains[about.domain].labels if about.domain else about.labels
        return about.labels if about.labels and dataset in self.added.get("datasets", {}) else whole

    def spellings(self, dataset: str) -> Mapping[str, str]:
        """Every spelling that `canonical_label` knows of the labels of a dataset's domain, with its label."""
        domain = self.dataset(dataset).domain
        return {} if domain is None else self._lookup[domain]

    def no_and_yes(self, dataset: str) -> tuple[str, str] | None:
        """The labels of a dataset's domain where they are two of which one denies the other: (no stress, stress)."""
        domain = self.dataset(dataset).domain
        labels = () if domain is None else self.domains[domain].labels
        for no, yes in (labels, labels[::-1]) if len(labels) == 2 else ():
            if _DENIAL.sub("", plain_label(no), count=1) == plain_label(yes) != plain_label(no):
                return no, yes
        return None

    def worded(self, dataset: str, prompt: str) -> dict[str, str]:
        """The labels that occur in a dataset, each in the words in which `prompt` offers it.

        That is the label itself, unless the prompt has another of its spellings and not the label (`Choose from:
        happiness, sadness`), or asks a yes-or-no question for a pair of words (`Answer yes or no`).
        """
        about = self.dataset(dataset)
        labels = about.labels or (self.domains[about.domain].labels if about.domain else ())
        text = visible(prompt)
        offered: dict[str, str] = {}
        for label in labels:
            known = [raw for raw, meant in self.spellings(dataset).items() if meant == label and len(raw) > 1]
            for word in (label, *sorted(known, key=len, reverse=True)):
                found = re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
                if found and word not in _YES_NO_WORDS:
                    offered[label] = label if word == label else found[-1]
                    break
        ends, asked = self.no_and_yes(dataset), list(_YES_OR_NO.finditer(text))
        if ends is not None and asked and len(offered) < 2:
            first, second = filter(None, asked[-1].groups())
            no, yes = (second, first) if first.lower() in _YES_WORDS else (first, second)
            return {label: {ends[0]: no, ends[1]: yes}[label] for label in labels}
        return {label: offered.get(label, label) if len(offered) > 1 else label for label in labels}

    def require_label(self, dataset: str, raw: str) -> str:
        """`canonical_label`, or a TaxonomyError that lists the labels of the dataset's domain.

        Every part of a list of labels must be one.
        """
        about = self.dataset(dataset)
        if about.multilabel:
            label = read_labels(raw, about.labels, self._raw["synonyms"].get(dataset, {}), strict=True)
            if label is None:
                what = f"{raw!r} is no list of labels of dataset {dataset!r}"
                raise TaxonomyError(what, fix=f"List some of these with commas, or write 'none': {about.labels}.")
            return label
        label = self.canonical_label(dataset, raw)
        if label is None:
            domain = self.dataset(dataset).domain
            known = self.domains[domain].labels if domain else ()
            raise TaxonomyError(f"unknown label {raw!r} for dataset {dataset!r}", fix=nearest(raw, known))
        return label

    def global_index(self, dataset: str, label: str) -> int:
        """Index of `label` (raw or canonical) in the global class space, 0..24 as published.

        Raises TaxonomyError for an unknown dataset or label, listing the known ones.
        """
        name = self.require_label(dataset, label)
        domain = self.domains[str(self.dataset(dataset).domain)]
        return domain.indices[domain.labels.index(name)]

    def extended(self, entries: Mapping[str, Any]) -> Taxonomy:
        """A taxonomy with more tasks, datasets or synonyms; raises TaxonomyError if an entry would redefine one.

        `entries` has the keys of taxonomy.yaml; with `extends` they are added to those of that bundled file. Tasks of
        the same key gain the new datasets. New domains must take indices beyond those in use, without a gap.
        """
        if entries.get("extends"):
            entries = dict(entries)
            extended = self.extended(bundled(entries.pop("extends"))).extended(entries)
            return Taxonomy(extended._raw, added={"extends": ZERO_SHOT, **entries})
        raw = {key: dict(value) if isinstance(value, Mapping) else value for key, value in self._raw.items()}
        for key, task in entries.get("tasks", {}).items():
            known = raw["tasks"].get(key, {**task, "datasets": []})
            raw["tasks"][key] = {**known, "datasets": [*known["datasets"], *task["datasets"]]}
        used = {index for domain in self.domains.values() for index in domain.indices}
        for name, labels in entries.get("domains", {}).items():
            if name in raw["domains"] or used & set(map(int, labels)):
                fix = f"Choose a new name, and indices from {self.num_classes} on."
                raise TaxonomyError("would redefine published classes", where=f"domain {name!r}", fix=fix)
            raw["domains"][name] = labels
            used |= set(map(int, labels))
        if used != set(range(len(used))):
            fix = f"Number new classes from {self.num_classes} on, without a gap."
            raise TaxonomyError("class indices have a gap", where="domains", fix=fix)
        for key, dataset in entries.get("datasets", {}).items():
            if key in raw["datasets"]:
                raise TaxonomyError("is already in the taxonomy", where=f"dataset {key!r}", fix="Choose another key.")
            raw["datasets"][key] = dataset
        for domain, table in entries.get("synonyms", {}).items():
            if domain not in raw["domains"] and raw["datasets"].get(domain, {}).get("domain") != MULTILABEL:
                fix = nearest(domain, raw["domains"])
                raise TaxonomyError("is not a domain", where=f"synonyms of {domain!r}", fix=fix)
            raw["synonyms"][domain] = {**raw["synonyms"].get(domain, {}), **table}
        return Taxonomy(raw, added=entries)


class _Plain(yaml.SafeLoader):
    """A file of a stranger says what it says itself: ten lines of `<<: [*a, *a]` would be billions of keys. The loader
    in C is none for it: brackets without end are the end of its process."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse what this method is there to put in."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "write out what << would merge", key.start_mark)


def of_folder(folder: str | Path) -> Taxonomy:
    """The published taxonomy, extended by `taxonomy.yaml` of an atlas or run folder if there is one.

    Raises TaxonomyError naming file and entry when it is malformed or would redefine something published.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return BUILTIN
    try:
        entries = msgspec.convert(yaml.load(path.read_bytes(), Loader=_Plain), type=_Entries)  # noqa: S506
    except (msgspec.ValidationError, yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        what = f"not a taxonomy ({' '.join(str(error).split())})"
        raise TaxonomyError(what, where=str(path), fix="See docs/extend.md.") from None
    try:
        return BUILTIN.extended(msgspec.to_builtins(entries))
    except TaxonomyError as error:
        raise TaxonomyError(error.what, where=f"{path}, {error.where}".rstrip(", "), fix=error.fix) from None


def bundled(name: str) -> Mapping[str, Any]:
    """The entries of a taxonomy that comes with the package, such as zero_shot."""
    entries: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))
    return entries


class _TaskEntry(msgspec.Struct, forbid_unknown_fields=True):
    datasets: list[str]
    name: str = ""
    metric: Literal[
        "weighted_f1", "mean_weighted_accuracy", "binary_weighted_f1", "llm_judge_accuracy", "multilabel_macro_f1"
    ] = "weighted_f1"


class _DatasetEntry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    domain: str
    labels: list[str] = []
    language: str = "en"
    group: str | None = None
    licence: str = "unknown"
    users: str = "unknown"
    source: str = "unknown"
    consent: str = "unknown"


class _Entries(msgspec.Struct, forbid_unknown_fields=True):
    """What a user's taxonomy.yaml may hold; the same keys as the published one."""

    extends: Literal["", "zero_shot"] = ""
    tasks: dict[str, _TaskEntry] = {}
    domains: dict[str, dict[int, str]] = {}
    datasets: dict[str, _DatasetEntry] = {}
    synonyms: dict[str, dict[str, str]] = {}


def save_beside(taxonomy: Taxonomy, folder: Path) -> None:
    """Write what `taxonomy` adds to the published one into `folder`, so that `of_folder` gives it again."""
    if taxonomy.added:
        with atomic_write(folder / FILE) as handle:
            yaml.safe_dump(dict(taxonomy.added), handle, sort_keys=False, allow_unicode=True)


def _restored(added: Mapping[str, Any]) -> Taxonomy:
    return BUILTIN.extended(added) if added else BUILTIN


_TEXT = Path(__file__).with_name("taxonomy.yaml").read_text(encoding="utf-8")
# The C loader is safe too, and saves a tenth of a second at every start.
PUBLISHED: Mapping[str, Any] = yaml.load(_TEXT, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
BUILTIN = Taxonomy(PUBLISHED)
TASKS, DOMAINS, DATASETS = BUILTIN.tasks, BUILTIN.domains, BUILTIN.datasets
NUM_CLASSES = BUILTIN.num_classes
canonical_label = BUILTIN.canonical_label
global_index = BUILTIN.global_index


# The published figures, as the package brings them: `published_results.yaml`, a table by name.
#
# Figures stand as they were published, in per cent or as shares; whoever shows them beside scores says so.


def published_table(name: str) -> dict[str, Any]:
    """The rows of a table by their names; `columns` are among them where the rows are lists. Raises InputError."""
    tables = _tables()
    if name not in tables:
        raise InputError(f"no published table {name!r}", fix=nearest(name, tables))
    return dict(tables[name])


@cache
def _tables() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("published_results.yaml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return tables
