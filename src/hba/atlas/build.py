"""`hba atlas build`: files that somebody has, and what is known of them, become an atlas.

Three ways in, tried in this order: the layout of a published corpus (`LAYOUTS`), a table of labels (CSV, TSV or JSONL),
folders that are named by their labels. Each gives `Entry`s; from there on there is one way: every file is looked at,
labels that the taxonomy knows keep their domain and others make one of their own, and rows are dealt into splits so
that no speaker or group is in two of them. Files are linked into the atlas, or copied from another disk.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hba.errors import InputError, MediaError, nearest
from hba.storage import Line, atomic_folder, file_sha256, plural, read_jsonl, remove_abandoned, write_jsonl
from hba.taxonomy import BUILTIN, QA, Taxonomy, save_beside, visible

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXTS = (".txt",)
LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini", "icon\r")  # what Windows and macOS put into folders without being asked
TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "labels.csv", "labels.tsv", "labels.jsonl")
MOST_TEXT_BYTES = 1 << 20
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "test": "test", "testing": "test"}
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
COLUMNS = {  # names by which a column is found that nobody has named; the first that is there
    "file": ("file_name", "filename", "file", "path", "filepath", "clip", "video", "audio", "image"),
    "label": ("label", "class", "answer", "emotion", "sentiment", "category", "target"),
    "group": ("speaker", "speaker_id", "subject", "subject_id", "participant", "participant_id", "actor", "group"),
    "transcript": ("transcript", "transcription", "text", "utterance", "sentence"),
    "split": ("split", "set", "partition"),
}
QUESTIONS = {
    "emotion": "What emotion does the person show?",
    "sentiment_intensity": "What is the sentiment of the speaker?",
    "humour": "Is this humour?",
    "sarcasm": "Is this sarcasm?",
    "mental_health_anxiety": "Does the person show signs of anxiety?",
    "mental_health_depression": "Does the person show signs of depression?",
    "mental_health_ptsd": "Does the person show signs of PTSD?",
    "multilabel": "Which of these does the person show?",
}
FREE_QUESTIONS = {
    "SOC": "How do the people in this recording feel about each other, and why?",
    "INT": "What does the person want, and why?",
    "NVC": "What does the person express without words?",
}
UNLABELLED = "unlabelled"
"""the split of files without a label that are in no other"""
_TAGS = re.compile(r"<(?=(?:image|video|audio)>)")
_SHOWN = 5


class Medium(NamedTuple):
    """A file and what a model can take of it: `kinds` are of image, video and audio; `text` is what a text says."""

    path: Path
    kinds: tuple[str, ...]
    text: str = ""


class Entry(NamedTuple):
    """What is known of a file, of its label None where nothing is. Files of one `group` (a speaker, a dialogue) stay
    together in a split."""

    path: Path
    label: str | None
    group: str | None = None
    transcript: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Built:
    """What was made: rows of each split, how often each label occurs (`unlabelled`: files without one), and why files
    were left out."""

    out: str
    dataset: str
    task: str
    domain: str
    splits: dict[str, int]
    labels: dict[str, int]
    unlabelled: int
    groups: int | None
    unreadable: dict[str, str]


def look_at(path: Path) -> Medium:
    """What a model can take of a file, by its content. Raises MediaError for one that is no medium."""
    ending, where = path.suffix.lower(), str(path)
    if ending in PICTURES:
        from hba.atlas.media import load_image

        load_image(path, where=where)
        return Medium(path, ("image",))
    if ending in TEXTS:
        if path.stat().st_size > MOST_TEXT_BYTES:
            raise MediaError(f"is longer than {MOST_TEXT_BYTES:,} bytes", where=where, fix="Give a shorter text.")
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            raise MediaError("is not UTF-8 text", where=where, fix="Save it as UTF-8.") from None
        if not text:
            raise MediaError("is empty", where=where, fix="Give a file with text.")
        return Medium(path, (), text)
    from hba.atlas.source import open_container, sound_track, video_track

    kinds, reasons = [], []
    with open_container(path, where=where) as container:
        for kind, track in (("video", video_track), ("audio", sound_track)):
            try:
                track(container, where)
                kinds.append(kind)
            except MediaError as error:
                reasons.append(error.what)
    if not kinds:
        raise MediaError("; ".join(reasons), where=where, fix="Give a clip, a sound, a picture or a text.")
    return Medium(path, tuple(kinds))


def bring(path: Path, place: Path) -> None:
    """Put a file at `place`: a hard link, or a copy from another disk."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), place)
    except OSError:
        shutil.copyfile(path, place)


