"""The model card of a run: README.md with the hub's metadata, model-index included, from what the run folder holds.

Nothing is claimed that is not in the folder: figures come from metrics.json with their intervals and chance levels, a
synthetic atlas is called so, and the limits say what was left out. No path of this machine is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hba.atlas.hub_id import hub_id_of
from hba.evaluate.results import Metrics
from hba.evaluate.runs import Run
from hba.report import words
from hba.report.html import environment
from hba.report.words import metric_name

ATLAS = "Human Behavior Atlas"
SYNTHETIC = "Human Behavior Atlas mini-atlas (synthetic)"


def model_card(run: Run, *, place: str, base_model: str, license_id: str, card: Mapping[str, Any]) -> str:
    """README.md for the model of `run`, as the hub reads it.

    `place` is the model's id on the hub or its folder's name, `license_id` an identifier of the hub such as apache-2.0,
    `card` the checkpoint's hba.json.
    """
    name, scope = place.rpartition("/")[2], run.metrics.provenance.scope
    data = (run.environment or {}).get("data") or {}
    synthetic = bool(data.get("synthetic") or run.metrics.provenance.synthetic)
    source = hub_id_of(str(data.get("path", "")))
    metadata = ModelCardData(
        base_model=base_model if public_name(base_model) == base_model else None,
        datasets=[source.repo] if source is not None else None,
        eval_results=evaluations(run.metrics, dataset=source.repo if source is not None else None, scope=scope),
        library_name="transformers",
        license=license_id,
        model_name=name,
        tags=["human-behavior-atlas", *(["synthetic"] if synthetic else [])],
    )
    body = (
        environment()
        .get_template("model_card.md.jinja")
        .render(
            name=name,
            place=place,
            scope=scope,
            base_model=public_name(base_model),
            license_id=license_id,
            card=card,
            metrics=run.metrics,
            warnings=words.warnings(run.metrics, stale=run.stale),
            data={**data, "path": public_name(str(data.get("path", "unknown")))},
            synthetic=synthetic,
            environment=run.environment or {},
            config=yaml.safe_load(run.config or "") or {},
            left_out=len(run.quarantine or ()),
        )
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def evaluations(metrics: Metrics, *, dataset: str | None, scope: str) -> list[EvalResult]:
    """The scores of metrics.json as entries of a model-index; tasks without a score have none.

    `dataset` is the hub id of the atlas, None for one that is not on the hub; `scope` is what `Provenance.scope` says.
    """
    synthetic = bool(metrics.provenance.synthetic)
    return [
        EvalResult(
            task_type="other",
            task_name=f"{key}, {task.title}".removesuffix(", "),
            dataset_type=dataset or "human_behavior_atlas",
            dataset_name=f"{SYNTHETIC if synthetic else ATLAS}: {', '.join(task.datasets)}",
            dataset_config=key,  # entries of the same dataset and configuration would be taken for one
            dataset_split=scope,
            metric_type=task.metric,
            metric_name=metric_name(task.metric),
            metric_value=task.score,
            metric_args={"ci95": list(task.ci95)} if task.ci95 is not None else None,
        )
        for key, task in metrics.tasks.items()
        if task.score is not None
    ]


def public_name(path: str) -> str:
    """A hub id as it is, and of a folder on this machine its name alone."""
    return Path(path).name if Path(path).is_absolute() or Path(path).exists() else path
