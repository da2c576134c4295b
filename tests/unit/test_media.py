"""Media decode to what was written into them, or are refused."""

from __future__ import annotations

import io
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch

from hba.atlas.audio import mean_of_channels
from hba.atlas.media import (
    SAMPLE_RATE,
    Limits,
    load_audio,
    load_descriptor,
    load_image,
    load_video,
)
from hba.atlas.pt import read_arrays
from hba.errors import InputError, MediaError

WHERE = "train.jsonl:1, videos"


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write_clip(
    path: Path, *, seconds: float = 4, size: tuple[int, int] = (160, 96), codec: str = "libx264", rate: int = 25,
    muxer: dict[str, str] | None = None, start_seconds: int = 0, sound: bool = False, **options: str,
) -> Path:  # fmt: skip
    """Encode moving noise, so that every frame differs and damage shows."""
    rng = np.random.default_rng(0)
    width, height = size
    base = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w", options=muxer or {}) as out:
        video = out.add_stream(codec, rate=rate, options=options)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = out.add_stream("aac", rate=44_100) if sound else None
        for i in range(int(seconds * rate)):
            frame = av.VideoFrame.from_ndarray(np.roll(base, 3 * i, axis=1) // 2 + i % 100, format="rgb24")
            frame.pts = i + start_seconds * rate
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if audio is not None:
            samples = tone(seconds, 44_100)
            for at in range(0, len(samples) - 1023, 1024):
                block = av.AudioFrame.from_ndarray(samples[None, at : at + 1024].repeat(2, 0), "fltp", "stereo")
                block.rate, block.pts = 44_100, at
                out.mux(audio.encode(block))
            out.mux(audio.encode())
    return path


def full_decode(path: Path) -> dict[float, np.ndarray]:
    with av.open(str(path)) as container:
        return {float(f.pts * f.time_base): f.to_ndarray(format="rgb24") for f in container.decode(video=0)}


def assert_exact(path: Path, num_frames: int) -> None:
    video = load_video(path, num_frames, where=WHERE)
    reference = full_decode(path)
    times = sorted(reference)
    centres = times[0] + (np.arange(num_frames) + 0.5) / num_frames * video.duration_seconds
    expected = [max(t for t in times if t <= centre + 1e-9) for centre in centres]
    np.testing.assert_allclose(video.timestamps_seconds, expected)
    for time, frame in zip(expected, video.frames, strict=True):
        np.testing.assert_array_equal(frame, reference[time])


# --- sound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_sound_keeps_length_and_pitch(tmp_path: Path, suffix: str, rate: int) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([tone(2, rate), tone(2, rate)], axis=1), rate)
    audio = load_audio(path, where=WHERE)
    assert audio.samples.dtype == np.float32
    assert audio.samples.ndim == 1
    assert audio.seconds == pytest.approx(2, abs=0.01)
    spectrum = np.abs(np.fft.rfft(audio.samples))
    assert np.argmax(spectrum) * SAMPLE_RATE / len(audio.samples) == pytest.approx(440, abs=2)
    assert np.abs(audio.samples[1000:-1000]).max() == pytest.approx(0.5, abs=0.03)


def test_16_khz_mono_is_untouched_and_bytes_equal_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(50, 16_000), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path, where=WHERE).samples, tone(50, 16_000), atol=1e-6)
    np.testing.assert_array_equal(
        load_audio(path.read_bytes(), where=WHERE).samples, load_audio(path, where=WHERE).samples
    )


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = np.stack([tone(1, 16_000), -tone(1, 16_000)], axis=1)
    soundfile.write(tmp_path / "a.wav", both, 16_000)
    assert np.abs(load_audio(tmp_path / "a.wav", where=WHERE).samples).max() < 1e-3


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 7, 8, 16])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_mean_of_channels_is_that_of_numpy_to_the_bit(channels: int, kind: type) -> None:
    samples_TC = np.random.default_rng(channels).normal(0, 1e3, (999, channels)).astype(kind)
    samples_TC[:3], samples_TC[3], samples_TC[4, 0] = -0.0, np.nan, np.inf
    for samples_CT in (samples_TC.T, np.ascontiguousarray(samples_TC.T)):
        found = mean_of_channels(samples_CT)
        assert found.dtype == np.float32
        assert found.tobytes() == samples_CT.mean(axis=0, dtype=np.float32).tobytes()


