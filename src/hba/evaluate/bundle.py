"""A bundle: what a reader needs to believe a result, in one zip; and whether its numbers follow from what is in it.

`pack` puts predictions, metrics, verdicts, the records of the run, the prompts and their hashes into a file whose bytes
depend on the run alone. No media go in; absolute paths become names, and what looks like a key is taken out.
`verify` believes nothing that it is given: names are a fixed list, so that no path leads anywhere; what an entry says
of its size is a limit of what is read; links, repeated names and entries that unpack to far more than they should are
refused. Then everything is computed again: labels from the words, verdicts, scores, intervals.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hba.batch.prompt import AnswerFormat
from hba.environment import hba_version
from hba.errors import InputError
from hba.evaluate.answers import read
from hba.evaluate.predictions import (
    JUDGE_SETTINGS,
    JUDGEMENTS,
    PREDICTIONS,
    READING_VERSION,
    Prediction,
    read_predictions,
    was_cut,
)
from hba.evaluate.results import FILE as METRICS
from hba.evaluate.runs import ASKED, QUARANTINE, Run, open_run
from hba.evaluate.score import PREDICTED, left_out_of, score_run
from hba.storage import atomic_write, json_line, plural, read_json, read_jsonl, temporary_folder
from hba.taxonomy import FILE as TAXONOMY
from hba.taxonomy import of_folder

MANIFEST, PROMPTS, FORMAT, ENVIRONMENT, TRAINING = (
    *("bundle.json", "prompts.jsonl", "format.jinja", "environment.json", "training.yaml"),
)
FILES = (METRICS, PREDICTIONS, ASKED, JUDGEMENTS, JUDGE_SETTINGS, QUARANTINE, TAXONOMY, PROMPTS, FORMAT, ENVIRONMENT)
NAMES = frozenset((MANIFEST, TRAINING, *FILES))
VERSION = 1
MOST_BYTES = 2 << 30
"""of all files of a bundle together, unpacked"""
MOST_RATIO, SMALL_BYTES = 200, 16 << 20
"""a file above so many bytes may not be so many times as large as it is packed"""
MOST_RESAMPLES = 100_000
_BLOCK = 1 << 20
_WRITTEN = (1980, 1, 1, 0, 0, 0)
_NAME = r"[^\s\\/:\"'<>|,;()\[\]{}]"
_PATH = re.compile(rf"(?<![\w/.~])(?:file://[\w.-]*)?(?:~|[A-Za-z]:|\.\.?)?[\\/](?:{_NAME}+[\\/])+({_NAME}*)")
_IS_PATH = re.compile(r"(?:file://[\w.-]*)?(?:~|[A-Za-z]:|\.\.?)?[\\/](?:[^\\/:\"<>|\n]+[\\/])+([^\\/:\"<>|\n]*)")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_SECRET = re.compile(
    r"\b(?:sk|pk|key|rk)-[\w*.-]{6,}|\bhf_\w{8,}|\bgh[pousr]_\w{8,}|\bAIza[\w-]{20,}|\bxox[a-z]-[\w-]{8,}"
    r"|(?i:bearer)\s+[\w.~+/-]{8,}=*"
)
_SECRET_NAME = re.compile(r"(?:^|[_-]|API)(?:KEY|TOKEN|SECRET|PASSWORD)$")
# What is of the machine that scored, and words of errors, from which paths are gone.
_UNSAID = frozenset(("created_at", "hba_version", "command", "model", "failures"))


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What came out: `differs` names the first thing that does not follow, None where all does; `checked` says what was
    computed again, `notes` what could not be."""

    bundle: str
    run: str
    differs: str | None
    checked: tuple[str, ...]
    notes: tuple[str, ...]


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(run: Path, out: Path, *, atlas: str | None = None, prompts: bool = True) -> list[str]:
    """Write the bundle `out` of a scored run, and return what a reader of it should know.

    Prompts are read from `atlas`, by default where the run says that it lay; without it the bundle has none. Raises
    InputError for a run that is not scored, whose predictions have changed since, or that has rows of another atlas.
    """
    opened = open_run(run)
    if not opened.has(METRICS) and not opened.predictions_path.is_file():
        fix = "Give the folder of a run that was predicted and scored, such as hba eval makes."
        raise InputError("is no run: it holds no predictions", where=str(run), fix=fix)
    if not opened.has(METRICS):
        raise InputError("is not scored", where=str(run), fix=f"Run hba score {run} first.")
    if opened.stale:
        raise InputError("its predictions have changed since it was scored", where=str(run), fix="Run hba score again.")
    notes: list[str] = []
    contents = {name: data for name, data in _contents(opened, notes, atlas, prompts=prompts) if data is not None}
    manifest = {
        "version": VERSION,
        "hba_version": hba_version(),
        "run": opened.name,
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in sorted(contents.items())},
    }
    contents[MANIFEST] = _plain(manifest)
    with atomic_write(out, "wb") as handle, zipfile.ZipFile(handle, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name, _WRITTEN)
            entry.external_attr, entry.create_system = (stat.S_IFREG | 0o644) << 16, 3
            packed.writestr(entry, contents[name], zipfile.ZIP_DEFLATED, 9)
    return notes