def row_of(
    medium: Medium, name: str, dataset: str, taxonomy: Taxonomy, *, question: str | None, transcript: str | None
) -> dict[str, Any]:
    """The row that asks about a medium, which lies at `name` in its atlas, with the labels of `dataset` if it has any.

    It has no answer. Media tags in what is said or asked are text, and promise no medium.
    """
    about = taxonomy.dataset(dataset)
    labels = about.labels or (taxonomy.domains[about.domain].labels if about.domain in taxonomy.domains else ())
    asked = (
        question or QUESTIONS.get(str(about.domain)) or FREE_QUESTIONS.get(str(about.task)) or "Which of these is it?"
    )
    said, asked = (_TAGS.sub("< ", text or "") for text in (medium.text or transcript, asked))
    spoken = f'The speaker says: "{said}" ' if said else ""
    choose = f" Choose from: {', '.join(labels)}." if labels else ""
    row = {
        "problem": f"{''.join(f'<{kind}>' for kind in medium.kinds)}{spoken}{asked}{choose}",
        "answer": None,
        "dataset": dataset,
        "task": f"{(about.task or dataset).lower()}_{'cls' if labels else 'qa'}",
        "modality_signature": "_".join(["text", *medium.kinds]),
    }
    return row | {f"{kind}s": [name] for kind in medium.kinds}


