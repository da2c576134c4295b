"""A checkpoint on the Hugging Face hub, as `hba push` sends it: told from a plain backbone by its hba.json.

The name is resolved to a commit once a process; everything after is of that commit. A hub that cannot be asked is an
error, since a checkpoint that is taken for a backbone would answer with heads that nothing has trained; what is in the
cache already decides without it, and so it does offline (HF_HUB_OFFLINE=1). Nothing of a repository is executed: only
the files below are fetched.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import httpx
from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hba.errors import InputError
from hba.remote.request import proxies_checked, shown

FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt", "*.yaml")


@cache
def hub_checkpoint(repo: str, revision: str | None, card: str) -> Path | None:
    """The checkpoint `repo` in the cache, downloaded first; None for a repository without the file `card`.

    None also for one that is not there or not shown, which whoever loads it as a backbone reports. Raises InputError
    when the hub cannot be reached or the download breaks off.
    """
    try:
        with proxies_checked():
            found = Path(hf_hub_download(repo, card, revision=revision))
            return Path(snapshot_download(repo, revision=found.parent.name, allow_patterns=list(FILES)))
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str):
            return None  # the card of a checkpoint is fetched first: a cache without one holds a backbone
        raise _unreachable(repo) from None
    except (HfHubHTTPError, httpx.HTTPError, OSError):
        raise _unreachable(repo) from None


def _unreachable(repo: str) -> InputError:
    what = f"no such folder on this machine, and the hub at {shown(constants.ENDPOINT)} gives no answer"
    fix = "Check name and network, then run the same again; with HF_HUB_OFFLINE=1 what was downloaded before is used."
    return InputError(what, where=repo, fix=fix)
