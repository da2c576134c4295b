"""What worker processes that survive a crash cost: start-up, handing over a sample, batches a second, one crash; and
where the time of a sample goes.

    python benchmarks/loader.py [ATLAS MODEL]
    python benchmarks/loader.py parts

Prints lines of JSON, medians of five. ATLAS and MODEL are a mini-atlas and a tiny backbone (`hba atlas mini`,
`hba tiny`); made in a temporary folder when they are not given. Start-up is measured from a process that holds the
atlas, the encoder and a model, until the first answer of a new process; the alternatives to fork import and unpickle.

`parts` alone: rows of a clip of ten seconds at 720p and its sound, as `decode_once.py` makes them. Processor
milliseconds of one core and sample for each part of the loader's work, samples a second and core of all of it, decoded
and kept, and the cores that 8 GPUs at 40 samples a second would take.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader

from decode_once import ROWS, make_atlas, tiny
from hba.atlas import Atlas, Sample, open_atlas
from hba.batch.config import EncodeConfig, LoaderConfig, load_media
from hba.batch.encode import SAMPLING_RATE, Encoded, Encoder, collate
from hba.batch.loader import load_batches, open_decoded, pack, receive, receive_header, send, unpack
from hba.model import OmniSapiens
from hba.model.checkpoint import load_processor

TRIALS = 5
SHAPE = (1024, 1176)  # the patches of a clip of 8 frames: 4.8 MB


def median(measure: Callable[[], float]) -> float:
    """Median of TRIALS runs."""
    return statistics.median(measure() for _ in range(TRIALS))


def answer(connection: Any, atlas: Atlas, encoder: Encoder) -> None:
    """A worker that says that it is there."""
    connection.send((len(atlas), encoder.pad_token_id))


def start_up(method: str, atlas: Atlas, encoder: Encoder) -> float:
    """Seconds from the start of a process to its first answer."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "transformers", "hba.batch.encode", "transformers.processing_utils"])
    ours, theirs = context.Pipe()
    started = time.perf_counter()
    process = context.Process(target=answer, args=(theirs, atlas, encoder))
    process.start()
    ours.recv()
    seconds = time.perf_counter() - started
    process.join()
    return seconds


def by_socket(connection: socket.socket) -> None:
    """Hands over a tensor for each message, as workers do."""
    value = {"pixel_values": torch.rand(SHAPE)}
    while connection.recv(8):
        send(connection, 0, pack(value, None))


def by_memory_file(connection: socket.socket) -> None:
    """Hands over a tensor for each message, in an anonymous file whose descriptor is sent."""
    value = {"pixel_values": torch.rand(SHAPE)}
    while message := connection.recv(8):
        descriptor = os.memfd_create("hba")
        with open(descriptor, "wb", closefd=False) as file:
            for part in pack(value, None):
                file.write(part)
        socket.send_fds(connection, [message], [descriptor])
        os.close(descriptor)


def by_pipe(connection: Any) -> None:
    """Hands over a tensor for each message, through the pipe."""
    value = torch.rand(SHAPE).numpy()
    while connection.recv_bytes():
        buffers: list[pickle.PickleBuffer] = []
        connection.send_bytes(pickle.dumps(value, protocol=5, buffer_callback=buffers.append))
        connection.send_bytes(buffers[0].raw())


def by_torch(requests: Any, answers: Any) -> None:
    """Hands over a tensor for each message, in torch's shared memory."""
    value = torch.rand(SHAPE)
    while requests.get():
        answers.put({"pixel_values": value.clone()})


