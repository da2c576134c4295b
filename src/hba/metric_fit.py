"""Which metric of a task suits which rows. Said when a taxonomy is read, not by a score that cannot be made later."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hba.errors import TaxonomyError

if TYPE_CHECKING:
    from hba.taxonomy import Dataset

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
