"""A run's best model with its card and figures, to the Hugging Face hub or into a folder.

What is sent is put together in a folder first and goes out as one commit: the hub never shows half a model. Files that
the hub has already are not sent again, so that a broken push is simply repeated. The token is the library's
(`hf auth login`, HF_TOKEN); no error repeats what a server said, since that may hold it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData, constants
from huggingface_hub.errors import HfHubHTTPError

from hba.atlas.names import hub_id_of
from hba.errors import HbaError, InputError
from hba.evaluate.results import Metrics
from hba.evaluate.runs import Run, open_run
from hba.model import checkpoint
from hba.model.merge import merge_checkpoint, require_free
from hba.remote.request import proxies_checked, shown
from hba.report import words
from hba.storage import atomic_folder, temporary_folder, write_json
from hba.taxonomy import CARE, save_beside

ATLAS = "Human Behavior Atlas"
SYNTHETIC = "Human Behavior Atlas mini-atlas (synthetic)"
LOCAL = ("/", "./", "../", "file://")


# --- the card: README.md with the hub's metadata, model-index included, from what the run folder holds ----------------
#
# Nothing is claimed that is not in the folder: figures come from metrics.json with their intervals and chance levels, a
# synthetic atlas is called so, and the limits say what was left out. No path of this machine is written.


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
    body = words.page(
        "model_card.md.jinja",
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
        care=CARE,
        licences={} if synthetic else _licences(run),
        environment=run.environment or {},
        config=yaml.safe_load(run.config or "") or {},
        left_out=len(run.quarantine or ()),
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def _licences(run: Run) -> dict[str, str]:
    known = run.taxonomy.datasets
    return {name: known[name].licence for name in sorted(run.metrics.datasets) if name in known}


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
            metric_name=words.metric_name(task.metric),
            metric_value=task.score,
            metric_args={"ci95": list(task.ci95)} if task.ci95 is not None else None,
        )
        for key, task in metrics.tasks.items()
        if task.score is not None
    ]


def public_name(path: str) -> str:
    """A hub id as it is, and of a folder on this machine its name alone."""
    return Path(path).name if Path(path).is_absolute() or Path(path).exists() else path


# --- the push ---------------------------------------------------------------------------------------------------------


class Pushed(NamedTuple):
    """Where the model is now, and how many files were sent there."""

    place: str
    files: int


def push_run(run: Path, repo: str, *, license_id: str, merge: bool = False, private: bool = False) -> Pushed:
    """Send the best model of the scored run folder `run` to `repo`, a hub id or a new folder (./, / or file://).

    With `merge` LoRA is folded in first. Raises InputError when the run is not scored, the folder is taken, the hub
    refuses, or the model stands on a backbone that only this machine has.
    """
    if repo.startswith(LOCAL):
        out = Path(repo.removeprefix("file://"))
        require_free(out)
        with atomic_folder(out) as new:
            gather(run, new, place=out.name, license_id=license_id, merge=merge)
            return Pushed(str(out), sum(file.is_file() for file in new.rglob("*")))
    with temporary_folder("push") as folder:
        gather(run, folder, place=repo, license_id=license_id, merge=merge)
        return _commit(folder, repo, private=private)


def gather(run: Path, folder: Path, *, place: str, license_id: str, merge: bool) -> None:
    """Put model, card, figures and what the run adds to the taxonomy into `folder`; `place` is what others call it."""
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license_id) is None:
        fix = "Write it as the hub does: apache-2.0, cc-by-nc-4.0, other."
        raise InputError("no identifier of a licence", where=f"--license {license_id}", fix=fix)
    best = checkpoint.resolve(run)
    if best is None:
        raise InputError("a plain backbone: nothing to push", where=str(run), fix="Name a run folder.")
    loaded = open_run(run)
    loaded.metrics  # noqa: B018  an unscored run is refused before anything is copied
    card, base = checkpoint.read_card(best), checkpoint.base_of(best)
    if card["strategy"] != "full" and not merge and Path(base).is_dir():
        fix = "Push with --merge: the full model needs no backbone."
        raise InputError("the model stands on a backbone that others do not have", where=base, fix=fix)
    if merge:
        merge_checkpoint(best, folder / "merged")
        for file in (folder / "merged").iterdir():
            file.rename(folder / file.name)
        (folder / "merged").rmdir()
    else:
        of_training = shutil.ignore_patterns("optimizer*", "trainer_state.json")
        shutil.copytree(best, folder, dirs_exist_ok=True, ignore=of_training)
    sent = checkpoint.read_card(folder)
    write_json(folder / checkpoint.CARD, {**sent, "backbone": public_name(sent["backbone"])})
    save_beside(loaded.taxonomy, folder)
    shutil.copyfile(run / "metrics.json", folder / "metrics.json")
    text = model_card(loaded, place=place, base_model=card["backbone"], license_id=license_id, card=card)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _commit(folder: Path, repo: str, *, private: bool) -> Pushed:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
    api = HfApi()
    try:
        with proxies_checked():
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.create_commit(repo, operations, commit_message="Model, card and figures from hba")
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise _explained(error, repo) from None
    return Pushed(str(done.commit_url), len(files))


def _explained(error: Exception, repo: str) -> HbaError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        fix = "Run `hf auth login` with a token that may write there."
        return InputError(f"the hub does not let you write (status {status})", where=repo, fix=fix)
    if status is not None:
        return HbaError(f"the hub answered with status {status}", where=repo, fix="Run the same command again.")
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        return InputError(
            "not accepted as a repository or as its files",
            where=repo,
            fix="Use a name such as org/model, and a licence that the hub knows.",
        )
    fix = "Check the network and run the same command again: what has arrived is not sent again."
    return HbaError(f"the hub at {shown(constants.ENDPOINT)} cannot be reached", where=repo, fix=fix)