def hand_over(way: str, rounds: int = 40) -> float:
    """Milliseconds to get one tensor from another process and to read it."""
    context = torch.multiprocessing.get_context("fork")
    if way == "socket":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        process = context.Process(target=by_socket, args=(theirs,), daemon=True)

        def once() -> Any:
            ours.send(b"12345678")
            header = receive_header(ours)
            data = np.empty(header[1] if header else 0, np.uint8)
            receive(ours, data)
            return unpack(data, None)["pixel_values"]
    elif way == "memory file":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = context.Process(target=by_memory_file, args=(theirs,), daemon=True)

        def once() -> Any:
            ours.send(b"12345678")
            descriptor = socket.recv_fds(ours, 8, 1)[1][0]
            data = np.empty(os.fstat(descriptor).st_size, np.uint8)
            os.preadv(descriptor, [data.data], 0)
            os.close(descriptor)
            return unpack(data, None)["pixel_values"]
    elif way == "pipe":
        pipe, other = context.Pipe()
        process = context.Process(target=by_pipe, args=(other,), daemon=True)

        def once() -> Any:
            pipe.send_bytes(b"12345678")
            return torch.from_numpy(pickle.loads(pipe.recv_bytes(), buffers=[bytearray(pipe.recv_bytes())]))
    else:
        requests, answers = context.Queue(), context.Queue()
        process = context.Process(target=by_torch, args=(requests, answers), daemon=True)

        def once() -> Any:
            requests.put(1)
            return answers.get()["pixel_values"]

    process.start()
    once().sum()
    started = time.perf_counter()
    for _ in range(rounds):
        once().sum()
    milliseconds = (time.perf_counter() - started) / rounds * 1000
    process.kill()
    process.join()
    return milliseconds


class TorchBatches(torch.utils.data.Dataset[Any]):
    """The plain way: item k is batch k."""

    def __init__(self, atlas: Atlas, encoder: Encoder, plan: list[Any]) -> None:
        self.atlas, self.encoder, self.plan = atlas, encoder, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, k: int) -> Any:
        encoded = [self.encoder.encode(self.atlas[int(row)]) for row in self.plan[k]]
        return collate(encoded, pad_token_id=self.encoder.pad_token_id)


def throughput(atlas: Atlas, encoder: Encoder, way: str, workers: int) -> float:
    """Samples a second through one pass over the atlas."""
    plan = [np.arange(k, min(k + 8, len(atlas))) for k in range(0, len(atlas), 8)]
    if way == "torch":
        batches: Any = DataLoader(
            TorchBatches(atlas, encoder, plan), batch_size=None, num_workers=workers, prefetch_factor=4
        )
    else:
        batches = load_batches(atlas, encoder, plan, LoaderConfig(workers=workers, cache_megabytes=0))
    started = time.perf_counter()
    count = sum(len(batch) for batch in batches)
    return count / (time.perf_counter() - started)


class Crashing(Encoder):
    """Ends its process at row 0 alone."""

    def encode(self, sample: Sample) -> Encoded:
        if sample.number == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        return Encoded(sample=sample, input_ids_T=torch.zeros(4, dtype=torch.long))


def crash(atlas: Atlas, encoder: Encoder) -> float:
    """Milliseconds that one deadly sample adds to an epoch: two deaths, two fresh workers."""
    crashing = Crashing(encoder.processor, encoder.config)

    def epoch(first: int) -> float:
        started = time.perf_counter()
        list(load_batches(atlas, crashing, [np.arange(first, first + 8)], LoaderConfig(workers=1)))
        return time.perf_counter() - started

    return (epoch(0) - epoch(1)) * 1000


WANTED = 40  # samples a second of 8 GPUs