def _contents(run: Run, notes: list[str], atlas: str | None, *, prompts: bool) -> Iterator[tuple[str, bytes | None]]:
    folder = run.folder
    lines = (record for _, record in read_jsonl(run.predictions_path))
    yield PREDICTIONS, _lines(record | {"error": cleaned(record.get("error"))} for record in lines)
    yield METRICS, _plain(cleaned(read_json(folder / METRICS)))
    for name in (ASKED, JUDGE_SETTINGS):
        yield name, _plain(cleaned(read_json(run.root / name))) if (run.root / name).is_file() else None
    if run.has(JUDGEMENTS):
        yield JUDGEMENTS, _lines(cleaned(record) for _, record in read_jsonl(folder / JUDGEMENTS))
    # Those that count: a training in the same folder may have left out others.
    left_out = [vars(entry) for entry in left_out_of(run, None if atlas is None else Path(atlas))]
    yield QUARANTINE, _lines(map(cleaned, left_out)) if left_out else None
    if (run.root / TAXONOMY).is_file():
        yield TAXONOMY, (run.root / TAXONOMY).read_bytes()
    if run.config is not None:
        yield TRAINING, str(cleaned(run.config)).encode()
    if run.environment is None:
        notes.append("the run does not say what it ran on: it was predicted by an older version")
    else:
        yield ENVIRONMENT, _plain(cleaned(run.environment))
    named = str((run.asked.get("identity") or {}).get("format", "")).split(" ")[0]
    if named:
        try:
            yield FORMAT, AnswerFormat(named).source.encode()
        except InputError:
            notes.append(f"the answer format {named} is not there any more")
    if not prompts:
        return
    try:
        asked = {key: row for key, row, _ in run.rows(atlas).said()}
        every = [*run.predictions, *run.unlabelled]
        said = ({"id": p.id, "problem": asked[p.id].problem} for p in sorted(every, key=lambda each: each.id))
        yield PROMPTS, _lines(said)
    except (InputError, KeyError) as error:
        if atlas is not None:
            raise
        why = error.what if isinstance(error, InputError) else "other rows"
        notes.append(f"the atlas cannot be opened ({why}): the bundle has no prompts; name it with --atlas")


