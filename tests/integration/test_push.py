"""`hba push`: a scored run becomes a model with a card, in a folder and on a hub that speaks the real endpoints."""

import base64
import hashlib
import json
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from typer.testing import CliRunner

from hba.batch.config import EncodeConfig
from hba.cli import app
from hba.errors import HbaError, InputError
from hba.evaluate.score import score_run
from hba.export.push import push_run
from hba.model import OmniSapiens, checkpoint
from hba.model.checkpoint import hub_checkpoint
from hba.model.config import ModelConfig
from hba.model.omni import apply_strategy
from hba.storage import write_json
from hba.taxonomy import DATASETS, of_folder

TOKEN = "hf_secretoftests"
COMMIT = "c" * 40
LICENSE = "apache-2.0"


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, backbone, tmp_path_factory):
    """A scored run folder, as training, prediction and scoring leave it."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    torch.manual_seed(0)
    config = ModelConfig(name=str(backbone), strategy=request.param, lora_r=4)
    model = apply_strategy(OmniSapiens.from_pretrained(backbone), config)
    best = folder / "checkpoints" / "step_5"
    model.save_pretrained(best, backbone=str(backbone), strategy=request.param, encode=EncodeConfig())
    (best / "optimizer-00000-of-00001.safetensors").write_bytes(b"state")
    write_json(best / "trainer_state.json", {"step": 5})
    write_json(folder / "checkpoints" / "best.json", {"step": 5, "score": 0.5})
    (folder / "config.yaml").write_text("model: {strategy: full}\ntrain: {epochs: 5, batch_size: 64}\n")
    data = {"path": "/home/someone/atlas", "fingerprint": "abc", "synthetic": True, "rows": 2100}
    write_json(folder / "environment.json", {"hba_version": "0.1.0", "seed": 0, "data": data})
    answers = {"tess": ("anger", "happy"), "mmsd": ("sarcasm", "not sarcasm")}
    lines = []
    for dataset, (one, other) in answers.items():
        for number in range(12):
            said = one if number % 3 else other
            record = {"id": f"{dataset}/{number}", "dataset": dataset, "task": "emotion_cls", "split": "test"}
            record |= {"target": one if number % 2 else other, "output": said, "answer": said, "label": said}
            lines.append(record | {"latency_s": 0.1, "tokens_in": 5, "tokens_out": 1, "error": None})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score_run(folder, resamples=100, seed=0)
    return folder


def metadata(readme):
    _, head, body = readme.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_pushed_folder_opens_and_tells_what_it_is(run, tmp_path):
    merge = json.loads((run / "checkpoints/step_5/hba.json").read_text())["strategy"] == "lora"
    done = push_run(run, f"file://{tmp_path}/sent", license_id=LICENSE, merge=merge)
    sent = tmp_path / "sent"
    names = {file.name for file in sent.iterdir()}
    assert done.files == len(names)
    assert {"README.md", "metrics.json", "model.safetensors", "heads.safetensors", "hba.json"} <= names
    assert not [name for name in names if name.startswith(("optimizer", "trainer"))]
    assert OmniSapiens.from_pretrained(sent).heads.num_classes == 25
    texts = [file.read_text() for file in sent.iterdir() if file.suffix in (".json", ".md")]
    assert not [text for text in texts if "/home/" in text or str(tmp_path.parent.parent) in text]


def test_the_card_has_every_score_with_its_interval(run, tmp_path):
    push_run(run, str(tmp_path / "sent"), license_id=LICENSE, merge=True)
    head, body = metadata((tmp_path / "sent" / "README.md").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    (entry,) = head["model-index"]
    results = {result["dataset"]["config"]: result["metrics"][0] for result in entry["results"]}
    scored = {key: task for key, task in metrics["tasks"].items() if task["score"] is not None}
    assert set(results) == set(scored) == {"EMO", "SAR"}
    for key, task in scored.items():
        assert results[key]["value"] == task["score"]
        assert results[key]["args"]["ci95"] == task["ci95"]
        assert f"{task['score']:.3f}" in body
    assert (head["license"], entry["name"]) == (LICENSE, "sent")
    assert "synthetic" in head["tags"] and "synthetic data" in body
    assert "## Limits" in body and "no diagnoses" in body


TAXONOMIES = {
    "own": "domains: {engagement: {25: low, 26: high}}\n"
    "datasets: {classroom: {domain: engagement, labels: [low, high]}}\n"
    "tasks: {ENG: {name: engagement, metric: weighted_f1, datasets: [classroom]}}\n",
    "zero_shot": "extends: zero_shot\n",
}


@pytest.mark.parametrize("entries", TAXONOMIES)
def test_a_run_with_datasets_of_its_own_is_pushed_with_their_taxonomy(run, tmp_path, entries):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "taxonomy.yaml").write_text(TAXONOMIES[entries])
    taxonomy = of_folder(folder)
    added = [dataset for key, dataset in taxonomy.datasets.items() if key not in DATASETS and dataset.labels]
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    one, other = added[0].labels[:2]
    said = json.loads(lines[0]) | {"dataset": added[0].key, "output": one, "answer": one, "label": one}
    for number in range(6):
        lines.append(json.dumps(said | {"id": f"test/{number}", "target": one if number else other}))
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    score_run(folder, resamples=100, seed=0)
    push_run(folder, str(tmp_path / "sent"), license_id=LICENSE, merge=True)
    assert of_folder(tmp_path / "sent").datasets.keys() == taxonomy.datasets.keys()
    head, _ = metadata((tmp_path / "sent" / "README.md").read_text())
    assert any(added[0].key in result["dataset"]["name"] for result in head["model-index"][0]["results"])


def test_adapters_on_a_backbone_of_this_machine_are_refused_unmerged(run, tmp_path):
    if json.loads((run / "checkpoints/step_5/hba.json").read_text())["strategy"] == "full":
        pytest.skip("a whole model needs no backbone")
    with pytest.raises(InputError, match="--merge"):
        push_run(run, str(tmp_path / "sent"), license_id=LICENSE)
    assert not (tmp_path / "sent").exists()


def test_a_run_without_figures_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="hba score"):
        push_run(run / "checkpoints" / "step_5", str(tmp_path / "sent"), license_id=LICENSE)


# --- the hub ---------------------------------------------------------------------------------------------------------


class ModelHub:
    """The endpoints that a push uses (repositories, upload modes, large files, one commit), and those of a download."""

    def __init__(self):
        self.files, self.blobs, self.commits, self.tokens, self.status = {}, {}, [], set(), 200
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    hub: ModelHub

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.tokens.add(self.headers.get("Authorization"))
        path = urlsplit(self.path).path
        if self.hub.status != 200:
            return self.send({"error": f"no: {self.headers.get('Authorization')}"}, self.hub.status)
        if path == "/api/repos/create":
            return self.send({"url": f"{self.hub.url}/org/model"})
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": self.mode(f["path"]), "shouldIgnore": False} for f in asked]
            return self.send({"files": modes})
        if path.endswith("/objects/batch"):
            upload = {"upload": {"href": f"{self.hub.url}/upload"}}
            objects = [{**each, "actions": upload} for each in json.loads(body)["objects"]]
            return self.send({"transfer": "basic", "objects": objects})
        assert path.endswith("/commit/main")
        self.commit([json.loads(line) for line in body.splitlines()])
        return self.send({"commitUrl": f"{self.hub.url}/org/model/commit/1", "commitOid": "1", "success": True})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        if self.hub.status != 200:
            return self.send({"error": f"no: {self.headers.get('Authorization')}"}, self.hub.status)
        if path.startswith("/api/models/org/model/tree/"):
            files = self.hub.files.items()
            return self.send([{"type": "file", "path": f, "size": len(data), "oid": "0"} for f, data in files])
        if path.startswith("/api/models/org/model"):
            return self.send({"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": f} for f in self.hub.files]})
        known, _, name = path.removeprefix("/org/model/resolve/").partition("/")
        data = self.hub.files.get(name) if path.startswith("/org/model/") else None
        if data is None:
            code = "EntryNotFound" if path.startswith("/org/model/") else "RepoNotFound"
            return self.send({"error": known}, 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
        etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.send(data, 200, etag)

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.blobs[hashlib.sha256(data).hexdigest()] = data
        self.send({})

    def mode(self, name):
        return "lfs" if name.endswith(".safetensors") else "regular"

    def commit(self, lines):
        self.hub.commits.append(lines[0]["value"]["summary"])
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            data = self.hub.blobs[value["oid"]] if large else base64.b64decode(value["content"])
            self.hub.files[value["path"]] = data

    def send(self, value, status=200, headers=None):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, said in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, said)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def model_hub(monkeypatch, tmp_path):
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    served = ModelHub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    close_session()
    hub_checkpoint.cache_clear()
    yield served
    hub_checkpoint.cache_clear()
    close_session()
    served.server.shutdown()
    served.server.server_close()


def test_the_hub_gets_all_files_in_one_commit(run, model_hub, tmp_path):
    command = ["push", str(run), "org/model", "--license", LICENSE, "--merge", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"place": f"{model_hub.url}/org/model/commit/1", "files": len(model_hub.files)}
    assert len(model_hub.commits) == 1
    assert f"Bearer {TOKEN}" in model_hub.tokens
    for name, data in model_hub.files.items():
        (tmp_path / name).write_bytes(data)
        assert TOKEN.encode() not in data
    assert OmniSapiens.from_pretrained(tmp_path).heads.num_classes == 25


def test_what_was_pushed_opens_by_its_name(run, model_hub, tmp_path):
    push_run(run, "org/model", license_id=LICENSE, merge=True)
    assert "hba predict org/model --atlas" in model_hub.files["README.md"].decode()
    assert 'from_pretrained("org/model")' in model_hub.files["README.md"].decode()
    push_run(run, str(tmp_path / "sent"), license_id=LICENSE, merge=True)
    here, there = (OmniSapiens.from_pretrained(place).heads.state_dict() for place in (tmp_path / "sent", "org/model"))
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    assert checkpoint.describe("org/model") == COMMIT


def test_a_backbone_on_the_hub_is_no_checkpoint_and_a_silent_hub_is_no_backbone(model_hub):
    model_hub.files["config.json"] = b"{}"
    assert checkpoint.resolve("org/model") is None
    hub_checkpoint.cache_clear()
    model_hub.status = 418
    with pytest.raises(InputError, match=r"org/model: no such folder.*gives no answer") as refused:
        checkpoint.resolve("org/model")
    assert TOKEN not in str(refused.value)


def test_a_hub_that_cannot_be_reached_is_told_of_at_once(model_hub, monkeypatch):
    """A mistyped path was asked for again and again for half a minute. What the cache has is waited for as before."""
    from huggingface_hub import constants

    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        slept = []
        monkeypatch.setattr(time, "sleep", slept.append)
        with pytest.raises(InputError, match=r"runs/mistyped: no such folder.*gives no answer"):
            checkpoint.resolve("runs/mistyped")
        assert not slept


@pytest.mark.parametrize("license_id", ["Apache", "CC BY 4.0", ""])
def test_a_licence_that_is_no_identifier_is_refused(run, tmp_path, license_id):
    with pytest.raises(InputError, match="no identifier of a licence"):
        push_run(run, str(tmp_path / "sent"), license_id=license_id, merge=True)
    assert not (tmp_path / "sent").exists()


def test_the_card_says_which_rows_were_scored_and_why_a_task_was_not(run, tmp_path):
    asked = {"split": "test[:40]", "selection": {"limit": None, "per_dataset": 3, "channels": ["text", "audio"]}}
    write_json(run / "predict.json", asked)
    try:
        push_run(run, str(tmp_path / "sent"), license_id=LICENSE, merge=True)
    finally:
        (run / "predict.json").unlink()
    head, body = metadata((tmp_path / "sent" / "README.md").read_text())
    scope = "test[:40]; at most 3 rows of each dataset; media given: text, audio"
    assert f"Rows: `{scope}`" in body
    assert {entry["dataset"]["split"] for entry in head["model-index"][0]["results"]} == {scope}


@pytest.mark.parametrize(("status", "message"), [(403, "hf auth login"), (401, "hf auth login"), (418, "status 418")])
def test_a_refusal_is_told_without_the_token(run, model_hub, status, message):
    model_hub.status = status
    with pytest.raises(HbaError, match=message) as refused:
        push_run(run, "org/model", license_id=LICENSE, merge=True)
    assert TOKEN not in str(refused.value)
    assert not model_hub.commits
