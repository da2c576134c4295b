"""`loader.decode_once` and `hba atlas prepare`: the same batches to the bit, from media that nobody decodes again."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from hba.atlas import open_atlas
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import Encoder, ResizeAsProcessor
from hba.batch.loader import load_batches, open_decoded, prepare
from hba.model.checkpoint import load_processor

ROWS, BROKEN = 8, 5
SIZES = [(320, 180), (180, 320), (352, 288)]  # larger than what the model is shown


def make_clip(path, number):
    width, height = SIZES[number % len(SIZES)]
    rng = np.random.default_rng(number)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height = width, height
        for _ in range(10):
            small = rng.integers(0, 255, (height // 4, width // 4, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(small.repeat(4, 0).repeat(4, 1), format="rgb24")))
        out.mux(stream.encode())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An atlas of clips with sound; one of the clips is cut off."""
    folder = tmp_path_factory.mktemp("clips") / "atlas"
    (folder / "m").mkdir(parents=True)
    row = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "t"}
    with (folder / "train.jsonl").open("w") as lines:
        for k in range(ROWS):
            make_clip(folder / f"m/{k}.mp4", k)
            soundfile.write(folder / f"m/{k}.wav", np.random.default_rng(k).uniform(-0.2, 0.2, 22050), 22050)
            media = {"videos": [f"m/{k}.mp4"], "audios": [f"m/{k}.wav"], "modality_signature": "text_video_audio"}
            lines.write(json.dumps(row | media) + "\n")
    data = (folder / f"m/{BROKEN}.mp4").read_bytes()
    (folder / f"m/{BROKEN}.mp4").write_bytes(data[:-300])
    return folder


@pytest.fixture
def clips(made, tmp_path):
    return shutil.copytree(made, tmp_path / "atlas")


@pytest.fixture(scope="module")
def processor(backbone):
    return load_processor(backbone)


def batches(folder, processor, kept=None, workers=0, **encode):
    encoder = Encoder(processor, EncodeConfig(num_frames=4, **encode))
    plan = [np.arange(k, k + 4) for k in range(0, ROWS, 4)]
    options = {} if kept is None else {"decode_once": True, "decoded_folder": str(kept)}
    config = LoaderConfig(workers=workers, cache_megabytes=0, **options)
    return list(load_batches(open_atlas(folder, split="train"), encoder, plan, config))


def equal(one, other):
    return (
        [sample.id for sample in one.samples] == [sample.id for sample in other.samples]
        and one.inputs.keys() == other.inputs.keys()
        and all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
        and one.quarantined == other.quarantined
    )


def spoil(folder):
    """Zeros in place of all media but the broken one; the system tells of them what it told before."""
    for path in (folder / "m").iterdir():
        if path.name != f"{BROKEN}.mp4":
            status = path.stat()
            path.write_bytes(bytes(status.st_size))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_to_the_bit_and_later_ones_decode_nothing(clips, processor, tmp_path, workers):
    plain = batches(clips, processor)
    assert [record.field for batch in plain for record in batch.quarantined] == ["videos"]
    first = batches(clips, processor, tmp_path / "kept", workers)
    assert all(map(equal, first, plain))
    spoil(clips)
    later = batches(clips, processor, tmp_path / "kept", workers)
    assert all(map(equal, later, plain))
    assert sum(len(batch.quarantined) for batch in batches(clips, processor)) == ROWS  # and would be refused without


def test_another_setting_is_decoded_anew(clips, processor, tmp_path):
    batches(clips, processor, tmp_path / "kept")
    plain = batches(clips, processor, max_pixels=20_000)
    assert all(map(equal, batches(clips, processor, tmp_path / "kept", max_pixels=20_000), plain))
    spoil(clips)
    assert all(map(equal, batches(clips, processor, tmp_path / "kept", max_pixels=20_000), plain))


