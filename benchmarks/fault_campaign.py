"""Damaged media and row files through the public surface: what is refused, served, served altered; what crashes, hangs.

    python benchmarks/fault_campaign.py [--media 500] [--rows 200] [--seed 0] [--json]

Each medium is loaded by `hba.open_atlas(...)[i].load_*` in a process of its own (30 s, 1.5 GB), and all of them, intact
ones between them, by `load_batches` with two workers, whose quarantine must name exactly the refused ones. Exits 1 on a
crash, a hang, an error that is not hba's, a bad medium that quarantine.jsonl does not name, and on a served medium that
differs from the intact one, unless no reader could tell (`may_alter`: flipped bits in coded data without a checksum).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import PIL.Image
import soundfile
import torch

import fault_headers
import fault_loader
import fault_media
import fault_rows
import fault_sandbox
import hba
from hba.errors import HbaError, MediaError

OUTCOMES = ("refused", "identical", "altered", "crashed", "hung", "failed")


class Result(NamedTuple):
    """What became of one damaged thing; `problem` says why it fails the campaign, if it does."""

    kind: str
    corruption: str
    outcome: str
    seconds: float
    megabytes: float
    problem: str


def check_intact(media: dict[str, bytes]) -> dict[str, str]:
    """Digests of the intact media as hba serves them, each compared with a plain full decode first."""
    digests = {}
    for kind, data in media.items():
        served, digests[kind] = fault_loader.load(kind, data)
        _compare(kind, data, served)
        if kind in fault_media.CHAINED:
            digests[f"{kind} twice"] = fault_loader.twice(served)
    return digests


def _compare(kind: str, data: bytes, served: Any) -> None:
    field = fault_media.FIELDS[kind]
    if field == "images":
        np.testing.assert_array_equal(served, np.array(PIL.Image.open(io.BytesIO(data)).convert("RGB")))
    elif field == "videos":
        with av.open(io.BytesIO(data)) as container:
            frames = {float(f.pts * f.time_base): f.to_ndarray(format="rgb24") for f in container.decode(video=0)}
        for seconds, pixels in zip(served.timestamps_seconds, served.frames, strict=True):
            np.testing.assert_array_equal(pixels, frames[float(seconds)])
    elif kind in ("wav", "flac", "mp3", "ogg"):
        np.testing.assert_allclose(served.samples, soundfile.read(io.BytesIO(data), dtype="float32")[0], atol=1e-6)
    elif field == "audios":
        assert abs(served.seconds - 1) < 0.05 and 0.1 < np.abs(served.samples).max() < 0.6
    elif kind == "pt":
        assert all(torch.equal(served[name], t) for name, t in torch.load(io.BytesIO(data)).items())


def run_media(folder: Path, count: int, seed: int) -> list[Result]:
    """The media of the campaign: each alone, then all through the loader."""
    media = fault_media.make_media()
    intact = check_intact(media)
    items = list(fault_media.damaged(media, count, seed))
    rows = fault_loader.write_atlas(folder, items, media)
    atlas = hba.open_atlas(folder, "train")
    verdicts = [fault_sandbox.run(partial(fault_loader.serve, atlas[row])) for row in rows.damaged]
    results = []
    for item, verdict in zip(items, verdicts, strict=True):
        acceptable = {intact[kind] for kind in item.may_show}
        results.append(_judge(item, verdict, acceptable, str(folder / "train.jsonl")))
    if any(verdict.kind == "failed" for verdict in verdicts):
        return results  # an error that is not hba's ends the loader, too
    loaded = fault_loader.run_loader(atlas, folder / "run")
    for row, item, verdict in zip(rows.damaged, items, verdicts, strict=True):
        problem = _loader_problem(atlas[row], verdict, loaded)
        if problem:
            results.append(Result(item.kind, f"{item.corruption} (loader)", "failed", 0.0, 0.0, problem))
    for row, kind in rows.intact.items():
        if loaded.served.get(atlas[row].id) != intact[kind]:
            problem = f"intact row {row}: {loaded.quarantined.get(atlas[row].id, 'served otherwise')}"
            results.append(Result(kind, "intact (loader)", "failed", 0.0, 0.0, problem))
    megabytes = max(loaded.megabytes, default=0.0)
    print(f"loader: {len(loaded.served)} rows served, {len(loaded.quarantined)} in quarantine.jsonl, at most", end=" ")
    print(f"{megabytes:.0f} MB and {max(loaded.seconds, default=0.0):.1f} s a row")
    return results


def _loader_problem(sample: Any, alone: fault_sandbox.Verdict, loaded: fault_loader.Loaded) -> str:
    """How the loader's verdict on a sample differs from the one that it got alone; empty if it does not."""
    if alone.kind != "done":
        return ""  # told already
    record = loaded.quarantined.get(sample.id)
    if alone.value.refused is None:
        return "" if loaded.served.get(sample.id) == alone.value.digest else f"{sample.where}: the loader says {record}"
    if record is None:
        return f"{sample.where}: is not in quarantine.jsonl"
    named = f"{record['where']}: {record['reason']}"
    return "" if alone.value.refused.startswith(named) and record["field"] in named else f"quarantine says {record}"