def build_atlas(
    folder: Path,
    out: Path,
    *,
    layout: str | None = None,
    labels: Path | None = None,
    columns: Mapping[str, str | None] | None = None,
    dataset: str | None = None,
    question: str | None = None,
    choices: Sequence[str] = (),
    unlabelled: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Make the atlas `out` of the files in `folder`. It appears whole or not at all.

    `labels` is a table, `columns` names columns of it (file, label, group, transcript, split) that are called otherwise
    than usual. `unlabelled` lets files be without a label: their rows have no answer, and a split of their own where
    nothing says which. `choices` are the answers to choose from, by default the labels that there are; with a
    `question` and neither, answers are in words. `dataset` is the key that the rows get, by default the name of the
    folder. `seed` deals rows into splits where nothing says which they belong to. Raises InputError for a folder
    without files, labels that do not fit the files, a single label, a group in two splits, and `out` that is there.
    """
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder), fix="Give the folder with the files.")
    if out.exists():
        raise InputError("is there already", where=str(out), fix="Choose another folder, or remove it.")
    entries = list(_entries(folder, layout, labels, columns or {}, unlabelled=unlabelled))
    given = sorted({entry.label for entry in entries if entry.label is not None} | set(choices))
    _require_sound(folder, entries, given, question, choices)
    taxonomy, key, canonical = _labelled(_key(dataset or layout or folder.resolve().name), given, question)
    splits = _split(folder, entries, seed)
    if out.parent.is_dir():
        remove_abandoned(out.parent)
    unreadable: dict[str, str] = {}
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with atomic_folder(out) as making:
        for done, (entry, split) in enumerate(zip(entries, splits, strict=True), start=1):
            progress(done, len(entries))
            name = entry.path.relative_to(folder).as_posix()
            try:
                medium = look_at(entry.path)
            except MediaError as error:
                unreadable[name] = error.what
                continue
            place = f"media/{name}"
            if medium.kinds:
                bring(entry.path, making / place)
            row = row_of(medium, place, key, taxonomy, question=question, transcript=entry.transcript)
            row["id"] = f"{key}/{name}"
            if entry.label is not None:
                row |= dict.fromkeys(("answer", "class_label"), canonical[entry.label])
            rows[split].append(row | ({} if entry.group is None else {"speaker": entry.group}))
        for split in dict.fromkeys([*(SHARES if any(entry.label for entry in entries) else ()), *splits]):
            if not rows[split] and split == UNLABELLED and any(rows.values()):
                continue  # all of them are named below; rows with labels stand without them
            if not rows[split]:
                first = next(iter(unreadable.items()), None)
                what = f"no readable file is left for the split {split}" + (": {} {}".format(*first) if first else "")
                mend = "Give files that can be read" if first else "Give more files"
                fix = f"{mend}." if split == UNLABELLED else f"{mend} (at least three groups), or splits."
                raise InputError(what, where=str(folder), fix=fix)
            write_jsonl(making / f"{split}.jsonl", rows[split])
        save_beside(taxonomy, making)
    kept = [row for split in rows.values() for row in split]
    return Built(
        out=str(out),
        dataset=key,
        task=str(taxonomy.dataset(key).task),
        domain=str(taxonomy.dataset(key).domain),
        splits={split: len(rows[split]) for split in (*SHARES, UNLABELLED) if rows[split]},
        labels=dict(Counter(row["answer"] for row in kept if row["answer"] is not None).most_common()),
        unlabelled=sum(row["answer"] is None for row in kept),
        groups=len({row["speaker"] for row in kept if "speaker" in row}) or None,
        unreadable=unreadable,
    )


def _key(name: str) -> str:
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", name) if not unicodedata.combining(sign))
    return re.sub(r"[^a-z0-9]+", "_", plain.lower()).strip("_") or "mine"


# --- what is known of the files ---------------------------------------------------------------------------------------


def _entries(
    folder: Path, layout: str | None, labels: Path | None, columns: Mapping[str, str | None], *, unlabelled: bool
) -> Iterable[Entry]:
    if layout is not None:
        if layout not in LAYOUTS:
            raise InputError(f"no layout {layout!r}", where="--layout", fix=nearest(layout, LAYOUTS))
        return LAYOUTS[layout](folder)
    here = {path.name.lower(): path for path in folder.iterdir() if path.is_file()}
    table = labels or next((here[name] for name in TABLES if name in here), None)
    how = {"unlabelled": unlabelled}
    return of_folders(folder, **how) if table is None else of_table(folder, table, columns, **how)


def media_below(folder: Path) -> list[Path]:
    """All files below a folder in the order of their names; hidden ones, tables and LEFT_BY_SYSTEMS are none."""
    others = {*TABLES, *LEFT_BY_SYSTEMS}
    found = (path for path in folder.rglob("*") if path.is_file() and path.name.lower() not in others)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def of_folders(folder: Path, *, unlabelled: bool = False) -> Iterator[Entry]:
    """`LABEL/file` or `SPLIT/LABEL/file`, as ImageFolder and AudioFolder of Hugging Face's datasets have them."""
    for path in media_below(folder):
        *inside, _ = path.relative_to(folder).parts
        split = SPLITS.get(inside[0].lower()) if len(inside) > 1 else None
        alone = SPLITS.get(inside[0].lower()) if len(inside) == 1 else None
        if not inside or alone is not None:
            if unlabelled:
                yield Entry(path, None, split=alone)
                continue
            what = "lies in no folder that is named by a label"
            fix = "Put files into one folder a label, give a table with --labels, or --allow-unlabelled."
            raise InputError(what, where=str(path), fix=fix)
        yield Entry(path, inside[1] if split else inside[0], split=split)


def of_table(
    folder: Path, table: Path, columns: Mapping[str, str | None] | None = None, *, unlabelled: bool = False
) -> Iterator[Entry]:
    """A row of the table a file, which it names relative to the folder. Raises InputError naming the line."""
    records = read_table(table)
    known = list(records[0].record)
    needed = ("file",) if unlabelled else ("file", "label")
    chosen = {part: _column(part, (columns or {}).get(part), known, table, needed) for part in COLUMNS}
    inside = {path.relative_to(folder).as_posix(): path for path in media_below(folder) if path != table}
    by_name: dict[str, list[Path]] = defaultdict(list)
    alike: dict[str, list[Path]] = defaultdict(list)
    for name, path in inside.items():
        for known_as in (Path(name).name, Path(name).stem):
            by_name[known_as].append(path)
            alike[_alike(known_as)].append(path)
    named: set[Path] = set()
    missing: list[str] = []
    entries = []
    for number, record in records:
        value = {part: "" if column is None else _text(record.get(column)) for part, column in chosen.items()}
        name = value["file"] if value["file"] in inside else value["file"].replace("\\", "/")  # written on Windows
        last = Path(name).name
        paths = [inside[name]] if name in inside else by_name.get(last) or alike.get(_alike(last), [])
        if not value["file"] or not (value["label"] or unlabelled):
            part = "file" if not value["file"] else "label"
            what = f"the column {chosen[part]!r} is empty"
            raise InputError(what, where=f"{table}:{number}", fix="Fill it in, or remove the line.")
        if len(paths) > 1:
            what = f"{value['file']!r} is the name of {len(paths)} files"
            raise InputError(what, where=f"{table}:{number}", fix="Write the path from the folder on.")
        if not paths:
            missing.append(value["file"])
            continue
        split = SPLITS.get(value["split"].lower()) if value["split"] else None
        if value["split"] and split is None:
            fix = "Use train, validation or test."
            raise InputError(f"unknown split {value['split']!r}", where=f"{table}:{number}", fix=fix)
        named.add(paths[0])
        label, group, transcript = (value[part] or None for part in ("label", "group", "transcript"))
        entries.append(Entry(paths[0], label, group, transcript, split))
    if missing:
        what = f"{plural(len(missing), 'file', 'of the table is|of the table are')} not there: {_some(missing)}"
        raise InputError(what, where=str(table), fix=f"Put them into {folder}, or remove their lines.")
    unnamed = [name for name, path in inside.items() if path not in named]
    if unlabelled:
        entries += [Entry(inside[name], None) for name in unnamed]
        unnamed = []
    if unnamed:
        what = f"{plural(len(unnamed), 'file', 'has|have')} no label: {_some(unnamed)}"
        fix = "Add a line for each, take what is no recording out of the folder, or --allow-unlabelled."
        raise InputError(what, where=str(table), fix=fix)
    return iter(entries)


def read_table(table: Path) -> list[Line]:
    """The lines of a CSV, TSV or JSONL file by their columns, each with the number that an editor shows for it; empty
    ones are passed over. Raises InputError for another encoding, for a line that cannot be read, or no line."""
    if not table.is_file():
        raise InputError("no such table", where=str(table), fix="Check the path.")
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start:,})"
        raise InputError(what, where=str(table), fix="Save it as CSV UTF-8 in the program that wrote it.") from None
    records = list(read_jsonl(table) if table.suffix.lower() == ".jsonl" else _csv_lines(text, table))
    if not records:
        raise InputError("the table has no lines", where=str(table), fix="Write a line a file below the names.")
    return records


