"""The parts of a report: loading, charts, matrices, the choice of samples, the terminal table."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import hba.report
from hba.errors import InputError
from hba.evaluate.ask import Reply
from hba.evaluate.predictions import Prediction
from hba.evaluate.results import TaskScore, parse_metrics
from hba.evaluate.runs import Event, open_run
from hba.report import words
from hba.report.charts import NO_LABEL, Reference, bar, curves, matrices, nice_axis, smooth, thin
from hba.report.page import choose, write_asked, write_report
from hba.report.tables import breakdown_tables, metrics_table

METRICS = {
    "tasks": {
        "HUM": {"score": 0.4, "metric": "weighted_f1", "ci95": [0.3, 0.55], "n": 9, "chance": 0.5},
        "EMO": {"score": 0.9, "metric": "mean_weighted_accuracy", "ci95": [0.8, 0.95], "n": 80, "datasets": ["tess"],
                "chance": 0.5, "n_invalid": 2, "n_quarantined": 1},
        "SOC": {
            "score": None, "metric": "llm_judge_accuracy", "ci95": None, "n": 7, "datasets": ["siq2"],
            "note": "not scored (needs a judge)",
        },
    },
    "datasets": {"tess": {"macro_f1": 0.88, "n": 80, "n_invalid": 2, "n_quarantined": 1}},
    "aggregate": {"mean": {"score": 0.65, "ci95": [0.6, 0.7]}, "n": 96},
    "provenance": {"synthetic": True, "split": "test"},
}  # fmt: skip


def _prediction(number: int, dataset: str = "urfunny", target: str = "humour", **other: object) -> Prediction:
    fields = {"output": None, "answer": None, "label": None, "error": None, **other}
    return Prediction(id=f"test/{number}", dataset=dataset, task="HUM", split="test", target=target, **fields)  # type: ignore[arg-type]


def _sure(number: int, probability: float, dataset: str = "urfunny") -> Prediction:
    """A humour sample whose true label has `probability`."""
    probs = {"humour": probability, "not humour": 1 - probability}
    return _prediction(number, dataset, label=max(probs, key=lambda label: probs[label]), probs=probs)


def _run(folder: Path, metrics: object = METRICS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_a_run_without_metrics_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.json.*hba score"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"EMO": {"score": "high", "metric": "x", "n": 1}}}, r"tasks\.EMO.*score"),
        ({"tasks": {"EMO": {"score": 0.5, "n": 1}}}, r"tasks\.EMO.*metric"),
        ({"tasks": []}, "'tasks' must be an object"),
        ({"aggregate": {"mean": {"score": 1, "ci95": [1]}}}, r"aggregate\.mean"),
    ],
)
def test_malformed_metrics_are_refused_by_field(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_report(_run(tmp_path, METRICS | change))
    assert not (tmp_path / "report.html").exists()


def test_a_missing_section_of_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'provenance' is missing"):
        parse_metrics({key: value for key, value in METRICS.items() if key != "provenance"}, where="m.json")


def test_a_broken_line_of_the_log_is_named(tmp_path: Path) -> None:
    (_run(tmp_path) / "log.jsonl").write_text(
        '{"step": 1, "kind": "train", "loss": 1.0}\n{"step": "two", "kind": "train"}\n'
    )
    with pytest.raises(InputError, match=r"log\.jsonl:2"):
        open_run(tmp_path).events  # noqa: B018


def test_tasks_come_in_the_order_of_the_taxonomy_and_nan_is_not_a_score() -> None:
    raw = json.loads(json.dumps(METRICS)) | {"aggregate": {"mean": {"score": float("nan"), "ci95": None}}}
    parsed = parse_metrics(raw, where="m.json")
    assert list(parsed.tasks) == ["EMO", "HUM", "SOC"]
    assert parsed.mean.score is None


def test_above_chance_needs_the_whole_interval_above() -> None:
    tasks = parse_metrics(METRICS, where="m.json").tasks
    assert [tasks[key].above_chance for key in ("EMO", "HUM", "SOC")] == [True, False, None]


def test_a_resumed_log_shows_each_step_once(tmp_path: Path) -> None:
    lines = [{"step": s, "kind": "train", "loss": loss} for s, loss in ((1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0))]
    (_run(tmp_path) / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = open_run(tmp_path).events
    assert [(event.step, event.loss) for event in events or ()] == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_quarantine_leaves_out_what_was_answered_after_all(tmp_path: Path) -> None:
    entries = [
        {"id": f"test/{n}", "where": "a.jsonl:1, audios", "field": "audios", "reason": "is empty"} for n in (1, 2)
    ]
    (_run(tmp_path) / "quarantine.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (tmp_path / "predictions.jsonl").write_text(json.dumps(_sure(1, 0.9).record()) + "\n")
    assert [entry.id for entry in open_run(tmp_path).quarantine or ()] == ["test/2"]


def test_a_bar_shows_score_interval_chance_and_reference() -> None:
    task = TaskScore(metric="weighted_f1", n=10, score=0.75, ci95=(0.6, 0.9), chance=0.5)
    svg = bar(task, name="HUM <b>", references=[Reference('"A" & B', 0.25)])
    assert 'width="75.0%"' in svg
    assert 'x1="60.0%" x2="90.0%"' in svg
    assert 'class="chance" x1="50.0%"' in svg
    assert 'cx="25.0%"' in svg and "&#34;A&#34; &amp; B, published: 0.250" in svg
    assert 'aria-label="HUM &lt;b&gt;: 0.75, 95% interval 0.60 to 0.90, chance 0.50"' in svg


def test_long_files_have_plain_seconds_and_files_of_one_name_their_folders(tmp_path: Path) -> None:
    ends = (99.5, 100.5, 12_000.0)
    windows = [(str(tmp_path / folder / "clip.mp4"), start, end)
               for folder in ("a", "b") for start, end in pairwise((0.0, *ends))]  # fmt: skip
    about = {"task": "SEN", "dataset": "mosei_senti", "answer": "positive", "probs": {"positive": 0.7}}
    replies = [Reply(file=file, start=start, end=end, **about) for file, start, end in windows]
    write_asked(replies, tmp_path / "page.html", model="m")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "99.5 to 100.5 s" in page and "100.5 to 12,000 s" in page and ">12,000 s<" in page and "e+" not in page
    assert "<h2>a/clip.mp4</h2>" in page and "<h2>b/clip.mp4</h2>" in page and str(tmp_path) not in page
    write_asked(replies[:1], tmp_path / "page.html", model="m")
    assert "<h2>clip.mp4</h2>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_axes_have_round_ticks_that_hold_the_data() -> None:
    for low, high in ((0.0, 2.37), (0.0, 2e-3), (0.0, 1.0), (-1.2, 7.0), (0.0, 0.0), (5.0, 5.0), (0.0, 130000.0)):
        axis = nice_axis(low, high)
        assert axis.low <= low and high <= axis.high
        assert 2 <= len(axis.ticks) <= 8
        assert len({axis.text(tick) for tick in axis.ticks}) == len(axis.ticks)
    assert nice_axis(0.0, 2.37).low == 0.0
    assert [nice_axis(0.0, 2e-3).text(v) for v in (0.0, 5e-4, 1.5e-3)] == ["0", "5e-4", "1.5e-3"]


def test_thinning_keeps_ends_and_mean_and_smoothing_keeps_constants() -> None:
    points = [(float(x), float(x % 7)) for x in range(10_000)]
    few = thin(points)
    assert len(few) == 400
    assert np.mean([y for _, y in few]) == pytest.approx(np.mean([y for _, y in points]))
    assert few[0][0] < 30 and few[-1][0] > 9970
    assert smooth([(0.0, 2.0), (1.0, 2.0), (2.0, 2.0)], 5) == [(0.0, 2.0), (1.0, 2.0), (2.0, 2.0)]
    assert smooth([(0.0, 0.0), (1.0, 3.0), (2.0, 6.0)], 3)[1] == (1.0, 3.0)


def test_curves_have_only_what_was_logged_and_count_losses_that_are_not_finite() -> None:
    events = [Event(step=1, kind="train", loss=2.0), Event(step=2, kind="train", loss=None),
              Event(step=2, kind="validation", metrics={"EMO": 0.4, "mean": 0.4, "HUM": None})]  # fmt: skip
    found = curves(events, parse_metrics(METRICS, where="m").tasks)
    assert [chart.title for chart in found.charts] == ["Loss", "Validation score, mean over tasks"]
    assert [chart.title for chart in found.tasks] == ["EMO"]
    assert 'class="chance"' in found.tasks[0].svg
    assert found.num_not_finite == 1


def test_matrix_rows_sum_to_their_samples_and_other_answers_have_a_column() -> None:
    predictions = [
        _prediction(1, label="humour"),
        _prediction(2, label="not humour"),
        _prediction(3, label=None),
        _prediction(4, target="not humour", label="not humour"),
        _prediction(5, dataset="siq2", target="they smile", answer="they smile"),
    ]
    (domain,) = matrices(predictions)
    assert domain.datasets == ()
    assert domain.pooled.columns == ("not humour", "humour", NO_LABEL)
    table = {row.target: [cell.count for cell in row.cells] for row in domain.pooled.rows}
    assert table == {"not humour": [1, 0, 0], "humour": [1, 1, 1]}
    assert domain.pooled.n == 4


def test_a_domain_with_several_datasets_has_a_matrix_for_each() -> None:
    predictions = [_prediction(1, "cremad", "sad", label="sad"), _prediction(2, "tess", "sad", label="fear")]
    (domain,) = matrices(predictions)
    assert [m.name for m in domain.datasets] == ["cremad", "tess"]
    assert domain.pooled.n == sum(m.n for m in domain.datasets) == 2


def test_worst_has_least_and_best_most_probability_of_the_truth_whatever_the_order() -> None:
    predictions = [_sure(n, p) for n, p in enumerate((0.1, 0.3, 0.02, 0.9, 0.99, 0.6))]
    for order in (predictions, predictions[::-1]):
        chosen = choose(order, num_each=2)
        assert [p.id for p in chosen.worst] == ["test/2", "test/0"]
        assert [p.id for p in chosen.best] == ["test/4", "test/3"]
        assert chosen.ranked


def test_every_dataset_has_a_place_before_one_has_two() -> None:
    other = _prediction(9, "mmsd", "sarcasm", label="not sarcasm", probs={"sarcasm": 0.45, "not sarcasm": 0.55})
    predictions = [*(_sure(n, 0.01 * n) for n in range(5)), other]
    assert [p.id for p in choose(predictions, num_each=3).worst] == ["test/0", "test/9", "test/1"]


def test_without_probabilities_the_choice_is_not_called_ranked_and_free_form_is_left_out() -> None:
    predictions = [_prediction(2, label="humour"), _prediction(1, label="not humour"), _prediction(3, dataset="siq2")]
    chosen = choose(predictions)
    assert not chosen.ranked
    assert [p.id for p in (*chosen.worst, *chosen.best)] == ["test/1", "test/2"]


def test_the_terminal_table_says_what_is_not_scored_and_reads_no_markup() -> None:
    raw = json.loads(json.dumps(METRICS))
    raw["tasks"]["[red]MINE[/red]"] = {"score": 0.5, "metric": "[bold]own", "ci95": None, "n": 3}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(metrics_table(parse_metrics(raw, where="m.json")))
    text = console.export_text()
    assert "synthetic" in text
    assert re.search(r"SOC  social reasoning.*not scored \(needs a judge\)", text)
    assert re.search(r"EMO  emotion recognition .* 0\.900 .* 0\.800–0\.950 .* 0\.500 .* 80 .* 2 .* 1 ", text)
    assert "[red]MINE[/red]" in text


def _luminance(rgb: tuple[float, ...]) -> float:
    linear = [v / 255 / 12.92 if v / 255 <= 0.03928 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _colour(text: str) -> tuple[float, ...]:
    if not text.startswith("#"):
        return tuple(map(float, text.split()))
    digits = text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:])
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))


def test_text_has_a_contrast_of_4_5_in_light_dark_and_print() -> None:
    style = (Path(hba.report.__file__).parent / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        colour = {name: _colour(value) for name, value in re.findall(r"--([a-z-]+): ([#\da-f ]+);", block)}
        for ink in ("ink", "muted", "accent", "good", "bad", "chance"):
            for ground in ("page", "card"):
                assert _contrast(colour[ink], colour[ground]) >= 4.5, (ink, ground)
        assert _contrast(colour["muted"], colour["soft"]) >= 4.5
        assert _contrast(colour["warn-ink"], colour["warn-page"]) >= 4.5
        for percent in range(1, 101):
            share = percent / 100
            cell = tuple(c * share + p * (1 - share) for c, p in zip(colour["cell"], colour["card"], strict=True))
            ink = colour["cell-high-ink" if share >= 0.76 else "cell-low-ink"]
            assert _contrast(ink, cell) >= 4.45, (percent, block)


def _slice(score: float) -> dict[str, object]:
    task = {"score": score, "ci95": [score - 0.1, score + 0.1], "n": 40, "metric": "weighted_f1"}
    return {"n": 40, "accuracy": score, "tasks": {"EMO": task}}


SLICED = {
    **METRICS,
    "aggregate": {
        **METRICS["aggregate"],
        "breakdowns": {
            "gen<b>der": {
                "slices": {"f": _slice(0.9), "m": _slice(0.6)},
                "gaps": {"EMO": 0.3},
            }
        },
        "calibration": {
            "all": {
                **{"n": 20, "ece": 0.15, "brier": 0.3, "log_loss": 0.5, "accuracy": 0.6, "confidence": 0.75},
                "bins": [{"low": 0.8, "high": 0.9, "n": 20, "confidence": 0.9, "accuracy": 0.6}],
            },
            "datasets": {},
        },
    },
}


def _shown(table: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_slices_and_reliability_are_on_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    _run(tmp_path, SLICED | {"provenance": {**METRICS["provenance"], "hba_version": "0"}})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "By gen&lt;b&gt;der" in html
    assert "Reliability: expected calibration error 0.150 over 20 predictions" in html
    assert "0.30</td>" in html  # the gap
    printed = " ".join(_shown(table) for table in breakdown_tables(parse_metrics(SLICED, where="m.json")))
    assert "By gen<b>der" in printed and "0.90" in printed
    assert "expected calibration error 0.150 over 20" in _shown(metrics_table(parse_metrics(SLICED, where="m.json")))


def test_a_report_without_probabilities_or_slices_has_no_such_section(tmp_path: Path) -> None:
    _run(tmp_path, METRICS | {"provenance": {**METRICS["provenance"], "hba_version": "0"}})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'id="calibration"' not in html and 'id="slices"' not in html


def test_a_minus_does_not_stand_beside_a_dash():
    assert words.interval((-0.448, -0.028)) == "-0.448…-0.028"
    assert words.interval((0.28, 0.448), 2) == "0.28–0.45"