def _judge(item: fault_media.Damaged, verdict: fault_sandbox.Verdict, acceptable: set[str], file: str) -> Result:
    outcome, problem = verdict.kind, verdict.reason
    if verdict.kind == "done":
        answer = verdict.value
        if answer.refused is not None:
            outcome = "refused"
            named = answer.refused.startswith(f"{file}:") and f", {fault_media.FIELDS[item.kind]}: " in answer.refused
            problem = "" if named else f"the refusal names no place: {answer.refused}"
        else:
            outcome = "identical" if answer.digest in acceptable else "altered"
            problem = "is served altered" if outcome == "altered" and not item.may_alter else ""
    if fault_headers.MARKER.exists():
        fault_headers.MARKER.rmdir()
        problem = "its code was executed"
    problem = f"medium {item.number}: {problem}" if problem else ""
    return Result(item.kind, item.corruption, outcome, verdict.seconds, verdict.megabytes, problem)


def run_rows(folder: Path, count: int, seed: int) -> list[Result]:
    """The row files of the campaign, each opened and read to its end, media included."""
    files = fault_rows.RowFiles(folder / "intact")
    expected = {}
    for kind, contents in files.intact.items():
        expected[kind] = _read(_write(folder / kind, contents)).rows
    assert all(rows == expected["jsonl"] and len(rows) == fault_rows.ROWS for rows in expected.values())
    results = []
    for item in files.damaged(count, seed):
        place = _write(folder / f"damaged {item.number}", item.files)
        verdict = fault_sandbox.run(partial(_read, place))
        outcome, problem = verdict.kind, verdict.reason
        if verdict.kind == "done":
            outcome, problem = _judge_rows(item, verdict.value, expected[item.kind], place)
        problem = f"row file {item.number} of seed {seed}: {problem}" if problem else ""
        results.append(Result(item.kind, item.corruption, outcome, verdict.seconds, verdict.megabytes, problem))
    return results


class _Read(NamedTuple):
    rows: list[Any]
    refused: str | None


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def _read(folder: Path) -> _Read:
    """All rows of an atlas with their sounds; a row whose sound is refused has the refusal in its place."""
    rows: list[Any] = []
    try:
        atlas = hba.open_atlas(folder, "train")
        for sample in atlas:
            fields = tuple(getattr(sample, name) for name in (*fault_rows.TEXT, "label"))
            rows.append((*fields, *_sounds(sample.load_audios)))
        len(atlas.fingerprint), atlas.estimated_tokens.sum()
    except HbaError as error:
        return _Read(rows, str(error))
    return _Read(rows, None)


def _sounds(load: Callable[[], list[Any]]) -> list[str]:
    try:
        return [hashlib.sha256(sound.samples.tobytes()).hexdigest() for sound in load()]
    except MediaError as error:
        return [f"refused: {error.what}"]


def _judge_rows(item: fault_rows.DamagedFile, read: _Read, expected: list[Any], folder: Path) -> tuple[str, str]:
    """Outcome and problem of a file that was read to its end or refused."""
    if read.refused is not None:
        return "refused", "" if read.refused.startswith(str(folder)) else f"names no file: {read.refused}"
    if read.rows == expected:
        return "identical", ""
    unlike = [row for row in read.rows if row not in expected]
    if len(read.rows) == len(expected) and all(str(row[-1]).startswith("refused") for row in unlike):
        return "refused", ""  # a medium, which the loader quarantines
    if not item.may_alter:
        return "altered", f"is served altered: {unlike[:1]}"
    verdict = fault_sandbox.run(partial(fault_rows.reference_rows, folder))
    if verdict.kind != "done":
        return "altered", f"is served, although no other reader takes it ({verdict.reason.splitlines()[0]})"
    texts = [tuple(row.get(name) for name in fault_rows.TEXT) for row in verdict.value]
    said = [row[: len(fault_rows.TEXT)] for row in read.rows]
    return "altered", "" if said == texts else "is served other than its bytes say"


def print_table(results: list[Result]) -> None:
    """Kind and corruption against what became of them."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.kind, result.corruption].append(result)
    print(
        f"{'kind':<12}{'corruption':<18}" + "".join(f"{name:>10}" for name in OUTCOMES) + f"{'max s':>8}{'max MB':>8}"
    )
    for (kind, corruption), group in sorted(groups.items()):
        counts = Counter(result.outcome for result in group)
        print(f"{kind:<12}{corruption:<18}" + "".join(f"{counts[name] or '':>10}" for name in OUTCOMES), end="")
        print(f"{max(r.seconds for r in group):>8.2f}{max(r.megabytes for r in group):>8.0f}")


def main() -> int:
    """Run the campaign; 1 when it finds a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=int, default=500)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the counts as one line of JSON at the end")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = run_media(Path(folder, "media"), options.media, options.seed)
        results += run_rows(Path(folder, "rows"), options.rows, options.seed)
    print_table(results)
    problems = [f"{r.kind}, {r.corruption}: {r.problem}" for r in results if r.problem]
    for problem in problems:
        print(f"FAULT {problem}")
    totals = Counter(result.outcome for result in results)
    print(f"{len(results)} damaged: " + ", ".join(f"{totals[name]} {name}" for name in OUTCOMES), end="; ")
    print(f"{len(problems)} faults; {time.monotonic() - start:.0f} s")
    if options.json:
        altered = Counter(f"{r.kind}, {r.corruption}" for r in results if r.outcome == "altered")
        print(json.dumps({"counts": totals, "altered": altered, "problems": problems}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