def _csv_lines(text: str, table: Path) -> Iterator[Line]:
    """The lines below the names of the columns. A cell may hold ends of lines: the first line of a record is named."""
    separator = max(",;\t", key=text.lstrip().partition("\n")[0].count)
    lines, names = csv.reader(io.StringIO(text), delimiter=separator), list[str]()
    while True:
        number = lines.line_num + 1
        try:
            cells = next(lines, None)
        except csv.Error as error:
            fix = "Check its quotes, or save the table as CSV UTF-8."
            raise InputError(f"cannot be read ({error})", where=f"{table}:{number}", fix=fix) from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if names:
            yield Line(number, dict.fromkeys(names) | dict(zip(names, cells, strict=False)))
        names = names or cells


def _column(
    part: str, named: str | None, known: Sequence[str], table: Path, needed: Sequence[str]
) -> str | None:
    if named is not None:
        if named not in known:
            raise InputError(f"no column {named!r}", where=str(table), fix=nearest(named, known))
        return named
    lowered = {name.strip().lower(): name for name in known if name}
    found = next((lowered[name] for name in COLUMNS[part] if name in lowered), None)
    if found is None and part in needed:
        fix = f"Name it with --{part}-column; there are {', '.join(map(repr, known))}."
        raise InputError(f"no column is known as the {part}", where=str(table), fix=fix)
    return found


