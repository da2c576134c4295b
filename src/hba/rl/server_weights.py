"""The policy's weights on a vLLM server: written to a folder that both see, then loaded by name.

LoRA: an adapter folder a version, loaded under a name of its own (`/v1/load_lora_adapter`), so that a server that does
not have this version cannot answer for it. Full: the whole model in the backbone's names, loaded in place while the
server is paused (`/pause`, which also empties its caches of prefixes and encoded media; `/collective_rpc` with
`reload_weights`; `/resume`). These have no name: a probe before and after shows that answers have changed where weights
have. Both need what the documentation of vLLM calls development mode; a server for users should not have it.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hba.errors import HbaError
from hba.model.chat import ChatModel
from hba.model.checkpoint import is_thinker, resolve_dtype
from hba.model.config import ModelConfig
from hba.model.merge import name_as_released, write_thinker
from hba.remote import ChatRequest, RemoteClient, RequestError, ServiceError
from hba.remote.request import TokenReply
from hba.storage import atomic_folder

LORA_START = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank RANK"
FULL_START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL, without --enable-lora"
PROBE_TOKENS = 32


def served_folder(run: Path, shared: str | None) -> Path:
    """Where the run in the folder `run` hands over its weights: there, or in a folder of its own below `shared`."""
    if shared is None:
        return run / "served"
    place = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]  # runs of one name stand in other folders
    return Path(shared) / f"hba-{run.name}-{place}"


class ServedWeights:
    """Keeps the weights of the server behind `client` those of `policy`. `name` is the model to ask for."""

    def __init__(self, client: RemoteClient, policy: ChatModel, config: ModelConfig, folder: Path) -> None:
        self._client, self._policy, self._config = client, policy, config
        self._folder = folder.resolve()
        self._mark = secrets.token_hex(4)  # a server may still have adapters of a run that was killed
        self._loaded: Path | None = None
        self._checksum: float | None = None
        self.name = ""

    async def renew(self, version: int) -> None:
        """Write the weights of `version` and let the server load them.

        Raises HbaError when the server refuses, or answers as before although weights have changed.
        """
        folder = self._folder / f"{self._mark}-{version}"
        with atomic_folder(folder) as new:
            self.write(new)
        if self._config.strategy == "lora":
            await self._load_adapter(folder)
        else:
            await self._load_full(folder)
        if self._loaded is not None and self._loaded != folder:
            shutil.rmtree(self._loaded, ignore_errors=True)
        self._loaded = folder

    def write(self, folder: Path) -> None:
        """Write what the server loads into `folder`: an adapter, or the whole model."""
        transformer = self._policy.transformer
        thinker = is_thinker(transformer.config)
        if self._config.strategy == "full" and thinker:
            write_thinker(transformer, folder, dtype=resolve_dtype(self._config.dtype))
            return
        transformer.save_pretrained(folder)
        if self._config.strategy == "lora" and thinker:
            name_as_released(folder, folder)

    def remove(self) -> None:
        """Remove what was written, here and by a run that was killed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _load_adapter(self, folder: Path) -> None:
        name, old = f"hba-{folder.name}", self.name
        body = {"lora_name": name, "lora_path": str(folder)}
        try:
            await self._client.call("POST", "/v1/load_lora_adapter", body)
        except RequestError as error:
            if "already been loaded" not in error.what:  # the reply to an attempt before was lost
                raise _refused(error, LORA_START) from None
        except ServiceError as error:
            raise _refused(error, LORA_START) from None
        self.name = name
        if old:
            with suppress(RequestError):  # a server that was started anew never had it
                await self._client.call("POST", "/v1/unload_lora_adapter", {"lora_name": old})

    async def _load_full(self, folder: Path) -> None:
        checksum = self._sum()
        changed = self._checksum is not None and self._checksum != checksum
        try:
            self.name = self.name or await self._base_model()
            before = await self._probe() if changed else None
            await self._client.call("POST", "/pause?mode=abort")
            try:
                reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                await self._client.call("POST", "/collective_rpc", reload)
            finally:
                await self._client.call("POST", "/resume")
        except (RequestError, ServiceError) as error:
            raise _refused(error, FULL_START) from None
        if before is not None and before == await self._probe():
            what = f"the server answers as before it was given the weights of {folder.name}"
            fix = "Use one server, not a proxy before several; start it anew, and run the same command again."
            raise HbaError(what, where=self._client.config.base_url or "", fix=fix)
        self._checksum = checksum

    @torch.no_grad()
    def _sum(self) -> float:
        """A number that tells weights apart, those that the policy trains."""
        trained = [p for p in self._policy.transformer.parameters() if p.requires_grad]
        return sum(float(parameter.double().abs().sum()) for parameter in trained)

    async def _base_model(self) -> str:
        models = (await self._client.call("GET", "/v1/models"))["data"]
        return str(next(model["id"] for model in models if not model.get("parent")))

    async def _probe(self) -> list[Any]:
        """Tokens and log-probabilities of one short greedy answer."""
        extra = {"model": self.name, "logprobs": True, "ignore_eos": True, "return_token_ids": True}
        request = ChatRequest(
            messages=[{"role": "user", "content": "How do people feel?"}],
            max_tokens=PROBE_TOKENS,
            temperature=0.0,
            extra=extra,
        )
        reply = await self._client.complete(request)
        assert isinstance(reply, TokenReply)  # the client speaks TokenChat
        return [(choice.token_ids, choice.logps) for choice in reply.choices]


def _refused(error: HbaError, start: str) -> HbaError:
    how = f"See its log, and how docs/rl.md starts it ({start} ...)."
    fix = f"The last checkpoint stands. {how} Then run the same command again."
    return HbaError(f"the server did not take the weights: {error.what}", where=error.where, fix=fix)
