"""Media as data: URIs: what browsers play, cut to size, the same bytes each time."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from hba.atlas.media import Audio, load_audio
from hba.errors import MediaError
from hba.report.page import Budget, Encoded, encode_audio, encode_image, encode_video


def test_adpcm_sound_becomes_pcm_that_browsers_play(tmp_path: Path) -> None:
    tone = (0.5 * np.sin(np.arange(16000) * 0.1)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", tone, 16000, subtype="IMA_ADPCM")
    encoded = encode_audio(load_audio(tmp_path / "a.wav", where="a.jsonl:1, audios"))
    info = soundfile.info(io.BytesIO(encoded.data))
    assert (encoded.mime, info.subtype, info.samplerate) == ("audio/wav", "PCM_16", 16000)
    decoded, _ = soundfile.read(tmp_path / "a.wav")
    assert np.abs(soundfile.read(io.BytesIO(encoded.data))[0] - decoded).max() < 1e-4
    assert np.abs(decoded[100:]).max() > 0.4


def test_long_sound_is_cut_and_says_so() -> None:
    encoded = encode_audio(Audio(samples=np.zeros(16000 * 65, np.float32), sample_rate=16000))
    assert soundfile.info(io.BytesIO(encoded.data)).duration == 20.0
    assert encoded.note == "first 20 s of 65 s"


def _video(
    path: Path, codec: str, *, pix_fmt: str = "yuv420p", seconds: int = 2, size: int = 64, sound: bool = False
) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=12)
        stream.width = stream.height = size
        stream.pix_fmt = pix_fmt
        audio = out.add_stream("aac", rate=16000, layout="mono") if sound else None
        for i in range(seconds * 12):
            image = np.full((size, size, 3), 10 * (i % 24), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000 * seconds), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            out.mux(audio.encode(frame))
            out.mux(audio.encode(None))
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx")])
def test_a_playable_video_passes_through_unchanged(tmp_path: Path, name: str, codec: str) -> None:
    path = _video(tmp_path / name, codec)
    for source in (path, path.read_bytes()):
        encoded = encode_video(source, where="x", max_bytes=1 << 20)
        assert encoded.data == path.read_bytes()
        assert encoded.mime == f"video/{path.suffix[1:]}"


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mp4", "mpeg4", "yuv420p"),
        ("a.mp4", "libx264", "yuv444p"),
        ("a.mkv", "libx264", "yuv420p"),
    ],
)
def test_any_other_video_becomes_h264_420(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    encoded = encode_video(_video(tmp_path / name, codec, pix_fmt=pix_fmt), where="x", max_bytes=1 << 20)
    with av.open(io.BytesIO(encoded.data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = list(container.decode(video=0))
    assert len(frames) == 24
    assert frames[-1].time == pytest.approx(23 / 12, abs=0.02)
    assert encoded.note == "2.0 s, re-encoded for the page"


def test_a_large_video_becomes_a_silent_excerpt_that_says_so(tmp_path: Path) -> None:
    path = _video(tmp_path / "a.mp4", "libx264", seconds=14, size=320, sound=True)
    encoded = encode_video(path, where="x", max_bytes=1000)
    with av.open(io.BytesIO(encoded.data)) as container:
        assert container.streams.video[0].height == 288
        assert not container.streams.audio
        assert float(container.duration) / av.time_base == pytest.approx(12, abs=0.3)
    assert encoded.note == "first 12 s of 14 s, re-encoded for the page, picture only"


def test_a_re_encoded_video_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    path, random, found = _video(tmp_path / "a.avi", "mpeg4"), np.random.default_rng(0), set()
    for _ in range(30):
        held = [random.integers(0, 255, size, np.uint8) for size in (2_000, 40_000, 300_000)]  # another heap each time
        found.add(encode_video(path, where="x", max_bytes=1 << 20).data)
        del held
    assert len(found) == 1


@pytest.mark.parametrize("content", [b"", b"not a video", None])
def test_a_broken_video_names_its_place(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(_video(tmp_path / "a.mp4", "libx264").read_bytes()[:700] if content is None else content)
    with pytest.raises(MediaError, match=r"a\.jsonl:4, videos"):
        encode_video(path, where="a.jsonl:4, videos", max_bytes=1 << 20)


def test_images_are_made_small() -> None:
    encoded = encode_image(np.zeros((1000, 2000, 3), np.uint8))
    assert encoded.mime == "image/jpeg" and encoded.note == "2000×1000 pixels" and len(encoded.data) < 20_000


def test_the_budget_counts_what_the_page_holds() -> None:
    budget = Budget(total_bytes=10, medium_bytes=8)
    assert budget.take(Encoded("audio/wav", b"1234567", "")) is None  # 12 characters in base64, over 8
    assert (
        budget.take(Encoded("audio/wav", b"123456", ""))
        == "data:audio/wav;base64," + base64.b64encode(b"123456").decode()
    )
    assert budget.take(Encoded("audio/wav", b"1", "")) is None  # 4 more, over 10