def cleaned(value: Any) -> Any:
    """`value` (as JSON) without absolute paths, of which the last name stays, logins in addresses, and keys."""
    if isinstance(value, dict):
        hidden = {key for key, each in value.items() if isinstance(each, str) and _SECRET_NAME.search(str(key).upper())}
        return {str(cleaned(key)): "[key]" if key in hidden else cleaned(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(each) for each in value]
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if len(secret) >= 8 and _SECRET_NAME.search(name.upper()):
            value = value.replace(secret, "[key]")
    path = _IS_PATH.fullmatch(value)
    named = _PATH.sub(r"\1", value) if path is None else path[1]
    return _SECRET.sub("[key]", _LOGIN.sub("", named))


def _lines(records: Any) -> bytes:
    return "".join(json_line(dict(record)) for record in records).encode()


def _plain(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- unpacking --------------------------------------------------------------------------------------------------------


@contextmanager
def unpacked(bundle: Path) -> Iterator[Path]:
    """A folder with the files of a bundle, a run as `hba score` left it; gone afterwards.

    Raises InputError for what is no bundle, or not as its manifest says.
    """
    with temporary_folder("bundle") as folder:
        try:
            with zipfile.ZipFile(bundle) as packed:
                for entry in _entries(packed, bundle):
                    _unpack(packed, entry, folder / entry.filename, bundle)
        except FileNotFoundError:
            raise InputError("no such bundle", where=str(bundle), fix="Check the path.") from None
        except IsADirectoryError:
            fix = f"Pack it first, if it is a run: hba bundle {bundle}"
            raise InputError("is a folder, not a bundle", where=str(bundle), fix=fix) from None
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise _refused(bundle, f"is no zip that can be read ({error})") from None
        _check_manifest(folder, bundle)
        yield folder


def _refused(bundle: Path, what: str) -> InputError:
    return InputError(what, where=str(bundle), fix="Ask for a file that `hba bundle` wrote.")


def _entries(packed: zipfile.ZipFile, bundle: Path) -> list[zipfile.ZipInfo]:
    """The entries, checked before any is read."""
    entries, seen = packed.infolist(), set()
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.filename not in NAMES:
            raise _refused(bundle, f"holds {entry.filename[:80]!r}, which is no file of a bundle")
        if entry.filename in seen:
            raise _refused(bundle, f"holds {entry.filename} twice")
        if kind not in (0, stat.S_IFREG):
            raise _refused(bundle, f"{entry.filename} is a link or no file")
        if entry.flag_bits & 1:
            raise _refused(bundle, f"{entry.filename} is encrypted")
        # Of the others a read of a block may unpack to any size.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused(bundle, f"{entry.filename} is packed in another way than by DEFLATE")
        if entry.file_size > SMALL_BYTES and entry.file_size > MOST_RATIO * entry.compress_size:
            raise _refused(bundle, f"{entry.filename} unpacks to {entry.file_size:,} bytes of {entry.compress_size:,}")
        seen.add(entry.filename)
    if sum(entry.file_size for entry in entries) > MOST_BYTES:
        raise _refused(bundle, f"unpacks to more than {MOST_BYTES:,} bytes")
    return entries


def _unpack(packed: zipfile.ZipFile, entry: zipfile.ZipInfo, place: Path, bundle: Path) -> None:
    """Never more than the entry says of itself is written: a size that lies is refused when it is passed."""
    left = entry.file_size
    with packed.open(entry) as source, place.open("xb") as target:
        while block := source.read(_BLOCK):
            left -= len(block)
            if left < 0:
                raise _refused(bundle, f"{entry.filename} is longer than it says")
            target.write(block)
    if left:
        raise _refused(bundle, f"{entry.filename} is shorter than it says")


def _check_manifest(folder: Path, bundle: Path) -> None:
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    if not (folder / MANIFEST).is_file() or not {METRICS, PREDICTIONS, ASKED} <= there:
        raise _refused(bundle, f"lacks {MANIFEST}, {METRICS}, {PREDICTIONS} or {ASKED}")
    said = read_json(folder / MANIFEST)
    if not isinstance(said, dict) or not isinstance(said.get("files"), dict) or said.get("version") != VERSION:
        raise _refused(bundle, f"{MANIFEST} is of another version, or damaged")
    if set(said["files"]) != there:
        raise _refused(bundle, f"holds other files than {MANIFEST} says")


class Shown(NamedTuple):
    """Bundles whose numbers follow, unpacked, by the name of a page; and what is wrong with the others."""

    runs: dict[str, Path]
    bundles: dict[str, Path]
    refused: list[str]
    notes: dict[str, tuple[str, ...]]
    """what of a bundle was not verified"""


@contextmanager
def pages_of(bundles: Sequence[Path]) -> Iterator[Shown]:
    """The bundles, each verified; their folders are gone afterwards."""
    with ExitStack() as stack:
        shown = Shown({}, {}, [], {})
        for bundle in bundles:
            try:
                found = verify(bundle)
                if found.differs is not None:
                    shown.refused.append(f"{bundle}: the numbers do not follow. {found.differs}")
                    continue
                name = re.sub(r"[^\w.-]+", "-", bundle.stem).strip("-.") or "run"
                if name in shown.runs or name.lower() == "index":
                    name = f"{name}-{len(shown.runs) + 1}"
                shown.runs[name], shown.bundles[name] = stack.enter_context(unpacked(bundle)), bundle
                shown.notes[name] = found.notes
            except InputError as error:
                shown.refused.append(str(error))
        yield shown


# --- verifying --------------------------------------------------------------------------------------------------------


def verify(bundle: Path, *, atlas: str | None = None) -> Verified:
    """Score a bundle again, and compare; with `atlas` also the rows with those that were asked.

    Raises InputError for a file that is no bundle, or a hostile one, and for one whose rows only `atlas` can group.
    """
    try:
        return _verified(bundle, atlas)
    except InputError:
        raise
    except MALFORMED as error:
        raise malformed(bundle, error) from None


MALFORMED = (AttributeError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)
"""what a reader of records raises for those of another shape than a run writes"""


def malformed(bundle: Path, error: Exception) -> InputError:
    """The refusal of a bundle whose records are not as a run writes them."""
    what = f"its records are not as a run writes them ({type(error).__name__}: {str(error)[:200]})"
    return _refused(bundle, what)


def _verified(bundle: Path, atlas: str | None) -> Verified:
    with unpacked(bundle) as folder:
        checked: list[str] = []
        notes: list[str] = []
        manifest = read_json(folder / MANIFEST)

        def done(differs: str | None) -> Verified:
            how: dict[str, Any] = {"checked": tuple(checked), "notes": tuple(notes)}
            return Verified(bundle=str(bundle), run=str(manifest.get("run")), differs=differs, **how)

        for name, said in manifest["files"].items():
            if not isinstance(said, dict) or _sha256((folder / name).read_bytes()) != said.get("sha256"):
                return done(f"{name} is not the file that was packed (another hash)")
        checked.append("hashes")
        try:
            said = read_json(folder / METRICS)
        except InputError as error:
            raise _refused(bundle, f"{METRICS} is {error.what}") from None
        try:
            predictions = read_predictions(folder / PREDICTIONS, of_folder(folder))
            found = _asked_differs(folder, notes) or _ran_differs(folder, checked, notes)
            found = found or _label_differs(folder, predictions, checked, notes)
            if found is None and atlas is not None:
                found = _atlas_differs(folder, predictions, atlas)
                checked.append("rows of the atlas")
            if found is not None:
                return done(found)
            again = _scored_again(folder, said, atlas, notes, bundle)
        except InputError as error:
            if error.where in (atlas, str(bundle)):
                raise
            return done(f"cannot be scored again: {error.what} ({error.where.replace(f'{folder}/', '')})")
        checked.append("scores")
        return done(_first_difference(said, cleaned(again)))


def _scored_again(
    folder: Path, said: Mapping[str, Any], atlas: str | None, notes: list[str], bundle: Path
) -> dict[str, Any]:
    """Nothing that the bundle names is opened: rows are those of `atlas` alone."""
    scoring = (said.get("provenance") or {}).get("scoring") or {}
    clusters = scoring.get("clusters")
    field = "none" if clusters is None else str(clusters.get("field"))
    by = [name for name in said.get("aggregate", {}).get("breakdowns") or {} if name not in ("modality", "language")]
    if atlas is None and by:
        notes.append(f"scores by {', '.join(by)} need the rows: name them with --atlas")
    how: dict[str, Any] = {name: scoring[name] for name in ("resamples", "seed", "published") if name in scoring}
    how["cluster"] = "auto" if field == "group" else field
    if type(times := how.get("resamples", 0)) is not int or times > MOST_RESAMPLES:
        raise _refused(bundle, f"its intervals are of {str(times)[:80]!r} resamples, not of {MOST_RESAMPLES:,} at most")
    if atlas is None and field not in ("none", *PREDICTED):
        what = f"its intervals are over groups by {field[:80]!r}, which the rows say"
        raise InputError(what, where=str(bundle), fix="Name the rows with --atlas.")
    metrics = score_run(folder, by=by if atlas is not None else (), atlas=None if atlas is None else Path(atlas), **how)
    again = metrics.record()
    if atlas is None:
        for name in by:
            again["aggregate"]["breakdowns"][name] = said["aggregate"]["breakdowns"][name]
    return again


def _label_differs(folder: Path, predictions: list[Prediction], checked: list[str], notes: list[str]) -> str | None:
    """The first label that does not follow from what the model said, by the reading that this version knows."""
    taxonomy, prompts = of_folder(folder), {}
    if (folder / PROMPTS).is_file():
        prompts = {str(record.get("id")): str(record.get("problem")) for _, record in read_jsonl(folder / PROMPTS)}
    same = read_json(folder / ASKED).get("reading") == READING_VERSION
    unread = unruled = 0
    for p in predictions:
        if p.probs and p.label is not None and p.probs.get(p.label, -1.0) < max(p.probs.values()):
            return f"{PREDICTIONS}: {p.id} has the label {p.label!r}, which is not its most probable"
        if p.failed or p.output is None or (p.rule is None and p.probs):
            continue
        if p.rule is None and (p.answer, p.label) == (p.output, taxonomy.canonical_label(p.dataset, p.output)):
            continue  # the words are the answer, as those of a baseline are
        if p.rule is None or p.id not in prompts or not same:
            unread += 1
            unruled += p.rule is None
            continue
        _, answer, label = read(p.output, p.dataset, taxonomy, prompt=prompts[p.id], cut=was_cut(p.finish))
        if (answer, label) != (p.answer, p.label):
            said = (p.label or p.answer, label or answer)
            return f"{PREDICTIONS}: {p.id} is read as {said[0]!r}, and its words say {said[1]!r}"
    if unread:
        other = "was|were read by another version" if prompts and not same else "has|have no prompt in the bundle"
        ruleless = "says no rule by which it was read|say no rule by which they were read"
        kinds = {ruleless: unruled, other: unread - unruled}
        counted = [plural(count, "answer in words|answers in words", why) for why, count in kinds.items() if count]
        notes.append(f"{' and '.join(counted)}: labels are taken as they are")
    checked.append("labels")
    return None


def _ran_differs(folder: Path, checked: list[str], notes: list[str]) -> str | None:
    """Whether the record of what the rows were predicted on is of these rows."""
    ran = read_json(folder / ENVIRONMENT) if (folder / ENVIRONMENT).is_file() else {}
    predicted = [each for each in (ran, *ran.get("resumed", ())) if each.get("command") == "predict"]
    if not predicted:
        notes.append("the bundle does not say what the rows were predicted on")
        return None
    asked = (read_json(folder / ASKED).get("data") or {}).get("fingerprint")
    said = [(each.get("data") or {}).get("fingerprint") for each in predicted]
    if asked not in said:
        return f"{ENVIRONMENT}: is of a run over other rows ({said[-1]}) than {ASKED} says ({asked})"
    checked.append("environment")
    return None


def _asked_differs(folder: Path, notes: list[str]) -> str | None:
    """Whether the rows that were to be answered, and those that were not, are all that there were: who leaves out what
    was answered wrongly has to say so."""
    asked = read_json(folder / ASKED)
    rows = (asked.get("data") or {}).get("rows")
    if rows is None or asked.get("asked") is None:
        notes.append(f"{ASKED} does not say how many rows were to be answered: some may be left out")
        return None
    counted = _counted(asked).total()
    if rows != counted:
        return f"{ASKED}: the data have {rows:,} rows, and {counted:,} were asked for, skipped or without an answer"
    return None


def _counted(asked: Mapping[str, Any]) -> Counter[str]:
    """The rows of each dataset, answered or not."""
    kinds: list[Counter[str]] = [Counter(asked.get(name) or {}) for name in ("asked", "skipped", "unlabelled")]
    if any(type(number) is not int or number < 0 for kind in kinds for number in kind.values()):
        raise ValueError("a count of rows is no number")
    return sum(kinds, Counter())


def _atlas_differs(folder: Path, predictions: list[Prediction], atlas: str) -> str | None:
    """The first row that the atlas has in another way. Raises InputError where it cannot be opened."""
    from hba.atlas import open_atlas
    from hba.evaluate.predict import Selection

    asked = read_json(folder / ASKED)
    rows = Selection(**asked.get("selection") or {}).rows(open_atlas(atlas, split=asked.get("split")))
    known = {sample.id: sample for sample in rows}
    there = Counter(sample.dataset for sample in known.values())
    if asked.get("asked") is not None and (counted := _counted(asked)) != there:
        key = min(key for key in {*there, *counted} if there[key] != counted[key])
        return f"{ASKED}: {counted[key]:,} rows of {key}, and the atlas has {there[key]:,}"
    for p in predictions:
        sample = known.get(p.id)
        if sample is None:
            return f"{PREDICTIONS}: the atlas has no row {p.id}"
        target = sample.target if sample.answered else None
        if (sample.dataset, target) != (p.dataset, p.target):
            return f"{PREDICTIONS}: {p.id} has the target {p.target!r}, in the atlas {target!r}"
    if (folder / PROMPTS).is_file():
        for _, record in read_jsonl(folder / PROMPTS):
            sample = known.get(str(record.get("id")))
            if sample is None or sample.problem != record.get("problem"):
                return f"{PROMPTS}: {record.get('id')} was asked something else than the atlas says"
    if rows.fingerprint != (asked.get("data") or {}).get("fingerprint"):
        return "the atlas has another fingerprint than the one that was predicted"
    return None


def _first_difference(said: Any, again: Any, where: str = "") -> str | None:
    """The first place where two records differ; provenance of the machine that scored does not count."""
    if isinstance(said, dict) and isinstance(again, dict):
        for key in dict.fromkeys([*said, *again]):
            here = f"{where}.{key}" if where else str(key)
            if where in ("provenance", "aggregate") and key in _UNSAID:
                continue
            if key not in said or key not in again:
                return f"{here}: is {'not in the bundle' if key not in said else 'nothing that a score gives'}"
            if (found := _first_difference(said[key], again[key], here)) is not None:
                return found
        return None
    if isinstance(said, list) and isinstance(again, list) and len(said) == len(again):
        pairs = enumerate(zip(said, again, strict=True))
        return next((d for i, (a, b) in pairs if (d := _first_difference(a, b, f"{where}[{i}]")) is not None), None)
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (said, again))
    same = math.isclose(said, again, rel_tol=1e-9, abs_tol=1e-9) if numbers else said == again
    return None if same else f"{where}: {said!r} in the bundle, {again!r} when it is scored again"
