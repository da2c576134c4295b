"""How figures and names are put into words, and how words become a page: the same in every page and in the terminal.

A missing figure is a dash, never a zero. Pages load nothing: their style stands in them, and their text is escaped. A
name that a template misspells is an error, and what no HTML file may hold (control characters, lone surrogates) is
replaced, so that any text of an atlas or a run can be shown.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hba.evaluate.results import MAX_FAILED, Counts, Metrics, Provenance, TaskScore
from hba.storage import plural as plural  # templates say words.plural

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

HERE = Path(__file__).parent
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
DASH = "–"
STALE = "The predictions have changed since these scores were made: `hba score` makes them anew."
OTHER_ROWS = "The predictions are of other rows than the run was asked for: they are not its scores."
MAX_NAMED = 5
NEAR = 0.01  # readings of the same answers whose scores differ by less are shown once
METRIC_NAMES = {
    "binary_weighted_f1": "weighted F1, 2 classes",
    "mean_weighted_accuracy": "mean weighted accuracy",
    "weighted_f1": "weighted F1",
    "llm_judge_accuracy": "judge accuracy",
    "emotion_weighted_accuracy_mean": "weighted accuracy",
    "macro_f1": "macro F1",
}


def figure(value: float | None, decimals: int = 3) -> str:
    """A figure with fixed decimals."""
    return DASH if value is None else f"{value:.{decimals}f}"


def interval(ci95: tuple[float, float] | None, decimals: int = 3) -> str:
    """An interval as 'low–high', or 'low…high' where a minus would stand beside the dash."""
    if ci95 is None:
        return DASH
    between = DASH if min(ci95) >= 0 else "…"
    return between.join(f"{bound:.{decimals}f}" for bound in ci95)


def count(value: int | None) -> str:
    """A count with thousands separators."""
    return DASH if value is None else f"{value:,}"


def metric_name(metric: str) -> str:
    """The metric of metrics.json in words; a metric that is not the paper's keeps its own name."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def clusters(provenance: Provenance) -> str:
    """What the intervals took for independent."""
    if provenance.scoring is None:
        return "intervals as recorded"
    drawn = provenance.scoring.clusters
    if drawn is None:
        return "rows drawn alone"
    few = f"; few groups in {', '.join(drawn.few)}" if drawn.few else ""
    return f"rows of one {drawn.field} drawn together ({plural(drawn.groups, 'group')}{few})"


def not_scored(task: TaskScore) -> str:
    """Why a task has no score."""
    return task.note or "not scored"


def answered(counts: Counts) -> str:
    """The number of rows, with how many were asked for where some are missing: '337/1,012'."""
    return f"{counts.n:,}/{counts.n_asked:,}" if counts.n_missing else count(counts.n)


def endings(counts: Counts) -> str:
    """'12 cut off, 3 filtered', empty where answers ended by themselves, or nobody knows."""
    found = [f"{counts.n_cut:,} cut off"] if counts.n_cut else []
    return ", ".join([*found, *([f"{counts.n_filtered:,} filtered"] if counts.n_filtered else [])])


def warnings(metrics: Metrics, *, stale: bool = False) -> list[str]:
    """What a reader must know before any figure: rows that are missing or failed, intervals that rest on too little.

    `stale`: the predictions are no longer those that were scored.
    """
    total, found = metrics.aggregate, [STALE] if stale else []
    if total.n_missing:
        found.append(f"Only {total.rows} were answered: these are the scores of a part.")
    if total.other_rows:
        found.append(OTHER_ROWS)
    if total.n_failed:
        reason = f", most often: {shortened(total.failures[0].error)}" if total.failures else ""
        every = total.n_failed == total.n
        failed = f"All {total.n:,} rows failed" if every else f"{plural(total.n_failed, 'row')} failed"
        effect = "; the run has no score" if total.failed_share > MAX_FAILED else "; failed rows count as wrong"
        found.append(f"{failed}{reason}{effect}. Ask again: hba predict --retry-failed.")
    if total.unlabelled:
        of = ", ".join(f"{n:,} of {key}" for key, n in total.unlabelled.items())
        found.append(f"Without an answer, and in no score: {of}.")
    if endings(total):
        found.append(f"Answers that did not end by themselves: {endings(total)}.")
    for name, reading in total.readings.items():
        other = {
            key: score
            for key, score in reading.tasks.items()
            if score is not None and abs(score - (metrics.tasks[key].score or 0.0)) > NEAR
        }
        if other:
            shown = ", ".join(f"{key} {figure(score)}" for key, score in other.items())
            mean = f", mean {figure(reading.mean)}" if reading.mean is not None else ""
            found.append(f"By the strict {name} reading of the answers: {shown}{mean}; {reading.n_invalid:,} invalid.")
    if metrics.scant:
        found.append(scant({key: metrics.datasets[key].n_independent or 0 for key in metrics.scant}))
    return found


def scant(independent: Mapping[str, float]) -> str:
    """A warning that names what rests on so few independent rows, or groups, and on how many."""
    shown = [f"{key} ({number:.3g})" for key, number in independent.items()]
    more = f" and {len(shown) - MAX_NAMED} more" if len(shown) > MAX_NAMED else ""
    return f"Too few independent rows for an interval to be trusted: {', '.join(shown[:MAX_NAMED])}{more}."


def shortened(text: str, longest: int = 120) -> str:
    """The first line of a text, cut to `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def when(start: float | None, end: float | None) -> str:
    """A window as '5 to 10 s'; nothing where there is none."""
    return "" if start is None or end is None else f"{plain(start)} to {plain(end)} s"


def plain(value: float) -> str:
    """A figure such as '7.625', '100.5' or '12,000', never in powers of ten from 100 on."""
    return f"{value:.4g}" if value < 100 else f"{value:,.1f}".removesuffix(".0")


SHOWN_LABELS = 3


def likeliest(probs: Mapping[str, float] | None) -> str:
    """The most probable labels, such as 'happy 0.81, sad 0.11'."""
    ranked = sorted((probs or {}).items(), key=lambda pair: -pair[1])
    return ", ".join(f"{label} {share:.2f}" for label, share in ranked[:SHOWN_LABELS])


def span(seconds: float) -> str:
    """A length in the unit that suits it: '0.5 s', '12 s', '3 min', '2 h'."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.3g} min"
    hours = seconds / 3600
    return f"{hours:.3g} h" if hours < 100 else f"{hours:,.0f} h"


def size(num_bytes: int) -> str:
    """Bytes in the unit that suits them, of a thousand each."""
    if num_bytes < 1000:
        return f"{num_bytes:,} bytes"
    power = min((len(str(num_bytes)) - 1) // 3, 4)
    return f"{num_bytes / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


# --- pages ------------------------------------------------------------------------------------------------------------


def environment(*folders: Path) -> Environment:
    """Jinja over the templates of `folders` and of this package, with `words` and `style` at hand."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # tables in the terminal want none of it

    made = Environment(
        loader=FileSystemLoader([*folders, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals |= {"words": sys.modules[__name__], "style": style}
    return made


def page(template: str, **values: Any) -> str:
    """The template with these values."""
    return environment().get_template(template).render(**values)


def style(*files: str | Path) -> Markup:
    """Style sheets, of this package or by their paths, one after the other, to stand in a page."""
    from markupsafe import Markup

    return Markup("\n").join(Markup((HERE / file).read_text(encoding="utf-8")) for file in files)  # noqa: S704  our own


def _clean(value: Any) -> Any:
    if isinstance(value, str) and CONTROL.search(value):
        return type(value)(CONTROL.sub("\ufffd", value))
    return value