@pytest.mark.parametrize("pixels", [(3136, 50176), (3136, 3136), (100_000, 200_000)])
def test_frames_that_were_resized_before_give_the_same_patches(processor, pixels):
    config = EncodeConfig(min_pixels=pixels[0], max_pixels=pixels[1])
    resize, smaller = ResizeAsProcessor.of(processor, config), 0
    rng = np.random.default_rng(0)
    sizes = [(720, 1280), (1080, 608), (56, 56), (57, 300), (30, 3000), (28, 5600), (240, 426), (2, 2), (500, 29)]
    for height, width in sizes:
        frames = rng.integers(0, 255, (2, height, width, 3), np.uint8)
        kept = resize(frames)
        smaller += kept.shape != frames.shape
        assert kept.size <= frames.size
        options = {"min_pixels": pixels[0], "max_pixels": pixels[1], "do_sample_frames": False}
        one, other = (
            processor.video_processor([torch.from_numpy(each).permute(0, 3, 1, 2)], return_tensors="pt", **options)
            for each in (frames, kept)
        )
        assert torch.equal(one["pixel_values_videos"], other["pixel_values_videos"])
        assert torch.equal(one["video_grid_thw"], other["video_grid_thw"])
    assert smaller >= 1
    odd = np.zeros((2, 2, 500, 3), np.uint8)
    assert resize(odd) is odd  # the processor refuses it, as it does without


def test_frames_of_processors_that_cut_otherwise_are_kept_as_they_are(processor):
    class Other(type(processor.video_processor)):
        def _preprocess(self, *_, **__):
            raise AssertionError

    class Wrapped:
        video_processor = Other()

    assert ResizeAsProcessor.of(Wrapped(), EncodeConfig()) is None
    assert ResizeAsProcessor.of(object(), EncodeConfig()) is None


# --- the command ----------------------------------------------------------------------------------------------------


def arguments(clips, backbone, kept, *more):
    loader = ["loader.workers=1", f"loader.decoded_folder={kept}"]
    return ["atlas", "prepare", clips, f"model={backbone}", "encode.num_frames=4", *loader, *more]


def test_prepare_decodes_all_that_training_reads(clips, backbone, processor, tmp_path, hba):
    plain = batches(clips, processor)
    code, out, err = hba(*arguments(clips, backbone, tmp_path / "kept", "--json"))
    told = json.loads(out)
    assert code == 2 and f"train.jsonl:{BROKEN + 1}, videos" in err  # what cannot be read is named
    assert told["rows"] == {"train": ROWS} and told["quarantined"] == 1 and told["media"] == 2 * ROWS - 1
    assert told["bytes"] == sum(file.stat().st_size for file in (tmp_path / "kept").iterdir())
    spoil(clips)
    assert all(map(equal, batches(clips, processor, tmp_path / "kept"), plain))
    code, out, _ = hba(*arguments(clips, backbone, tmp_path / "kept", "--json", "--allow-quarantined", "1"))
    assert code == 0 and json.loads(out) == told  # nothing is done twice


def test_prepare_says_when_the_bound_is_reached(clips, backbone, tmp_path, hba):
    kept = tmp_path / "kept"
    code, _, err = hba(*arguments(clips, backbone, kept, "loader.decoded_gigabytes=0.001"))
    assert code == 2 and "decoded media is full" in err and "loader.decoded_gigabytes" in err
    assert sum(file.stat().st_size for file in kept.iterdir()) <= 1_000_000


def test_prepare_killed_in_the_middle_goes_on(clips, backbone, processor, tmp_path, hba):
    plain, kept = batches(clips, processor), tmp_path / "kept"
    # Nothing is prepared ahead, and after its third row the process goes on with none.
    loader = LoaderConfig(workers=1, prefetch_megabytes=0, decoded_folder=str(kept))
    encode, context = EncodeConfig(num_frames=4), multiprocessing.get_context("fork")
    there, workers = context.Event(), context.SimpleQueue()

    def until_the_third(done, total):
        if done >= 3:
            workers.put([child.pid for child in multiprocessing.active_children()])
            there.set()
            signal.pause()

    told = (open_atlas(clips, split="train"), processor, encode, loader, until_the_third)
    process = context.Process(target=prepare, args=told)
    process.start()
    assert there.wait(600)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for worker in workers.get():  # the kernel kills it
        while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().rsplit(")")[1]:
            time.sleep(0.01)
    before = len(open_decoded(processor, encode, loader))
    assert 1 <= before < 2 * ROWS - 1
    with (kept / "index").open("ab") as index, (kept / "segment-1").open("ab") as segment:
        index.write(b"torn")  # as a kill in the middle of a write leaves them
        segment.write(b"half an entry")
    code, out, _ = hba(*arguments(clips, backbone, kept, "--json", "--allow-quarantined", "1"))
    assert code == 0 and json.loads(out)["media"] == 2 * ROWS - 1
    assert (kept / "index").stat().st_size % (2 * ROWS - 1) == 0  # nothing twice
    spoil(clips)
    assert all(map(equal, batches(clips, processor, kept), plain))