def parts() -> None:
    """Where the time of a sample at 720p goes."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        atlas = make_atlas(work / "atlas")
        processor, config = load_processor(tiny(work, atlas)), EncodeConfig()
        decoded, kept = Encoder(processor, config), Encoder(processor, config)
        loader = LoaderConfig(decode_once=True, decoded_folder=str(work / "kept"))
        kept.decoded = open_decoded(processor, config, loader)
        samples, media = list(atlas), [load_media(sample, config, SAMPLING_RATE) for sample in atlas]
        encoded = [kept.encode(sample) for sample in samples]  # fills the cache
        area = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels, "do_sample_frames": False}
        clips = [[torch.from_numpy(v.frames).permute(0, 3, 1, 2) for v in one.videos] for one in media]
        sound = {"sampling_rate": SAMPLING_RATE, "padding": "max_length", "truncation": False}

        def mel(audio: np.ndarray[Any, Any]) -> Any:
            longest = -(-(len(audio) + processor.feature_extractor.n_fft) // 160) * 160
            return processor.feature_extractor([audio], **sound, max_length=longest, return_attention_mask=True)

        ways: dict[str, Callable[[], object]] = {
            "clip: read and decode": lambda: [one.load_videos(config.num_frames) for one in samples],
            "clip: patches": lambda: [processor.video_processor(clip, return_tensors="pt", **area) for clip in clips],
            "sound: read and decode": lambda: [one.load_audios() for one in samples],
            "sound: mel frames": lambda: [mel(one.audios[0]) for one in media],
            "media kept": lambda: [load_media(one, config, SAMPLING_RATE, decoded=kept.decoded) for one in samples],
            "collate": lambda: collate(encoded, pad_token_id=decoded.pad_token_id),
            "hand over": lambda: [pack(one, None) for one in encoded],
            "whole sample, decoded": lambda: [decoded.encode(one) for one in samples],
            "whole sample, kept": lambda: [kept.encode(one) for one in samples],
        }
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(TRIALS):
            for name, way in ways.items():  # in turns: a busy machine slows all alike
                began = time.process_time()
                way()
                spent[name].append(1000 * (time.process_time() - began) / ROWS)
    cost = {name: statistics.median(times) for name, times in spent.items()}
    for name in ways:
        show(part=name, milliseconds=cost[name])
    last = cost["collate"] + cost["hand over"]
    for how in ("decoded", "kept"):
        whole = cost[f"whole sample, {how}"] + last
        show(loader=how, samples_per_second_and_core=1000 / whole, cores_for_40_a_second=WANTED * whole / 1000)


def main() -> None:
    """Run everything."""
    torch.set_num_threads(1)
    if sys.argv[1:] == ["parts"]:
        parts()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, backbone = map(Path, sys.argv[1:3]) if len(sys.argv) > 2 else made(Path(temporary))
        atlas = open_atlas(folder, split="train")
        model = OmniSapiens.from_pretrained(backbone)
        encoder = Encoder(model.processor, EncodeConfig(max_pixels=3136))
        for method in ("fork", "forkserver", "spawn"):
            first = start_up(method, atlas, encoder)
            again = median(lambda method=method: start_up(method, atlas, encoder))
            show(measured="start of a worker", method=method, first_seconds=first, seconds=again)
        for way in ("socket", "memory file", "pipe", "torch shared memory"):
            show(measured="hand over 4.8 MB", way=way, milliseconds=median(lambda way=way: hand_over(way)))
        for way, workers in (("hba", 0), ("hba", 1), ("torch", 1), ("hba", 2), ("torch", 2)):
            speed = median(lambda way=way, workers=workers: throughput(atlas, encoder, way, workers))
            show(measured="one pass", loader=way, workers=workers, samples_per_second=speed)
        show(measured="one deadly sample", milliseconds=median(lambda: crash(atlas, encoder)))
    parts()


def made(folder: Path) -> tuple[Path, Path]:
    """A mini-atlas and a tiny backbone."""
    from hba.mini import build_mini_atlas
    from hba.model.tiny import atlas_texts, build_tiny

    build_mini_atlas(folder / "atlas", size="tiny", seed=0, workers=1)
    texts = atlas_texts(open_atlas(folder / "atlas", split="train"))
    return folder / "atlas", build_tiny(folder / "tiny", texts, seed=0)


def show(**record: Any) -> None:
    """One line of JSON."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}), flush=True)


if __name__ == "__main__":
    main()