def _alike(name: str) -> str:
    """What names share that a person reads as one: macOS splits ü in two, Windows does not tell cases apart."""
    return unicodedata.normalize("NFC", name).casefold()


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


# --- checks, labels, splits -------------------------------------------------------------------------------------------


def _require_sound(
    folder: Path, entries: Sequence[Entry], labels: Sequence[str], question: str | None, choices: Sequence[str]
) -> None:
    if not entries:
        raise InputError("no files here", where=str(folder), fix="Give a folder with clips, sounds, pictures or texts.")
    offered = {choice.lower() for choice in choices}
    strange = [label for label in labels if offered and label.lower() not in offered]
    if strange:
        what = f"the label {strange[0]!r} is none of the choices"
        raise InputError(what, where=str(folder), fix=f"Add it to --choices, or correct it: {', '.join(choices)}.")
    if not labels and question is None:
        fix = "Name the answers with --choices happy,sad,neutral, or ask in words with --question."
        raise InputError("no file has a label, and no answers are named", where=str(folder), fix=fix)
    if len(labels) == 1:
        what = f"all {len(entries)} files have the label {labels[0]!r}"
        raise InputError(what, where=str(folder), fix="Give at least two labels: there is nothing to tell apart.")
    seen: dict[str, Path] = {}
    for path in (entry.path for entry in entries):
        other = seen.setdefault(path.relative_to(folder).as_posix().casefold(), path)
        if other != path:
            what = f"{other.name} and {path.name} are the same name on some disks"
            raise InputError(what, where=str(path.parent), fix="Rename one of them.")
    twice = [path for path, count in Counter(entry.path for entry in entries).items() if count > 1]
    if twice:
        what = f"{plural(len(twice), 'file', 'is|are')} named twice: {_some([path.name for path in twice])}"
        raise InputError(what, where=str(folder), fix="Leave one line for each.")


def _labelled(key: str, given: Sequence[str], question: str | None) -> tuple[Taxonomy, str, dict[str, str]]:
    """The taxonomy with the new dataset, its key, and the canonical label of every label that is `given`.

    Where all labels are known to one domain (happy, angry, sad: emotion), the dataset is one more of it, so that a
    model's head for it can be asked and trained on. Otherwise the labels are a domain of their own. A published
    dataset is taken as it is. Without labels answers are in words.
    """
    if not given:
        name = f"my_{key}" if key in BUILTIN.datasets else key
        task = {"name": str(question).rstrip("?"), "metric": "llm_judge_accuracy", "datasets": [name]}
        return BUILTIN.extended({"tasks": {name.upper(): task}, "datasets": {name: {"domain": QA}}}), name, {}
    for published, about in BUILTIN.datasets.items():
        if about.domain is None or (key in BUILTIN.datasets and key != published):
            continue
        read = {label: BUILTIN.canonical_label(published, visible(label)) for label in given}
        found = {label: str(name) for label, name in read.items() if name is not None}
        if len(found) == len(given):
            domain = about.domain
            labels = [label for label in BUILTIN.domains[domain].labels if label in found.values()]
            if key == published and set(labels) <= set(about.labels):
                return BUILTIN, key, found
            added: dict[str, Any] = {}
            break
    else:
        domain, found = f"{key}_labels", {label: visible(label).strip().lower() for label in given}
        labels, first = sorted(set(found.values())), BUILTIN.num_classes
        added = {"domains": {domain: {first + number: label for number, label in enumerate(labels)}}}
    name = f"my_{key}" if key in BUILTIN.datasets else key
    asked = question or QUESTIONS.get(domain) or f"the labels of {name}"
    metric = "mean_weighted_accuracy" if domain == "emotion" else "weighted_f1"
    added["tasks"] = {name.upper(): {"name": asked.rstrip("?"), "metric": metric, "datasets": [name]}}
    added["datasets"] = {name: {"domain": domain, "labels": labels}}
    return BUILTIN.extended(added), name, found


