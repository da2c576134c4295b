"""An atlas on the hub gives the same samples and batches as in a folder, in each of its forms, whatever the network."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from hba import open_atlas
from hba.atlas.convert import convert_to_parquet
from hba.atlas.hub import download_atlas
from hba.atlas.info import atlas_info
from hba.atlas.rows import MEDIA_FIELDS
from hba.atlas.source import read_bytes
from hba.atlas.validate import validate_atlas
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import Encoder, collate
from hba.batch.loader import load_batches
from hba.batch.sampler import plan_batches
from hba.cli import app
from hba.errors import InputError, MachineError, MediaError
from hba.storage import StorageError

REPO = "org/mini"
FORMS = ("jsonl", "parquet", "tar")


@pytest.fixture(scope="module")
def releases(tmp_path_factory, mini_atlas):
    """The mini-atlas as it would be published: media in folders, shards, and one tar a split."""
    root = tmp_path_factory.mktemp("releases")
    shutil.copytree(mini_atlas, root / "jsonl")
    for split in ("train", "validation", "test"):
        size = 60_000 if split == "train" else 1 << 30
        convert_to_parquet(open_atlas(mini_atlas, split=split), root / "parquet" / "data", shard_bytes=size)
    shutil.copy(mini_atlas / "atlas.json", root / "parquet" / "data")
    (root / "tar").mkdir()
    for split in ("train", "validation", "test"):
        shutil.copy(mini_atlas / f"{split}.jsonl", root / "tar")
        paths = sorted(set(media_of(mini_atlas, split)))
        kind = "w:gz" if split == "test" else "w"
        with tarfile.open(root / "tar" / f"{split}_media.tar{'.gz' if split == 'test' else ''}", kind) as tar:
            for path in paths:
                tar.add(mini_atlas / path, f"./{path}")
    shutil.copy(mini_atlas / "atlas.json", root / "tar")
    for form in FORMS:
        (root / form / "README.md").write_text("An atlas.")
    return root


def media_of(folder, split):
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return [path for row in rows for name in MEDIA_FIELDS for path in row.get(name, [])]


def serve(hub, releases, form):
    return hub.add(REPO, releases / form)


def contents(sample):
    """What a sample says and holds, without where it lies."""
    names = ("id", "split", "problem", "answer", "dataset", "task", "modality_signature", "label", "texts", "extra")
    media = {}
    for name in MEDIA_FIELDS:
        sources = [sample.source.medium(sample.number, name, i, where="") for i in range(getattr(sample, name))]
        media[name] = [read_bytes(source) for source in sources]
    return {name: getattr(sample, name) for name in names} | media


def batches_of(atlas, backbone):
    from transformers import AutoProcessor

    encoder = Encoder(AutoProcessor.from_pretrained(backbone), EncodeConfig(num_frames=2))
    plan = plan_batches(atlas.columns.signature_codes, atlas.estimated_tokens, batch_size=4, seed=0, epoch=0)
    encoded = ([encoder.encode(atlas[int(i)]) for i in rows] for rows in plan[:6])
    return plan, [collate(batch, pad_token_id=encoder.pad_token_id) for batch in encoded]


@pytest.mark.parametrize("form", FORMS)
def test_samples_and_batches_are_those_of_the_folder(hub, releases, mini_atlas, backbone, form):
    repo = serve(hub, releases, form)
    local, remote = open_atlas(mini_atlas, split="train"), open_atlas(REPO, split="train")
    assert len(remote) == len(local)
    plan, wanted = batches_of(local, backbone)
    plan_there, got = batches_of(remote, backbone)
    assert [list(rows) for rows in plan] == [list(rows) for rows in plan_there]
    for a, b in zip(wanted, got, strict=True):
        assert [s.id for s in a.samples] == [s.id for s in b.samples]
        assert a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
        assert torch.equal(a.class_index_B, b.class_index_B)
    assert [contents(s) for s in remote] == [contents(s) for s in local]
    assert remote.card == local.card
    assert repo.commit in str(remote.root)
    assert remote.fingerprint == local.fingerprint


@pytest.mark.parametrize("form", FORMS)
def test_only_the_split_is_asked_for(hub, releases, form):
    serve(hub, releases, form)
    atlas = open_atlas(REPO, split="test[-20:]")
    [contents(sample) for sample in atlas]
    others = set(media_of(releases / "jsonl", "train")) - set(media_of(releases / "jsonl", "test"))
    fetched = hub.fetched()
    assert fetched
    assert form == "parquet" or len(set(fetched)) == len(fetched)  # shards come in parts
    assert not [name for name in fetched if "train" in Path(name).name or "validation" in Path(name).name]
    assert not others & set(fetched)
    assert "README.md" not in fetched


def test_media_are_fetched_when_they_are_read(hub, releases):
    serve(hub, releases, "jsonl")
    atlas = open_atlas(REPO, split="test[:3]")
    assert set(hub.fetched()) == {"atlas.json", "test.jsonl"} & set(hub.repos[REPO].files)
    before = len(hub.requests)
    again = pickle.loads(pickle.dumps(atlas))
    [contents(sample) for sample in again]
    rows = (releases / "jsonl" / "test.jsonl").read_text().splitlines()[:3]
    wanted = {path for row in map(json.loads, rows) for name in MEDIA_FIELDS for path in row.get(name, [])}
    assert set(hub.fetched(before)) == wanted
    before = len(hub.requests)
    [contents(sample) for sample in open_atlas(REPO, split="test[:3]")]
    assert hub.fetched(before) == []  # all is in the cache now


@pytest.fixture(scope="module")
def long_sounds(tmp_path_factory):
    """A release of one shard a split, with an index and as another program writes it; 24 rows of 640 kB of noise."""
    root = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    said = {"answer": "anger", "dataset": "cremad", "task": "emotion_cls", "class_label": "anger"}
    with (root / "test.jsonl").open("w") as file:
        for i in range(24):
            soundfile.write(root / f"{i}.wav", rng.normal(0, 0.1, 320_000), 16_000)
            row = {"problem": f"How {i}?", **said, "audios": [f"{i}.wav"], "modality_signature": "text_audio"}
            file.write(json.dumps(row) + "\n")
    shard = convert_to_parquet(open_atlas(root, split="test"), root / "indexed")[0]
    (root / "plain").mkdir()
    table = pq.read_table(shard).drop_columns(["media_paths"])
    pq.write_table(table, root / "plain" / shard.name, row_group_size=4, compression="none", use_dictionary=False)
    media = [[{"bytes": each, "path": "a.wav"} for each in row] for row in table["audios"].to_pylist()]
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = table.set_column(table.schema.get_field_index("audios"), "audios", pa.array(media, kind))
    (root / "structs").mkdir()
    pq.write_table(table, root / "structs" / shard.name, row_group_size=12, compression="none", use_dictionary=False)
    (root / "packed").mkdir()
    pq.write_table(table, root / "packed" / shard.name, row_group_size=4)
    return root


@pytest.mark.parametrize("form", ["indexed", "plain", "structs", "packed"])
def test_rows_of_a_shard_cost_what_they_are(hub, long_sounds, form):
    hub.add(REPO, long_sounds / form)
    shard = "test-00000-of-00001.parquet"
    atlas, local = open_atlas(REPO, split="test[:3]"), open_atlas(long_sounds, split="test[:3]")
    size, opening = (long_sounds / form / shard).stat().st_size, hub.sent[shard]
    assert opening < (0.05 if form == "indexed" else 0.25) * size  # the columns without media
    again = pickle.loads(pickle.dumps(atlas))
    for a, b in zip(again, local, strict=True):
        np.testing.assert_array_equal(a.load_audios()[0].samples, b.load_audios()[0].samples)
    wanted = 4 if form == "packed" else 3  # of a row group that is one packed page, all
    assert hub.sent[shard] - opening < (wanted + 1.5) * 640_000
    assert len(hub.fetched()) < 15  # a page that is walked through comes at once
    before = len(hub.requests)
    [sample.load_audios() for sample in open_atlas(REPO, split="test[:3]")]
    assert shard not in hub.fetched(before)  # what is there is not asked for again
    full = open_atlas(REPO, split="test")
    assert [contents(s)["audios"] for s in full] == [contents(s)["audios"] for s in open_atlas(long_sounds, "test")]
    assert hub.sent[shard] < 1.1 * size
    assert full.columns.num_audios.sum() == 24


def test_a_view_of_remote_shards_can_be_converted(hub, long_sounds, tmp_path):
    hub.add(REPO, long_sounds / "plain")
    convert_to_parquet(open_atlas(REPO, split="test[:3]"), tmp_path / "out")
    for a, b in zip(open_atlas(tmp_path / "out", "test"), open_atlas(long_sounds, "test[:3]"), strict=True):
        assert contents(a)["audios"] == contents(b)["audios"]


def test_shards_that_are_in_the_shared_cache_are_used(hub, long_sounds):
    from huggingface_hub import hf_hub_download

    for name in hub.add(REPO, long_sounds / "indexed").files:
        hf_hub_download(REPO, name, repo_type="dataset")
    before = len(hub.requests)
    [sample.load_audios() for sample in open_atlas(REPO, split="test")]
    assert not hub.fetched(before)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_snapshot_of_the_shared_cache_opens_as_a_folder(hub, releases, mini_atlas, tmp_path, form):
    """It is made of links to the contents that the cache keeps beside it."""
    from huggingface_hub import hf_hub_download

    names = [n for n in serve(hub, releases, form).files if "train" not in n and "validation" not in n]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda name: hf_hub_download(REPO, name, repo_type="dataset"), names))
    snapshot = Path(paths[names.index("README.md")]).parent
    assert (snapshot / "README.md").is_symlink()
    for a, b in zip(open_atlas(snapshot, split="test"), open_atlas(mini_atlas, split="test"), strict=True):
        assert contents(a) == contents(b)
    result = validate_atlas(snapshot, splits=["test"], quick=True)
    here = validate_atlas(mini_atlas, splits=["test"], quick=True)
    assert result.ok and result.rows == here.rows
    assert {name: media.num_refused for name, media in result.media.items()} == dict.fromkeys(here.media, 0)
    wanted = atlas_info(mini_atlas, splits=["test"], durations=True).durations
    assert atlas_info(snapshot, splits=["test"], durations=True).durations.unknown == wanted.unknown
    convert_to_parquet(open_atlas(snapshot, split="test[:3]"), tmp_path / "out")


def test_a_killed_reader_leaves_no_hole(hub, long_sounds, away):
    """A process is killed while a part of a shard is on its way; the next one reads what the shard holds."""
    hub.add(REPO, long_sounds / "indexed")
    open_atlas(REPO, split="test")
    stall = threading.Event()
    hub.fail("GET", ".parquet", cut_at=200_000, stall=stall)
    code = f"import hba; hba.open_atlas({REPO!r}, split='test')[5].load_audios()"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **away, "OMP_NUM_THREADS": "1"})
    assert hub.reached.wait(600)
    process.kill()
    process.wait()
    stall.set()
    for a, b in zip(open_atlas(REPO, split="test"), open_atlas(long_sounds, "test"), strict=True):
        assert contents(a)["audios"] == contents(b)["audios"]


@pytest.mark.parametrize("form", FORMS)
def test_info_fetches_rows_and_no_media(hub, releases, mini_atlas, form):
    serve(hub, releases, form)
    ours, here = atlas_info(REPO), atlas_info(mini_atlas)
    assert ours.to_json()["splits"] == here.to_json()["splits"]
    assert ours.synthetic
    fetched = set(hub.fetched())
    assert not [name for name in fetched if name.endswith((".wav", ".mp4", ".pt", ".tar", ".gz"))]
    assert atlas_info(f"{REPO}@main", splits=["test[:4]"]).splits[0].rows == 4


def test_validate_and_durations_of_a_dataset(hub, releases, mini_atlas, tmp_path):
    serve(hub, releases, "tar")
    result = validate_atlas(REPO, splits=["validation"], quick=True, out=tmp_path)
    here = validate_atlas(mini_atlas, splits=["validation"], quick=True)
    assert result.ok == here.ok
    assert (result.rows, result.media) == (here.rows, here.media)
    before = len(hub.requests)
    lasting = atlas_info(REPO, splits=["validation"], durations=True).durations
    assert hub.fetched(before) == []  # the copy is there
    wanted = atlas_info(mini_atlas, splits=["validation"], durations=True).durations
    assert {k: v.tolist() for k, v in lasting.datasets.items()} == {k: v.tolist() for k, v in wanted.datasets.items()}


def test_info_of_a_dataset_from_the_command_line(hub, releases):
    serve(hub, releases, "jsonl")
    done = CliRunner().invoke(app, ["atlas", "info", REPO, "--split", "test", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["splits"]["test"]["rows"] > 0


def test_offline_uses_what_is_there(hub, releases, monkeypatch):
    from huggingface_hub import constants

    for form in FORMS:
        hub.add(f"org/{form}", releases / form)
        [contents(sample) for sample in open_atlas(f"org/{form}", split="test[:3]")]
    before = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for form in FORMS:
        assert len([contents(sample) for sample in open_atlas(f"org/{form}", split="test[:3]")]) == 3
    assert len(hub.requests) == before
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        open_atlas("org/other", split="test")


def test_a_commit_is_kept_while_the_branch_moves_on(hub, releases, tmp_path):
    old = serve(hub, releases, "tar")
    root = open_atlas(REPO, split="test").root
    changed = tmp_path / "changed"
    shutil.copytree(releases / "tar", changed)
    (changed / "NEWS.md").write_text("Nothing new.")
    new = hub.add(REPO, changed)
    before = len(hub.requests)
    assert open_atlas(REPO, split="test").root == root  # the same tars: not unpacked again
    assert not hub.fetched(before)
    assert new.commit != old.commit
    assert open_atlas(f"{REPO}@{old.commit}", split="test").root == root  # the branch may be anywhere by now
    with pytest.raises(InputError, match="no such revision"):
        open_atlas(f"{REPO}@v9", split="test")


@pytest.mark.parametrize("form", FORMS)
def test_download_makes_a_folder_like_any_other(hub, releases, mini_atlas, tmp_path, form):
    repo = serve(hub, releases, form)
    seen = []
    done = download_atlas(REPO, tmp_path / "out", progress=lambda *at: seen.append(at))
    assert done.splits == ("train", "validation", "test")
    assert (done.revision, done.missing) == (repo.commit, ())
    assert seen
    for split in done.splits:
        local, here = open_atlas(mini_atlas, split=split), open_atlas(done.path, split=split)
        assert [contents(sample) for sample in here] == [contents(sample) for sample in local]
    assert not [path for path in done.path.rglob("*.tar*") if ".cache" not in path.parts and path.suffix != ".json"]
    before = len(hub.requests)
    assert download_atlas(REPO, tmp_path / "out") == done
    assert len(hub.requests) == before  # everything is known and there
    with pytest.raises(InputError, match="holds commit"):
        other = hub.add(REPO, mini_atlas)
        download_atlas(REPO, tmp_path / "out", revision=other.commit)


def test_download_refuses_a_folder_with_something_else(hub, releases, tmp_path):
    serve(hub, releases, "jsonl")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        download_atlas(REPO, tmp_path / "mine")
    assert (tmp_path / "mine" / "train.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    "fault",
    [
        {"cut_at": 1000},
        {"status": 500},
        {"status": 503},
        {"status": 429, "headers": {"Retry-After": "0"}},
    ],
    ids=["cut", "500", "503", "429"],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_passes_is_tried_again(hub, releases, mini_atlas, form, fault, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)  # or a small file is fetched in one piece
    repo = serve(hub, releases, form)
    target = {"jsonl": "test.jsonl", "parquet": ".parquet", "tar": "test_media.tar.gz"}[form]
    hub.fail("GET", target, **fault)
    if "cut_at" not in fault:
        hub.fail("GET", "/revision/main", **fault)
        if form != "parquet":
            hub.fail("HEAD", target, **fault)
    atlas = open_atlas(REPO, split="test[:5]")
    assert all(fault.times == 0 for fault in hub.faults)
    assert [contents(s) for s in atlas] == [contents(s) for s in open_atlas(mini_atlas, split="test[:5]")]
    if "cut_at" in fault and form == "tar":
        assert ("GET", target, 206) in hub.requests  # went on where it was cut
    assert repo.commit in str(atlas.root)


REFUSALS = {
    "gated": ({"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, "Accept the terms .* `hf auth login`"),
    "forbidden": ({"status": 403}, "Accept the terms .* `hf auth login`"),
    "unknown": ({"status": 401}, "no path on this machine and no dataset.*hf auth login"),
    "missing": ({"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}, "no path on this machine"),
    "down": ({"status": 500, "times": 99}, "status 500.*what is complete is kept"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_to_do(hub, releases, name, monkeypatch, caplog):
    from hba.atlas import hub_client

    monkeypatch.setattr(hub_client, "_PAUSES", (0.0,))
    serve(hub, releases, "jsonl")
    fault, message = REFUSALS[name]
    hub.fail("GET", "/revision/main", **fault)
    with pytest.raises(InputError, match=message) as caught:
        open_atlas(REPO, split="test")
    assert "hf_secret" not in str(caught.value) + caplog.text
    assert caught.value.exit_code == 2
    hub.faults.clear()
    if fault["status"] < 500:  # the same while a file is fetched
        hub.fail("HEAD", "test.jsonl", **fault)
        with pytest.raises(InputError, match=message):
            open_atlas(REPO, split="test")


def test_the_token_goes_to_the_hub_alone(hub, releases):
    serve(hub, releases, "parquet")
    open_atlas(REPO, split="test")
    assert hub.tokens["127.0.0.1"] == {"Bearer hf_secretoftests"}
    assert hub.tokens["localhost"] == {None}


def test_no_hub_to_be_reached(hub, releases):
    serve(hub, releases, "jsonl")
    hub.close()
    with pytest.raises(InputError, match=r"cannot be reached.*HF_HUB_OFFLINE=1"):
        open_atlas(REPO, split="test")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_no_sample_is_blamed_for_a_hub_that_goes_away(hub, releases, backbone, form, workers, monkeypatch):
    monkeypatch.setenv("HBA_STORAGE_PATIENCE", "0.3")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts of its own
    serve(hub, releases, form)
    atlas = open_atlas(REPO, split="test").filter(modalities=["text_audio"])
    stream = read_all(atlas, backbone, workers)
    assert next(stream).samples
    hub.leave() if workers else hub.close()  # processes that were forked here hold the port open
    with pytest.raises(MachineError, match=r"hub at .* cannot be reached.*what is complete is kept") as caught:
        list(stream)
    assert caught.value.exit_code == 1 and "hf_secret" not in str(caught.value)
    assert not atlas.quarantine


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}, {"cut_at": 9}])
def test_a_hub_that_comes_back_is_waited_for(hub, releases, backbone, fault):
    serve(hub, releases, "jsonl")
    atlas = open_atlas(REPO, split="test").filter(modalities=["text_audio"])[:4]
    hub.fail("GET", ".wav", times=4, **fault)
    # More than three seconds, in which a sample would be given up if it were decoding that takes them.
    batches = list(read_all(atlas, backbone, workers=1, decode_timeout_seconds=3.0))
    assert sum(len(batch.samples) for batch in batches) == 4 and not atlas.quarantine
    assert all(fault.times == 0 for fault in hub.faults)


def read_all(atlas, backbone, workers, **options):
    from transformers import AutoProcessor

    encoder = Encoder(AutoProcessor.from_pretrained(backbone), EncodeConfig(num_frames=2))
    plan = [np.array([k]) for k in range(len(atlas))]
    options = {"prefetch_megabytes": 0, "cache_megabytes": 0} | options
    return load_batches(atlas, encoder, plan, LoaderConfig(workers=workers, **options))


def test_a_medium_that_is_not_there_is_the_samples_fault(hub, releases, tmp_path):
    folder = tmp_path / "holes"
    shutil.copytree(releases / "jsonl", folder)
    gone = media_of(folder, "test")[0]
    (folder / gone).unlink()
    hub.add(REPO, folder)
    atlas = open_atlas(REPO, split="test[:8]")
    broken = []
    for sample in atlas:
        try:
            contents(sample)
        except MediaError as error:
            broken.append(str(error))
    assert broken
    assert all(gone in message for message in broken)
    assert atlas.estimated_tokens.tolist() == open_atlas(folder, split="test[:8]").estimated_tokens.tolist()
    assert download_atlas(REPO, tmp_path / "out", splits=["test"]).missing == (gone,)


def test_a_full_disk_is_named(hub, releases, monkeypatch):
    """The disk is filled for this process by a limit on the size of its files."""
    import resource

    serve(hub, releases, "tar")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(StorageError, match="no space left"):
            open_atlas(REPO, split="test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert len(open_atlas(REPO, split="test"))


@pytest.mark.parametrize("form", FORMS)
def test_killed_and_resumed(hub, releases, mini_atlas, tmp_path, away, form):
    serve(hub, releases, form)
    stall = threading.Event()
    target = {"jsonl": sorted(set(media_of(mini_atlas, "train")))[-1], "tar": "train_media.tar"}
    hub.fail("GET", target.get(form, "train-00002-of-" + shards(releases)), cut_at=2000, stall=stall)
    command = [sys.executable, "-m", "hba", "atlas", "download", REPO, str(tmp_path / "out"), "--json"]
    environment = {**os.environ, **away, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert hub.reached.wait(600), process.communicate(timeout=1)
    process.kill()
    process.wait()
    stall.set()
    before = len(hub.requests)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"] == ["train", "validation", "test"]
    assert "hf_secret" not in done.stdout + done.stderr
    assert "train.jsonl" not in hub.fetched(before)  # what was whole is not fetched again
    for split in ("train", "validation", "test"):
        local, here = open_atlas(mini_atlas, split=split), open_atlas(tmp_path / "out", split=split)
        assert [contents(sample) for sample in here] == [contents(sample) for sample in local]
    assert not list((tmp_path / "out").rglob("*.incomplete"))


def shards(releases):
    return sorted((releases / "parquet" / "data").glob("train-*.parquet"))[-1].name.split("-of-")[1]


def test_a_refused_tar_leaves_nothing_outside(hub, releases, tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    shutil.copy(releases / "tar" / "test.jsonl", folder)
    (tmp_path / "payload").write_text("evil")
    with tarfile.open(folder / "media.tar", "w") as tar:
        tar.add(tmp_path / "payload", "../../../../../../escaped")
    hub.add(REPO, folder)
    for _ in range(2):  # it is not taken for unpacked the second time
        with pytest.raises(InputError, match="leads outside the folder"):
            open_atlas(REPO, split="test")
    assert not list(tmp_path.rglob("escaped*"))


def test_two_at_once_unpack_once(hub, releases):
    serve(hub, releases, "tar")
    with ThreadPoolExecutor(3) as pool:
        atlases = list(pool.map(lambda _: open_atlas(REPO, split="test"), range(3)))
    assert hub.fetched().count("test_media.tar.gz") == 1
    assert len({atlas.fingerprint for atlas in atlases}) == 1


def test_splits_and_names(hub, releases, tmp_path, monkeypatch):
    serve(hub, releases, "jsonl")
    with pytest.raises(InputError, match=r"has no split 'dev'.*Choose one of: test, train, validation"):
        open_atlas(REPO, split="dev")
    with pytest.raises(InputError, match=r"no split was named.*train, validation, test"):
        open_atlas(REPO)
    with pytest.raises(InputError, match="selects none"):
        open_atlas(REPO, split="test[:0]")
    before = len(hub.requests)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    with pytest.raises(InputError, match="no such file or folder"):
        open_atlas(REPO, split="test")  # a mistyped path below a folder that is there
    for text in ("nothing", "a/b/c", "./a/b", "org/x.jsonl", "/a/b"):
        with pytest.raises(InputError, match="no such file or folder"):
            open_atlas(text, split="test")
    assert len(hub.requests) == before
    assert len(open_atlas(f"hf://datasets/{REPO}", split="test")) == len(open_atlas(releases / "jsonl", split="test"))


def test_published_names_and_a_list_of_files_that_is_too_long(hub, releases, tmp_path, monkeypatch):
    from hba.atlas import hub_client

    folder = tmp_path / "published"
    shutil.copytree(releases / "jsonl", folder)
    (folder / "test.jsonl").rename(folder / "final_v8_test_cleaned.jsonl")
    hub.add(REPO, folder)
    hub.page = 2
    monkeypatch.setattr(hub_client, "_SURELY_LISTED", 1)
    wanted = open_atlas(folder, split="test[:5]")
    assert [contents(s) for s in open_atlas(REPO, split="test[:5]")] == [contents(s) for s in wanted]


def test_batch_plan_of_an_unfetched_atlas_asks_for_sizes_alone(hub, releases):
    serve(hub, releases, "jsonl")
    atlas = open_atlas(REPO, split="train")
    before = len(hub.requests)
    np.testing.assert_array_equal(atlas.audio_bytes, open_atlas(releases / "jsonl", split="train").audio_bytes)
    assert {method for method, _, _ in hub.requests[before:]} == {"POST"}
