"""Which domains' heads are trained at the end of a stage. What another head says is noise: it is not scored.

A checkpoint's card names them; None stands for all, as of the checkpoints that the authors released.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hba.atlas import Atlas
from hba.atlas.sampler import Indices
from hba.errors import InputError
from hba.model import checkpoint
from hba.taxonomy import Taxonomy


def after_sft(train: Atlas, rows: Indices, start: str) -> list[str] | None:
    """Those of the `rows` of `train` that are trained on, and those of the checkpoint `start`, if there is one."""
    base = checkpoint.resolve(start)
    card: dict[str, Any] = {"columns": None} if base is None else checkpoint.read_card(base)
    known: list[str] | None = [] if card["columns"] is None else card.get("domains")
    if known is None:
        return None
    columns = train.columns
    codes = set(columns.dataset_codes[rows].tolist())
    return sorted({*known, *_domains(train.taxonomy, (columns.datasets[code] for code in codes))})


def require_trained(validation: Atlas, domains: list[str] | None) -> None:
    """Raise InputError when no row of `validation` belongs to a domain whose head is trained: no score is had."""
    columns = validation.columns
    found = _domains(validation.taxonomy, (columns.datasets[code] for code in set(columns.dataset_codes.tolist())))
    if domains is not None and not found & set(domains):
        what = f"its rows are of {', '.join(sorted(found))}, the trained heads of {', '.join(domains)}"
        fix = "Give training and validation rows of one domain at least: other datasets, or other splits."
        raise InputError(what, where=f"{validation.root}, split {validation.split}", fix=fix)


def after_bam(
    card: dict[str, Any], datasets: Iterable[str], taxonomy: Taxonomy, base: Path, *, heads: bool
) -> list[str] | None:
    """Those of the checkpoint `base` (`card` is its card), and those of `datasets` if the stage trains `heads`, too.

    Raises InputError for adapters alone before a head that was never trained.
    """
    known: list[str] | None = card.get("domains")
    if known is None:
        return None
    wanted = _domains(taxonomy, datasets)
    if not heads and (fresh := wanted - set(known)):
        fix = "Leave its datasets out (datasets=[...]), use stage=adapters+heads, or train its head first (train sft)."
        raise InputError(f"no head of {', '.join(sorted(fresh))} was trained", where=str(base), fix=fix)
    return sorted({*known, *wanted})


def _domains(taxonomy: Taxonomy, datasets: Iterable[str]) -> set[str]:
    return {domain for key in datasets if (domain := taxonomy.dataset(key).domain) is not None}
