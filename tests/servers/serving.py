"""What tests of `hba serve` share: a checkpoint that classifies and speaks, and a server for it in this process."""

import base64
import shutil
import threading
import time
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import torch
import uvicorn
from holding import PATIENCE

from hba.batch.config import EncodeConfig
from hba.batch.pool import DescriptorConfig
from hba.evaluate.desk import Desk
from hba.model import OmniSapiens
from hba.model.bam import AdapterSpec, Bam, save_bam
from hba.model.checkpoint import resolve
from hba.serve import Limits, create_app
from hba.serve import _Protocol as Protocol

ENCODE = EncodeConfig(num_frames=2, max_pixels=3136)


class Serving(NamedTuple):
    url: str
    desk: Desk
    client: httpx.Client
    gate: Any  # the app; its limits are read for each request

    def classify(self, path, **more):
        files = [{"name": path.name, "data": data_url("application/octet-stream", path.read_bytes())}]
        return self.client.post("/v1/classify", json={"files": files, "tasks": "EMO"} | more)


def data_url(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def write_checkpoint(folder, backbone):
    """Heads and words of a model that nobody has trained: what they say does not matter."""
    torch.manual_seed(1)
    model = OmniSapiens.from_pretrained(backbone)
    for head in model.heads.linear.values():
        torch.nn.init.normal_(head.weight)
    known = {"backbone": str(backbone), "strategy": "heads", "encode": ENCODE, "formats": ("plain",)}
    model.save_pretrained(folder, speaks=True, **known)
    return folder


def write_adapted(folder, checkpoint):
    """A checkpoint with adapters of cremad, over openSMILE's descriptors of sound, that nobody has trained."""
    shutil.copytree(resolve(str(checkpoint)), folder)
    hidden = next(iter(OmniSapiens.from_pretrained(str(checkpoint)).heads.linear.values())).in_features
    about = {"hidden": 8, "dropout": 0.0, "modality_dropout": 0.0, "layer_norm": True}
    torch.manual_seed(0)
    bam = Bam([AdapterSpec(dataset="cremad", dims={"audio": 176}, descriptors=DescriptorConfig(), **about)], hidden)
    for parameter in bam.parameters():
        torch.nn.init.normal_(parameter)
    save_bam(bam, folder)
    return folder


@contextmanager
def serving(model, folder, *, limits=None, token="secret", **more):
    """The server for a model on a free port."""
    limits = limits or Limits(seconds=PATIENCE)
    desk = Desk(str(model), folder=folder, **more)
    app = create_app(desk, limits=limits, token=token)
    # An idle connection is kept for longer than a busy machine takes from one request of a test to the next.
    how = {"http": Protocol, "ws": "none", "log_level": "error", "timeout_keep_alive": PATIENCE}
    server = uvicorn.Server(uvicorn.Config(app, port=0, **how))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=PATIENCE) as client:
            yield Serving(url, desk, client, app)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
    assert not thread.is_alive() and not desk.folder.exists()