@pytest.mark.parametrize("name", ["a.mp4", "a.m4a", "a.aac", "a.mkv", "named_wrongly.wav"])
def test_sound_tracks(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    container = {"named_wrongly.wav": "mp4", "a.aac": "adts", "a.m4a": "mp4", "a.mkv": "matroska"}.get(name, "mp4")
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream("aac", rate=44_100)
        samples = tone(3, 44_100)
        for at in range(0, len(samples) - 1023, 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + 1024].repeat(2, 0), "fltp", "stereo")
            frame.rate, frame.pts = 44_100, at
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    audio = load_audio(path, where=WHERE)
    assert audio.seconds == pytest.approx(3, abs=0.1)
    spectrum = np.abs(np.fft.rfft(audio.samples))
    assert np.argmax(spectrum) * SAMPLE_RATE / len(audio.samples) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_cut_sound_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 64_000).astype(np.float32), 16_000)
    data = path.read_bytes()
    with pytest.raises(MediaError, match=WHERE):
        load_audio(data[: int(len(data) * share)], where=WHERE)


def test_sound_with_nan_or_without_samples_is_refused(tmp_path: Path) -> None:
    broken = tone(1, 16_000)
    broken[5] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "none.wav", broken[:0], 16_000)
    with pytest.raises(MediaError, match="NaN"):
        load_audio(tmp_path / "nan.wav", where=WHERE)
    with pytest.raises(MediaError, match="0 samples"):
        load_audio(tmp_path / "none.wav", where=WHERE)


def test_wav_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1, 16_000), 16_000)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    assert load_audio(bytes(data), where=WHERE).seconds == pytest.approx(1)


def test_sound_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(16_000 * 30, np.float32), 16_000)
    with pytest.raises(MediaError, match="more than the limit of 10 s"):
        load_audio(path, where=WHERE, limits=Limits(max_audio_seconds=10))
    with pytest.raises(MediaError, match="bytes, more than the limit"):
        load_audio(path, where=WHERE, limits=Limits(max_bytes=100))


# --- video -----------------------------------------------------------------------------------------------------------


def test_default_gop_gives_distinct_exact_frames(tmp_path: Path) -> None:
    """The published reader gave the same frame eight times here."""
    path = write_clip(tmp_path / "v.mp4", seconds=12)  # 300 frames; libx264 sets a keyframe every 250
    video = load_video(path, 8, where=WHERE)
    assert video.frames.shape == (8, 96, 160, 3)
    assert len({frame.tobytes() for frame in video.frames}) == 8
    assert_exact(path, 8)


