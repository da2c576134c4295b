"""What was decoded once comes back to the bit, is decoded anew when anything about it changes, and keeps its bound."""

import errno
import logging
import multiprocessing
import os
import resource
import time

import av
import numpy as np
import pytest
import soundfile

from hba.atlas import decoded
from hba.atlas.decoded import DecodedCache, identity_of
from hba.atlas.media import Limits, load_audio, load_video
from hba.atlas.source import Slice, checksums_of
from hba.errors import MediaError
from hba.storage import StorageError

ROOM = 1 << 30


def make_clip(path, seed=0, size=(96, 64), frames=12):
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height = size
        for _ in range(frames):
            pixels = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path


def make_sound(path, seed=0, seconds=1.0):
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.3, 0.3, (int(44100 * seconds), 2)), 44100)
    return path


@pytest.fixture
def clip(tmp_path):
    return make_clip(tmp_path / "a.mp4")


@pytest.fixture
def sound(tmp_path):
    return make_sound(tmp_path / "a.wav")


@pytest.fixture
def keep(tmp_path):
    """The cache in one folder, opened anew by each call, as another process would."""
    return lambda max_bytes=ROOM, **options: DecodedCache(tmp_path / "kept", max_bytes, **options)


def spoil(path):
    """Other bytes, and all that the system tells of the file as it was: whoever decodes it now is refused."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def same(one, other):
    return (
        np.array_equal(one.frames, other.frames)
        and np.array_equal(one.timestamps_seconds, other.timestamps_seconds)
        and one.duration_seconds == other.duration_seconds
        and one.frames.dtype == other.frames.dtype
        and one.timestamps_seconds.dtype == other.timestamps_seconds.dtype
    )


def segments(cache):
    return sorted(cache.folder.glob("segment-*"))


# --- the same, once -----------------------------------------------------------------------------------------------


def test_comes_back_to_the_bit_and_is_not_decoded_again(clip, sound, keep):
    frames, samples = load_video(clip, 8, where="w"), load_audio(sound, where="w")
    assert same(keep().video(clip, 8, where="w"), frames)
    assert np.array_equal(keep().audio(sound, where="w").samples, samples.samples)
    for path in (clip, sound):
        spoil(path)
    cache = keep()
    assert same(cache.video(clip, 8, where="w"), frames)
    heard = cache.audio(sound, where="w")
    assert np.array_equal(heard.samples, samples.samples) and heard.samples.dtype == np.float32
    assert len(cache) == 2


def test_a_medium_in_a_shard_is_known_by_its_place_and_checksums_whatever_the_shards_time(clip, tmp_path, keep):
    data, shard = clip.read_bytes(), tmp_path / "shard"
    shard.write_bytes(b"xx" + data)
    place = Slice(shard, 2, len(data), checksums_of(data))
    first = keep().video(place, 4, where="w")
    os.utime(shard, (1, 1))
    assert same(keep().video(place, 4, where="w"), first) and len(keep()) == 1
    for source in (place._replace(checksums=b""), data):
        assert same(keep().video(source, 4, where="w"), first)
    assert len(keep()) == 3
    os.utime(shard, (2, 2))
    keep().video(place._replace(checksums=b""), 4, where="w")  # without checksums the time is what there is
    assert len(keep()) == 4


def test_media_of_equal_size_and_checksum_are_not_taken_for_each_other(tmp_path, keep):
    """32 bits meet by chance among 100,000 sounds of one length; here they are made to."""
    sounds = [make_sound(tmp_path / f"{k}.wav", seed=k, seconds=0.2).read_bytes() for k in range(2)]
    (tmp_path / "shard").write_bytes(b"".join(sounds))
    size = len(sounds[0])
    one, other = (Slice(tmp_path / "shard", size * k, size, checksums_of(sounds[0])) for k in range(2))
    assert identity_of(one) != identity_of(other)


def test_whatever_changes_is_decoded_anew(clip, sound, keep, tmp_path, monkeypatch):
    cache = keep()
    cache.video(clip, 8, where="w")
    cache.audio(sound, where="w")
    cache.video(clip, 4, where="w")
    cache.video(clip, 8, where="w", frames="nearest_keyframe")
    cache.video(clip, 8, where="w", limits=Limits(max_pixels=10_000))
    assert len(cache) == 5
    before = clip.stat()
    other = make_clip(tmp_path / "b.mp4", seed=1).read_bytes()
    clip.write_bytes(other[: before.st_size] + bytes(max(0, before.st_size - len(other))))  # as large as it was
    make_clip(clip, seed=1)
    assert same(cache.video(clip, 8, where="w"), load_video(clip, 8, where="w"))
    os.utime(clip, ns=(before.st_atime_ns, clip.stat().st_mtime_ns + 1))
    cache.video(clip, 8, where="w")
    assert len(cache) == 7
    monkeypatch.setattr(decoded, "decoders", lambda: "a later release")
    cache.video(clip, 8, where="w")
    assert len(cache) == 8


def test_a_broken_medium_is_refused_each_time_as_without(clip, tmp_path, keep):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:-200])
    with pytest.raises(MediaError) as plain:
        load_video(broken, 8, where="rows:3, videos")
    cache = keep()
    for source in (broken, broken, tmp_path / "nowhere.mp4", tmp_path):
        with pytest.raises(MediaError, match=r"rows:3, videos") as caught:
            cache.video(source, 8, where="rows:3, videos")
        assert source is not broken or str(caught.value) == str(plain.value)
    assert len(cache) == 0 and segments(cache) == []


def test_a_medium_that_changes_while_it_is_decoded_is_not_kept(clip, keep):
    def resize(frames):
        clip.touch()
        return frames

    resize.key = {}
    cache = keep(resize=resize)
    assert same(cache.video(clip, 8, where="w"), load_video(clip, 8, where="w"))
    assert len(cache) == 0


# --- damage -------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_told_once_and_mended(clip, sound, keep, caplog):
    frames, samples = load_video(clip, 8, where="w"), load_audio(sound, where="w").samples
    cache, reader = keep(), keep()
    cache.video(clip, 8, where="w")
    cache.audio(sound, where="w")
    (segment,) = segments(cache)
    data = bytearray(segment.read_bytes())
    data[5000] ^= 1
    data[-5000] ^= 1
    segment.write_bytes(data)
    assert len(reader) == 2  # has read the records of what is damaged
    with caplog.at_level(logging.WARNING):
        assert same(cache.video(clip, 8, where="w"), frames)
        assert np.array_equal(cache.audio(sound, where="w").samples, samples)
    assert [record.message.count("differs from its checksum") for record in caplog.records] == [1]
    for path in (clip, sound):
        spoil(path)
    for other in (keep(), reader):
        assert same(other.video(clip, 8, where="w"), frames)
        assert np.array_equal(other.audio(sound, where="w").samples, samples)


@pytest.mark.parametrize("harm", ["cut segment", "no segment", "torn record", "garbage record", "no index", "nothing"])
def test_what_is_lost_is_decoded_again(clip, sound, keep, harm):
    frames = load_video(clip, 8, where="w")
    cache = keep()
    cache.audio(sound, where="w")
    cache.video(clip, 8, where="w")
    (segment,), index = segments(cache), cache.folder / "index"
    if harm == "cut segment":
        os.truncate(segment, segment.stat().st_size - 1)
    elif harm == "no segment":
        segment.unlink()
    elif harm == "torn record":
        os.truncate(index, index.stat().st_size - 7)
    elif harm == "garbage record":
        index.write_bytes(index.read_bytes()[:-20] + os.urandom(20))
    elif harm == "no index":
        index.unlink()
    else:
        for path in cache.folder.iterdir():
            path.unlink()
        cache.folder.rmdir()
    for again in (cache, keep()):
        assert same(again.video(clip, 8, where="w"), frames)
    spoil(clip)
    assert same(keep().video(clip, 8, where="w"), frames)  # and kept again
    assert same(cache.video(clip, 8, where="w"), frames)


# --- the bound and the disk -----------------------------------------------------------------------------------------


def test_the_bound_is_kept_and_said_once(tmp_path, keep, caplog):
    sounds = [make_sound(tmp_path / f"{k}.wav", seed=k, seconds=0.5) for k in range(8)]  # 32 kB each as float32
    bound = 150_000
    cache = keep(bound)
    with caplog.at_level(logging.WARNING):
        for path in sounds * 2:
            assert np.array_equal(cache.audio(path, where="w").samples, load_audio(path, where="w").samples)
            assert cache.num_bytes == sum(file.stat().st_size for file in cache.folder.iterdir()) <= bound
    (cache.folder / "segment-old.txt").write_bytes(bytes(bound))  # of somebody else: none of ours
    assert cache.num_bytes <= bound
    assert [record.message.count("is full") for record in caplog.records] == [1]
    assert len(cache) == 4
    for path in sounds[:4]:
        spoil(path)
    for path in sounds[:4]:
        keep(bound).audio(path, where="w")  # what an epoch kept first stays
    with pytest.raises(StorageError, match=r"is full.*decoded_gigabytes"):
        keep(bound, strict=True).audio(sounds[5], where="w")


def test_what_nobody_reads_makes_room(tmp_path, keep):
    sounds = [make_sound(tmp_path / f"{k}.wav", seed=k, seconds=0.5) for k in range(5)]
    bound = 150_000
    cache = keep(bound)
    for path in sounds[:4]:
        cache.audio(path, where="w")
    first, second, *_ = segments(cache)
    old = time.time() - decoded.IDLE_SECONDS - 60
    os.utime(first, (old, old))
    os.utime(second, (old - 60, old - 60))
    keep(bound).audio(sounds[1], where="w")  # read by somebody: the other one goes
    keep(bound).audio(sounds[4], where="w")
    assert cache.num_bytes <= bound and not first.exists() and second.exists()
    for path in sounds[1:]:
        spoil(path)
        keep(bound).audio(path, where="w")
    assert np.array_equal(cache.audio(sounds[0], where="w").samples, load_audio(sounds[0], where="w").samples)


def test_a_full_disk_is_the_machines_and_said_once(tmp_path, keep, caplog):
    sounds = [make_sound(tmp_path / f"{k}.wav", seed=k, seconds=0.5) for k in range(4)]
    cache, strict = keep(), keep(strict=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with caplog.at_level(logging.WARNING):
            for path in sounds:
                assert np.array_equal(cache.audio(path, where="w").samples, load_audio(path, where="w").samples)
        with pytest.raises(StorageError, match="no space left"):
            strict.audio(sounds[2], where="w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record.message.count("no space left") for record in caplog.records] == [1]
    assert len(keep()) == 1
    (segment,) = segments(cache)
    assert segment.stat().st_size < 40_000  # what the disk did not take whole was taken back
    keep().audio(sounds[3], where="w")
    spoil(sounds[3])
    keep().audio(sounds[3], where="w")


def test_a_disk_that_does_not_answer_is_the_machines(sound, keep, caplog):
    samples = load_audio(sound, where="w").samples
    cache = keep()
    (cache.folder / "index").symlink_to("/proc/self/mem")  # reading its first byte gives EIO
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert np.array_equal(cache.audio(sound, where="w").samples, samples)
    assert [record.message.count(os.strerror(errno.EIO)) for record in caplog.records] == [1]
    with pytest.raises(StorageError, match="cannot be used"):
        keep()


def test_a_folder_that_is_none_is_refused_before_anything_is_decoded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used"):
        DecodedCache(tmp_path / "file", ROOM)


# --- several processes ----------------------------------------------------------------------------------------------


def hear(folder, sounds, begin):
    cache = DecodedCache(folder, ROOM)
    begin.wait()
    for path in sounds:
        assert np.array_equal(cache.audio(path, where="w").samples, load_audio(path, where="w").samples)


def test_two_processes_at_once_keep_each_medium_once(tmp_path, keep):
    sounds = [make_sound(tmp_path / f"{k}.wav", seed=k, seconds=0.2) for k in range(20)]
    context = multiprocessing.get_context("fork")
    begin, cache = context.Barrier(2), keep()
    orders = (sounds, sounds[::-1])
    crew = [context.Process(target=hear, args=(cache.folder, order, begin)) for order in orders]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
    assert [process.exitcode for process in crew] == [0, 0]
    assert len(cache) == 20  # a process that was there before sees what others have kept
    assert (cache.folder / "index").stat().st_size == 20 * decoded._RECORD_BYTES
    for path in sounds:
        spoil(path)
        cache.audio(path, where="w")


def test_what_another_process_keeps_meanwhile_is_not_kept_twice(clip, keep):
    def plain(frames):
        return frames

    def late(frames):
        keep(resize=plain).video(clip, 8, where="w")
        return frames

    plain.key = late.key = {}
    cache = keep(resize=late)
    assert same(cache.video(clip, 8, where="w"), load_video(clip, 8, where="w"))
    assert (cache.folder / "index").stat().st_size == decoded._RECORD_BYTES


def test_identity_needs_no_decoder(clip, tmp_path):
    assert identity_of(clip) == identity_of(tmp_path / "." / "a.mp4")
    assert identity_of(tmp_path / "nowhere") is None
    assert identity_of(b"1") != identity_of(b"2")