def _split(folder: Path, entries: Sequence[Entry], seed: int) -> list[str]:
    """The split of every entry: its own, UNLABELLED for one without a label and split, or one dealt out by group so
    that every split has its share of each label.

    Files of the same content are one group. Raises InputError where some have a split and others none, and where a
    group lies in two splits.
    """
    known = [entry for entry in entries if entry.label is not None]
    if len(known) < len(entries):
        dealt = iter(_split(folder, known, seed)) if known else iter(())
        return [entry.split or UNLABELLED if entry.label is None else next(dealt) for entry in entries]
    given = [entry.split for entry in entries if entry.split]
    if given and len(given) < len(entries):
        what = f"{len(entries) - len(given)} of {len(entries)} files are in no split"
        raise InputError(what, where=str(folder), fix="Give every file a split, or none.")
    groups = _groups(entries)
    if given:
        places: dict[str, set[str]] = defaultdict(set)
        for entry, group in zip(entries, groups, strict=True):
            places[group].add(str(entry.split))
        torn = [group for group, splits in places.items() if len(splits) > 1]
        if torn:
            named = _some([group.partition(":")[2] for group in torn])
            what = f"{plural(len(torn), 'group', 'lies|lie')} in several splits: {named}"
            fix = "Keep a speaker (and copies of a file) in one split, or leave the splits out."
            raise InputError(what, where=str(folder), fix=fix)
        return [str(entry.split) for entry in entries]
    return _dealt(folder, entries, groups, seed)


def _groups(entries: Sequence[Entry]) -> list[str]:
    """The group of every entry; those that share a speaker or have the same bytes are one."""
    sizes = Counter(entry.path.stat().st_size for entry in entries)
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    names = []
    for entry in entries:
        own = f"speaker:{entry.group}" if entry.group is not None else f"file:{entry.path}"
        if sizes[entry.path.stat().st_size] > 1:
            parent[root(f"bytes:{file_sha256(entry.path)}")] = root(own)
        names.append(own)
    return [root(name) for name in names]


