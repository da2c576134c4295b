"""The taxonomy: published facts, one lookup from raw answer to index, extension without redefinition."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hba.errors import TaxonomyError
from hba.taxonomy import (
    BUILTIN,
    DATASETS,
    DOMAINS,
    NUM_CLASSES,
    TASKS,
    canonical_label,
    global_index,
    of_folder,
    save_beside,
)

CLASSIFIED = sorted(key for key, dataset in DATASETS.items() if dataset.domain)
IEMOCAP = {"datasets": {"iemocap": {"domain": "emotion", "labels": ["anger", "sad"]}}}


def test_ten_tasks_seven_domains_sixteen_datasets() -> None:
    assert list(TASKS) == ["SEN", "EMO", "HUM", "SAR", "ANX", "DEP", "PTSD", "SOC", "INT", "NVC"]
    assert (len(DOMAINS), len(DATASETS), NUM_CLASSES) == (7, 16, 25)
    assert [task.key for task in TASKS.values() if task.judged] == ["SOC", "INT", "NVC"]
    assert sorted(key for task in TASKS.values() for key in task.datasets) == sorted(DATASETS)
    assert all(DATASETS[key].task == task.key for task in TASKS.values() for key in task.datasets)
    assert DATASETS["chsimsv2"].language == "zh"
    assert DATASETS["cremad"].language == "en"


@pytest.mark.parametrize("dataset", CLASSIFIED)
def test_every_label_leads_to_its_own_index(dataset: str) -> None:
    domain = DOMAINS[str(DATASETS[dataset].domain)]
    for label, index in zip(domain.labels, domain.indices, strict=True):
        assert canonical_label(dataset, f"  {label.upper().replace(' ', '   ')}\n") == label
        assert global_index(dataset, label) == index
        assert BUILTIN.class_names[index] == label
    assert set(DATASETS[dataset].labels) <= set(domain.labels)


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(sorted(DATASETS)), st.text())
def test_any_text_is_a_label_of_the_domain_or_none(dataset: str, raw: str) -> None:
    label = canonical_label(dataset, raw)
    domain = DATASETS[dataset].domain
    assert label is None or label in DOMAINS[str(domain)].labels
    assert domain is not None or label is None


def test_booleans_mean_a_label_only_where_the_release_uses_them() -> None:
    assert [canonical_label("mmsd", raw) for raw in ("true", "No", "1", "f")] == [
        "sarcasm", "not sarcasm", "sarcasm", "not sarcasm",
    ]  # fmt: skip
    assert canonical_label("daicwoz", "Y") == "depression"
    for dataset in ("ptsd_in_the_wild", "mmpsy_anxiety", "cremad", "mosei_senti"):
        assert canonical_label(dataset, "true") is None


def test_neutral_has_one_index_per_domain() -> None:
    assert (global_index("cremad", "neutral"), global_index("meld_senti", "neutral")) == (11, 3)


def test_unknown_names_are_refused_with_what_is_known() -> None:
    with pytest.raises(TaxonomyError, match=r"unknown dataset 'cremat'.*Did you mean 'cremad'.*urfunny"):
        canonical_label("cremat", "anger")
    with pytest.raises(TaxonomyError, match=r"unknown label 'angre' for dataset 'cremad'.*Did you mean 'anger'"):
        global_index("cremad", "angre")
    with pytest.raises(TaxonomyError, match="unknown label"):
        global_index("siq2", "anger")


def test_the_published_tables_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        DATASETS["mine"] = DATASETS["cremad"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        DATASETS["cremad"].domain = "humour"  # type: ignore[misc]


def test_extension_adds_and_leaves_the_published_one_alone() -> None:
    task = {"name": "emotion recognition", "metric": "mean_weighted_accuracy", "datasets": ["iemocap"]}
    extended = BUILTIN.extended(
        IEMOCAP
        | {"tasks": {"EMO": task}, "synonyms": {"emotion": {"excited": "happy"}}}
        | {"domains": {"stress": {25: "no stress", 26: "stress"}}}
    )
    assert extended.tasks["EMO"].datasets == (*TASKS["EMO"].datasets, "iemocap")
    assert extended.canonical_label("iemocap", "Excited") == "happy"
    assert extended.canonical_label("iemocap", "joy") == "happy"
    assert extended.num_classes == 27
    assert extended.class_names[:25] == BUILTIN.class_names
    assert "iemocap" not in DATASETS
    assert canonical_label("cremad", "excited") is None
    assert BUILTIN.num_classes == 25


@pytest.mark.parametrize(
    ("metric", "domain"),
    [
        *(("weighted_f1", domain) for domain in ("multilabel", "qa")),
        *(("binary_weighted_f1", domain) for domain in ("emotion", "sarcasm", "multilabel")),
        *(("llm_judge_accuracy", domain) for domain in ("emotion", "multilabel")),
        *(("multilabel_macro_f1", domain) for domain in ("emotion", "qa")),
    ],
)
def test_a_metric_that_the_rows_cannot_have_is_refused_when_the_taxonomy_is_read(metric: str, domain: str) -> None:
    labels = ["x", "y"] if domain == "multilabel" else []
    entries = {
        "tasks": {"NEW": {"name": "x", "metric": metric, "datasets": ["mine"]}},
        "datasets": {"mine": {"domain": domain, "labels": labels}},
    }
    with pytest.raises(TaxonomyError, match=rf"task 'NEW': metric {metric} does not suit the .*'mine'.*Fix: Use "):
        BUILTIN.extended(entries)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"datasets": {"cremad": {"domain": "emotion", "labels": ["anger"]}}}, "already in the taxonomy"),
        ({"domains": {"emotion": {30: "x"}}}, "would redefine"),
        ({"domains": {"stress": {7: "stress"}}}, "indices from 25 on"),
        ({"datasets": {"new": {"domain": "emotions", "labels": []}}}, "Did you mean 'emotion'"),
        ({"datasets": {"new": {"domain": "emotion", "labels": ["angry"]}}}, "unknown label 'angry'"),
        ({"tasks": {"NEW": {"name": "x", "metric": "weighted_f1", "datasets": ["none"]}}}, "unknown dataset 'none'"),
    ],
)
def test_an_extension_that_contradicts_is_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(TaxonomyError, match=message):
        BUILTIN.extended(entries)


def test_a_file_beside_the_rows_extends_the_published_taxonomy(tmp_path: Path) -> None:
    assert of_folder(tmp_path) is BUILTIN
    path = tmp_path / "taxonomy.yaml"
    path.write_text("datasets:\n  iemocap: {domain: emotion, labels: [anger, sad]}\n")
    extended = of_folder(tmp_path)
    assert extended.dataset("iemocap").labels == ("anger", "sad")
    copy = tmp_path / "run"
    save_beside(extended, copy)
    for same in (of_folder(copy), pickle.loads(pickle.dumps(extended))):
        assert same.datasets == extended.datasets and same.added == extended.added
    path.write_text("datasets: [\n")
    with pytest.raises(TaxonomyError, match=r"taxonomy\.yaml: not a taxonomy"):
        of_folder(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 {k: v}\n" + "".join(f"a{n + 1}: &a{n + 1} {{<<: [{f'*a{n}, ' * 10}]}}\n" for n in range(12)),
        "licence: 2024-13-45",
        "datasets: " + "[" * 3_000_000,
        "domains: &d {x: *d}",
        "licence: !!timestamp now",
        "licence: !!bool maybe",
    ],
    ids=["merges", "no date", "deep", "itself", "no time", "neither"],
)
def test_a_file_of_a_stranger_neither_grows_nor_ends_in_a_traceback(tmp_path: Path, text: str) -> None:
    (tmp_path / "taxonomy.yaml").write_text(text)
    with pytest.raises(TaxonomyError, match="not a taxonomy"):
        of_folder(tmp_path)


def test_tasks_and_datasets_can_be_sent_to_workers() -> None:
    for value in (DATASETS["cremad"], TASKS["EMO"], DOMAINS["emotion"]):
        assert pickle.loads(pickle.dumps(value)) == value


UNSEEN = ["\ufeff", "\u200b", "\u200e", "\u2060", "\u00ad"]


@pytest.mark.parametrize("dataset", CLASSIFIED)
def test_full_width_letters_and_signs_that_nobody_sees_do_not_count(dataset: str) -> None:
    for label in DOMAINS[str(DATASETS[dataset].domain)].labels:
        wide = "".join(chr(ord(sign) + 0xFEE0) if "!" <= sign <= "~" else "\u3000" for sign in label.upper())
        for raw in (wide, *(f"{sign}{label}{sign} \u00a0" for sign in UNSEEN), f"{label[:2]}\u200b{label[2:]}"):
            assert canonical_label(dataset, raw) == label


def test_labels_of_an_own_taxonomy_are_compared_as_they_are_seen(tmp_path: Path) -> None:
    entries = {
        "domains": {"mood": {25: "\uff2f\uff2b", 26: "low\u200b mood"}},
        "datasets": {"diary": {"domain": "mood"}, "tags": {"domain": "multilabel", "labels": ["\uff21", "b"]}},
        "synonyms": {"mood": {"\ufefffine": "\uff2f\uff2b"}},
    }
    own = BUILTIN.extended(entries)
    assert [own.canonical_label("diary", raw) for raw in ("ok", "OK\u200b", "Fine", "low mood")] == [
        "\uff2f\uff2b", "\uff2f\uff2b", "\uff2f\uff2b", "low\u200b mood",
    ]  # fmt: skip
    assert own.canonical_label("tags", "\ufeff\uff22\uff0c a") == "\uff21, b"