@pytest.mark.parametrize(
    ("name", "muxer"), [("live.mkv", {"live": "1"}), ("stream.ts", {}), ("front.mp4", {"movflags": "faststart"})]
)
def test_frames_beyond_the_first_512_are_seen_in_containers_that_cannot_seek(
    tmp_path: Path, name: str, muxer: dict[str, str]
) -> None:
    """The published reader took its frames from the first 512 where a container says neither length nor index."""
    path = write_clip(tmp_path / name, seconds=28, size=(64, 48), muxer=muxer)  # 700 frames
    assert load_video(path, 8, where=WHERE).timestamps_seconds[-1] > 600 / 25
    assert_exact(path, 8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("keyframes.mp4", {"g": "10"}),
        ("open_gop.mp4", {"g": "25", "x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}),
        ("intra_refresh.mp4", {"x264-params": "intra-refresh=1:keyint=30"}),
        ("no_b_frames.mp4", {"bf": "0", "g": "30"}),
        ("front.mp4", {"muxer": {"movflags": "faststart"}}),
        ("fragmented.mp4", {"g": "25", "muxer": {"movflags": "frag_keyframe+empty_moov"}}),
        ("late_start.mp4", {"g": "25", "start_seconds": 3}),
        ("with_sound.mp4", {"g": "25", "sound": True}),
        ("h264.mkv", {"g": "30"}),
        ("no_seeking.mkv", {"g": "30", "muxer": {"live": "1"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"}),
        ("vp8.webm", {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}),
        ("slow.mp4", {"rate": 1, "seconds": 20}),
    ],
)
def test_frames_equal_those_of_a_full_decode(tmp_path: Path, name: str, options: dict) -> None:
    path = write_clip(tmp_path / name, **options)
    for num_frames in (1, 5, 8, 32):
        assert_exact(path, num_frames)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v.mp4", {"g": "10"}),
        ("sparse.mp4", {"g": "250", "seconds": 12}),
        ("open_gop.mp4", {"g": "25", "x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}),
        ("late_start.mp4", {"g": "25", "start_seconds": 3}),
        ("h264.mkv", {"g": "30"}),
        ("vp9.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8", "g": "20"}),
    ],
)
@pytest.mark.parametrize("num_frames", [1, 4, 8])
def test_nearest_keyframes(tmp_path: Path, name: str, options: dict, num_frames: int) -> None:
    path = write_clip(tmp_path / name, **options)
    with av.open(str(path)) as container:
        keys = [f for f in container.decode(video=0) if f.key_frame]
    times = np.array([float(f.pts * f.time_base) for f in keys])
    exact = load_video(path, num_frames, where=WHERE)
    fast = load_video(path, num_frames, where=WHERE, frames="nearest_keyframe")
    for i, (time, pixels) in enumerate(zip(fast.timestamps_seconds, fast.frames, strict=True)):
        chosen = int(np.argmin(np.abs(times - time)))
        assert time == pytest.approx(times[chosen], abs=1e-9)
        np.testing.assert_array_equal(pixels, keys[chosen].to_ndarray(format="rgb24"))
        centre = times[0] + (i + 0.5) * exact.duration_seconds / num_frames
        assert abs(time - centre) <= np.abs(times - centre).min() + 0.05
    assert fast.duration_seconds == exact.duration_seconds


def test_frames_that_only_look_like_keyframes_are_never_served(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.mp4", **{"x264-params": "intra-refresh=1:keyint=30"})
    video = load_video(path, 8, where=WHERE, frames="nearest_keyframe")
    with av.open(str(path)) as container:
        shown = {float(f.pts * f.time_base): f.to_ndarray(format="rgb24") for f in container.decode(video=0)}
    for time, pixels in zip(video.timestamps_seconds, video.frames, strict=True):
        np.testing.assert_array_equal(pixels, shown[time])


def test_irregular_frame_times(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    rng = np.random.default_rng(1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"g": "20"})
        stream.width = stream.height = 64
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for pts in np.cumsum(rng.integers(5, 900, 60)):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = int(pts), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert_exact(path, 8)
    assert_exact(path, 50)


def test_fewer_frames_than_asked_for_repeats_by_the_rule(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.mp4", seconds=0.12)  # 3 frames
    video = load_video(path, 8, where=WHERE)
    assert len(set(video.timestamps_seconds)) == 3
    assert_exact(path, 8)


def test_bytes_equal_the_file(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.mp4")
    np.testing.assert_array_equal(
        load_video(path.read_bytes(), 4, where=WHERE).frames, load_video(path, 4, where=WHERE).frames
    )


@pytest.mark.parametrize("name", ["back.mp4", "front.mp4", "fragmented.mp4", "v.mkv", "v.webm"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.98])
def test_cut_clip_is_refused(tmp_path: Path, name: str, share: float) -> None:
    flags = {"front.mp4": "faststart", "fragmented.mp4": "frag_keyframe+empty_moov"}.get(name)
    codec = {"codec": "libvpx", "deadline": "realtime"} if name.endswith("webm") else {"g": "25"}
    path = write_clip(tmp_path / name, seconds=6, muxer={"movflags": flags} if flags else None, **codec)
    data = path.read_bytes()
    with pytest.raises(MediaError, match=WHERE):
        load_video(data[: int(len(data) * share)], 8, where=WHERE)


def test_damage_on_the_way_to_a_frame_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.mp4", seconds=8)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = bytes(20_000)
    with pytest.raises(MediaError, match=r"cut off or corrupt|cannot be decoded"):
        load_video(bytes(data), 8, where=WHERE)


def test_playlists_are_not_followed(tmp_path: Path) -> None:
    """A file that names other files must not make the decoder open them."""
    clip = write_clip(tmp_path / "v.mp4", seconds=1)
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{clip}\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.mp4").write_text(hls)
    (tmp_path / "b.mp4").write_text(f"ffconcat version 1.0\nfile '{clip.name}'\n")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(MediaError):
            load_video(tmp_path / name, 2, where=WHERE)


def test_video_limits_and_calls(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.mp4")
    with pytest.raises(MediaError, match="pixels"):
        load_video(path, 2, where=WHERE, limits=Limits(max_pixels=1000))
    with pytest.raises(MediaError, match="lasts 4 s"):
        load_video(path, 2, where=WHERE, limits=Limits(max_video_seconds=3))
    with pytest.raises(InputError, match="num_frames"):
        load_video(path, 0, where=WHERE)
    with pytest.raises(MediaError, match="no sound track"):
        load_audio(path, where=WHERE)
    soundfile.write(tmp_path / "a.wav", tone(1, 16_000), 16_000)
    with pytest.raises(MediaError, match="no video track"):
        load_video(tmp_path / "a.wav", 2, where=WHERE)


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_images_keep_their_pixels(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / f"i.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(load_image(tmp_path / f"i.{suffix}", where=WHERE), pixels)


def test_bad_images_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    for bad in (b"", b"text", buffer.getvalue()[:2000]):
        with pytest.raises(MediaError, match=WHERE):
            load_image(bad, where=WHERE)
    with pytest.raises(MediaError, match="4,096 pixels"):
        load_image(buffer.getvalue(), where=WHERE, limits=Limits(max_pixels=4000))
    header = bytearray(buffer.getvalue())
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # a bomb: 3.6 billion pixels by its header
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(MediaError, match=r"too large|pixels"):
        load_image(bytes(header), where=WHERE)


# --- descriptors -----------------------------------------------------------------------------------------------------


def saved(value: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_descriptors_round_trip() -> None:
    pose = {"pose": torch.rand(7, 33, 3), "face": torch.rand(7, 478, 3)}
    loaded = load_descriptor(saved(pose), where=WHERE)
    assert isinstance(loaded, dict)
    assert all(torch.equal(loaded[name], pose[name]) for name in pose)
    features = load_descriptor(saved(torch.arange(5.0), _use_new_zipfile_serialization=False), where=WHERE)
    assert torch.equal(features, torch.arange(5.0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN or infinite"),
        ({"pose": torch.tensor([float("inf")])}, "'pose' holds NaN"),
        (torch.zeros(0, 3), "empty"),
        ({"pose": [1, 2]}, "found list"),
        ({}, "found dict"),
        ("text", "found str"),
        (torch.eye(3).to_sparse(), "dense"),
        (torch.zeros(1).expand(1 << 40), "claims shape"),
    ],
)
def test_bad_descriptors_are_refused(value: object, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load_descriptor(saved(value), where=WHERE)


def test_cut_descriptor_is_refused() -> None:
    data = saved(torch.rand(100, 10))
    for share in (0.0, 0.1, 0.5, 0.99):
        with pytest.raises(MediaError, match=WHERE):
            load_descriptor(data[: int(len(data) * share)], where=WHERE)


def test_descriptor_that_unpacks_to_a_bomb() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2 << 20))
    assert len(buffer.getvalue()) < 1 << 14
    with pytest.raises(MediaError, match="unpacks to"):
        load_descriptor(buffer.getvalue(), where=WHERE, limits=Limits(max_descriptor_bytes=1 << 20))


# --- damage that a decoder passes over -------------------------------------------------------------------------------


def picture(form: str, **options: object) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def test_png_whose_last_bytes_differ_is_refused() -> None:
    data = bytearray(picture("PNG"))
    end = data.rindex(b"IEND") - 8  # the last chunk of pixels ends here, in a checksum of the pixels and one of its own
    assert load_image(bytes(data), where=WHERE).shape == (64, 64, 3)
    for at in (end - 5, end, end + 2):
        damaged = bytes(data[:at]) + bytes([data[at] ^ 4]) + bytes(data[at + 1 :])
        with pytest.raises(MediaError, match="cannot be decoded"):
            load_image(damaged, where=WHERE)


def test_jpeg_of_fewer_pixels_than_it_declares_is_refused() -> None:
    data = picture("JPEG")
    at = data.index(b"\xff\xc0") + 5
    with pytest.raises(MediaError, match="cannot be decoded"):
        load_image(data[:at] + b"\x04\x00\x04\x00" + data[at + 4 :], where=WHERE)  # libjpeg pads it with grey


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 2}])
def test_jpegs_of_all_kinds_are_served_as_pillow_does(mode: str, options: dict[str, object]) -> None:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (33, 17, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=50, **options)
    expected = np.array(PIL.Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(load_image(file.getvalue() + bytes(100), where=WHERE), expected)


def test_descriptor_with_a_wrong_checksum_is_refused() -> None:
    file = io.BytesIO()
    torch.save(torch.ones(1000), file)
    data = bytearray(file.getvalue())
    at = data.index(np.ones(1000, np.float32).tobytes()) + 2002
    data[at] ^= 1
    assert not torch.equal(torch.load(io.BytesIO(data)), torch.ones(1000))  # torch does not look at the checksum
    with pytest.raises(MediaError, match="is damaged"):
        load_descriptor(bytes(data), where=WHERE)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_descriptor_that_unpacks_without_a_bound_is_refused(method: int) -> None:
    file, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.ones(10), file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(packed, "w", method) as other:
        for name in whole.namelist():
            other.writestr(name, whole.read(name))
    with pytest.raises(MediaError, match="than by DEFLATE"):
        load_descriptor(packed.getvalue(), where=WHERE)


def test_name_of_a_descriptor_decides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.save(torch.ones(3), path)
    assert torch.equal(load_descriptor(path, where=WHERE), torch.ones(3))
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(MediaError, match="is damaged"):
        load_descriptor(path, where=WHERE)


@pytest.mark.parametrize("form", ["OGG", "MP3"])
def test_garbage_in_front_is_refused_whatever_the_name_says(tmp_path: Path, form: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, tone(1, 16_000), 16_000, format=form)
    for suffix in ("ogg", "mp3", "bin"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(b"garbage" + file.getvalue())
        with pytest.raises(MediaError, match=r"cannot be decoded|are no mp3"):
            load_audio(path, where=WHERE)
        path.write_bytes(file.getvalue())
        assert load_audio(path, where=WHERE).seconds == pytest.approx(1, abs=0.01)


def test_track_of_unknown_codec_is_refused(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "v.mkv", seconds=1, sound=True).read_bytes()
    for codec, load, kind in ((b"V_MPEG4/ISO/AVC", load_clip, "video"), (b"A_AAC", load_audio, "sound")):
        unknown = data.replace(codec, codec[:2] + b"X" + codec[3:])
        with pytest.raises(MediaError, match=f"{kind} track of an unknown codec"):
            load(unknown, where=WHERE)


def load_clip(source: bytes, *, where: str) -> object:
    return load_video(source, 4, where=where)


def test_mp3_behind_garbage_is_refused() -> None:
    file = io.BytesIO()
    soundfile.write(file, tone(1, 16_000), 16_000, format="MP3")
    with pytest.raises(MediaError, match="begins with bytes that are no mp3"):
        load_audio(b"garbage" + file.getvalue(), where=WHERE)  # it would come with the padding of its encoder


def test_matroska_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "v.mkv", seconds=4, g="25", sound=True).read_bytes()
    assert load_audio(data, where=WHERE).seconds == pytest.approx(4, abs=0.1)
    with pytest.raises(MediaError, match="several files joined"):
        load_audio(data + data, where=WHERE)  # a demuxer reads on and takes the sound of both
    cluster = data.index(b"\x1f\x43\xb6\x75") + 4
    with pytest.raises(MediaError, match="a part ends at byte"):
        load_clip(data[:cluster] + b"\x01\x00\x00\x00\x7f\xff\xff\xff" + data[cluster + 8 :], where=WHERE)


def test_clip_that_lasts_far_longer_than_declared_is_refused(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "v.mp4", bf="2", g="8").read_bytes()
    at = data.index(b"mdhd") + 16
    with pytest.raises(MediaError, match="corrupt header: declares 4"):
        load_clip(data[:at] + bytes(4) + data[at + 4 :], where=WHERE)  # a second has no ticks


MANY = 300_000


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"})" + b"\x85" * MANY + b"Ns.", "tuple for str"),  # a key nested so deep, whose hash would end the process
        (b")" + b"\x85" * 1000 + b".", "deeper than 64"),
        (b"]q\x00h\x00a.", "deeper than 64"),  # a list that holds itself
        (b"N" * 100_000 + b"(t" * 100_000 + b".", "unpack"),  # each tuple once looked through all that lies below
    ],
)
def test_a_pickle_that_is_deep_or_long_is_refused_at_once(pickled, said):
    """Levels in one another without end, and a mark that is to be found at the top of a long stack."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled)
    with pytest.raises(ValueError, match=said):
        read_arrays(packed)