def _dealt(folder: Path, entries: Sequence[Entry], groups: Sequence[str], seed: int) -> list[str]:
    members: dict[str, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    if len(members) < len(SHARES):
        what = f"{plural(len(members), 'group', 'is|are')} too few for train, validation and test"
        raise InputError(what, where=str(folder), fix="Give files of three speakers or more, or a column of splits.")
    order = sorted(members)
    np.random.default_rng(seed).shuffle(order)
    order.sort(key=lambda group: -len(members[group]))  # the large ones first: what is left can still even it out
    labels = Counter(str(entry.label) for entry in entries)
    have: dict[str, Counter[str]] = {split: Counter() for split in SHARES}
    chosen: dict[int, str] = {}
    for group in order:
        wanted = Counter(str(entries[number].label) for number in members[group])

        def lacking(split: str, wanted: Counter[str] = wanted) -> float:
            gaps = (SHARES[split] * labels[label] - have[split][label] for label in wanted)
            return sum(gap * wanted[label] for gap, label in zip(gaps, wanted, strict=True)) / SHARES[split]

        empty = [split for split in SHARES if not have[split]]
        left = len(order) - len({groups[number] for number in chosen})
        split = max(empty if len(empty) >= left else SHARES, key=lacking)
        have[split] += wanted
        chosen |= dict.fromkeys(members[group], split)
    return [chosen[number] for number in range(len(entries))]


# --- layouts of published corpora -------------------------------------------------------------------------------------


def cremad(folder: Path) -> Iterator[Entry]:
    """CREMA-D: `1001_DFA_ANG_XX.wav` is actor, sentence, emotion, level (github.com/CheyneyComputerScience/CREMA-D)."""
    codes = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
    return _by_name(folder, r"(?P<group>\d{4})_[A-Z]{3}_(?P<label>[A-Z]{3})_[A-Z]{2}", codes)


def ravdess(folder: Path) -> Iterator[Entry]:
    """RAVDESS: of `03-01-06-01-02-01-12.wav` the third number is emotion, the last actor (zenodo.org/1188976)."""
    names = ("neutral", "calm", "happy", "sad", "anger", "fear", "disgust", "surprise")
    codes = {f"{number:02d}": name for number, name in enumerate(names, start=1)}
    return _by_name(folder, r"\d\d-\d\d-(?P<label>\d\d)-\d\d-\d\d-\d\d-(?P<group>\d\d)", codes)


def tess(folder: Path) -> Iterator[Entry]:
    """TESS: `OAF_back_angry.wav` is speaker, word, emotion; ps is pleasant surprise (doi.org/10.5683/SP2/E8H2MF)."""
    codes = {"angry": "anger", "disgust": "disgust", "fear": "fear", "happy": "happy", "neutral": "neutral"}
    codes |= {"ps": "surprise", "sad": "sad"}
    return _by_name(folder, r"(?P<group>OAF?|YAF)_\w+_(?P<label>[a-z]+)", codes, groups=False)


def emodb(folder: Path) -> Iterator[Entry]:
    """EmoDB: `03a01Fa.wav`: speaker, text, letter of the German emotion, version (emodb.bilderbar.info)."""
    codes = {"W": "anger", "L": "boredom", "E": "disgust", "A": "fear", "F": "happy", "T": "sad", "N": "neutral"}
    return _by_name(folder, r"(?P<group>\d\d)[ab]\d\d(?P<label>[WLEAFTN])[a-z]", codes)


def meld(folder: Path) -> Iterator[Entry]:
    """MELD: train_, dev_ and test_sent_emo.csv, and `dia3_utt7.mp4` by split (affective-meld.github.io).

    Dialogues are groups; the splits are the published ones.
    """
    for table in sorted(folder.rglob("*_sent_emo.csv")):
        split = SPLITS[table.name.partition("_")[0]]
        clips = {path.stem: path for path in table.parent.rglob("dia*_utt*.mp4") if _split_of(path, folder) == split}
        for _, record in read_table(table):
            dialogue = record["Dialogue_ID"]
            path = clips.get(f"dia{dialogue}_utt{record['Utterance_ID']}")
            if path is not None:  # some clips of the release are missing
                yield Entry(path, record["Emotion"], f"{split} {dialogue}", record["Utterance"], split)


def mustard(folder: Path) -> Iterator[Entry]:
    """MUStARD: sarcasm_data.json (utterance, speaker, sarcasm), clips `1_60.mp4` (github.com/soujanyaporia/MUStARD)."""
    table = next(iter(sorted(folder.rglob("sarcasm_data.json"))), None)
    if table is None:
        raise InputError("no sarcasm_data.json here", where=str(folder), fix="Give the folder of the whole corpus.")
    clips = {path.stem: path for path in folder.rglob("*.mp4")}
    for name, about in json.loads(table.read_text(encoding="utf-8")).items():
        if name in clips:
            label = "sarcasm" if about["sarcasm"] else "not sarcasm"
            yield Entry(clips[name], label, about["speaker"], about["utterance"])


def iemocap(folder: Path) -> Iterator[Entry]:
    """IEMOCAP: lines `[6.29 - 8.23] Ses01F_impro01_F000 neu` of EmoEvaluation/*.txt, sentences (sail.usc.edu/iemocap).

    The four usual emotions, excitement counted as happiness. Sessions are groups.
    """
    codes = {"ang": "anger", "hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral"}
    sounds = {path.stem: path for path in folder.rglob("Ses*.wav")}
    for table in sorted(folder.rglob("EmoEvaluation/*.txt")):
        lines = table.read_text(encoding="latin-1")
        for name, code in re.findall(r"^\[[\d. -]+\]\t(\w+)\t(\w+)\t", lines, re.MULTILINE):
            if code in codes and name in sounds:
                yield Entry(sounds[name], codes[code], name[:5])


def mosei(folder: Path) -> Iterator[Entry]:
    """CMU-MOSEI: label.csv (video_id, clip_id, text, label from -3 to 3, mode), `Raw/VIDEO/CLIP.mp4`, as MMSA has it.

    The table is that of github.com/thuiar/MMSA; a label is the nearest of the seven classes that the corpus names,
    -3 highly negative to 3 highly positive. Videos are groups; the splits are the published ones.
    """
    table = next(iter(sorted(folder.rglob("label.csv"))), None)
    if table is None:
        raise InputError("no label.csv here", where=str(folder), fix="Give the folder with label.csv and Raw.")
    names = ("highly negative", "negative", "weakly negative", "neutral", "weakly positive", "positive")
    clips = {(path.parent.name, path.stem): path for path in folder.rglob("*.mp4")}
    for number, record in read_table(table):
        path = clips.get((str(record.get("video_id")), str(record.get("clip_id"))))
        if path is None:  # some clips of the release are missing
            continue
        try:
            value = min(max(round(float(record["label"])), -3), 3)
            split = SPLITS[record["mode"].strip().lower()]
        except (KeyError, TypeError, ValueError, AttributeError):
            fix = "Write a label from -3 to 3, and train, valid or test as the mode."
            raise InputError("no label or mode", where=f"{table}:{number}", fix=fix) from None
        label = (*names, "highly positive")[value + 3]
        yield Entry(path, label, record["video_id"], _text(record.get("text")) or None, split)


LAYOUTS: Mapping[str, Callable[[Path], Iterable[Entry]]] = {
    "cremad": cremad, "ravdess": ravdess, "tess": tess, "emodb": emodb, "meld": meld, "mustard": mustard,
    "iemocap": iemocap, "mosei": mosei,
}  # fmt: skip
"""corpora whose own layout is read, by the name for --layout"""


def _by_name(folder: Path, pattern: str, codes: Mapping[str, str], *, groups: bool = True) -> Iterator[Entry]:
    """Files whose whole stem is `pattern`; others are none of the corpus. Raises InputError where there is none."""
    found = False
    for path in media_below(folder):
        match = re.fullmatch(pattern, path.stem)
        if match is not None and match["label"] in codes:
            found = True
            yield Entry(path, codes[match["label"]], match["group"] if groups else None)
    if not found:
        what = "no file has a name as this corpus has them"
        raise InputError(what, where=str(folder), fix="Check the folder and --layout (hba atlas build --list).")


def _split_of(path: Path, folder: Path) -> str | None:
    """The split that a folder on the way to a file is named by: train_splits, dev, output_repeated_splits_test."""
    for part in path.relative_to(folder).parts[:-1]:
        for name, split in SPLITS.items():
            if re.search(rf"(?<![a-z]){name}(?![a-z])", part.lower()):
                return split
    return None
