"""Every sound and clip of the corpus is served as it is, or refused; the ffmpeg of the command line says the same."""

from __future__ import annotations

import io
import shutil
import struct
import sys
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # the corpus is shared with benchmarks

import media_corpus as corpus
from hba.atlas import source
from hba.atlas.media import SAMPLE_RATE, load_audio, load_image, load_video
from hba.atlas.probe import probe
from hba.atlas.video import read_frames
from hba.errors import MediaError

WHERE = "train.jsonl:1, videos"
NUM_FRAMES = 8
SOUNDS, CLIPS = corpus.sounds(), corpus.clips()


def build(cases: dict, name: str) -> corpus.Clip | corpus.Sound:
    try:
        return cases[name]()
    except FileNotFoundError:
        pytest.skip("there is no ffmpeg on this machine to make it")


@pytest.mark.parametrize("name", SOUNDS)
def test_sound(name: str) -> None:
    case = build(SOUNDS, name)
    if case.refused:
        with pytest.raises(MediaError, match=case.refused):
            load_audio(case.data, where=WHERE)
        return
    audio = load_audio(case.data, where=WHERE)
    assert audio.seconds == pytest.approx(case.seconds, abs=1.5 / SAMPLE_RATE)
    # Nothing is silent, repeated or left out in the middle: the tone rises from its beginning on.
    assert np.abs(audio.samples).max() > 0.2
    assert probe(case.data, "audios", where=WHERE, quick=False, hashed=False).seconds == round(audio.seconds, 3)
    if shutil.which("ffmpeg") and not case.ffmpeg:
        assert corpus.seconds_by_ffmpeg(case.data) == pytest.approx(audio.seconds, abs=1.5 / SAMPLE_RATE)


@pytest.mark.parametrize("name", CLIPS)
def test_clip(name: str) -> None:
    case = build(CLIPS, name)
    if case.refused:
        with pytest.raises(MediaError, match=case.refused):
            load_video(case.data, NUM_FRAMES, where=WHERE)
        return
    video = load_video(case.data, NUM_FRAMES, where=WHERE)
    ticks = np.array(case.ticks or range(len(case.numbers)))
    centres = (np.arange(NUM_FRAMES) + 0.5) / NUM_FRAMES * (ticks[-1] + 1 - ticks[0]) + ticks[0]
    places = np.searchsorted(ticks, centres + 1e-6, side="right") - 1
    assert [corpus.number_of(frame) for frame in video.frames] == [case.numbers[place] for place in places]
    shown = video.timestamps_seconds - video.timestamps_seconds[0]
    spacing = video.duration_seconds / (ticks[-1] + 1 - ticks[0])
    np.testing.assert_allclose(shown, (ticks[places] - ticks[places[0]]) * spacing, atol=0.011)
    facts = probe(case.data, "videos", where=WHERE, quick=False, hashed=False)
    assert facts.frames == len(case.numbers)
    assert facts.seconds == pytest.approx(video.duration_seconds, abs=0.09)
    if shutil.which("ffmpeg") and not case.ffmpeg:
        truth = corpus.frames_by_ffmpeg(case.data)
        assert [corpus.number_of(frame) for frame in truth] == case.numbers
        for frame, place in zip(video.frames, places, strict=True):
            assert np.abs(frame.astype(int) - truth[place]).mean() < 4  # two releases of swscale


# What is shown of a frame with red, green, blue and white quarters: upper left, upper right, lower left, lower right.
ORIENTATIONS = {
    (1, 0, 0, 1): "RGBW",
    (-1, 0, 0, 1): "GRWB",
    (1, 0, 0, -1): "BWRG",
    (-1, 0, 0, -1): "WBGR",
    (0, 1, -1, 0): "BRWG",
    (0, -1, 1, 0): "GWRB",
    (0, 1, 1, 0): "RBGW",
    (0, -1, -1, 0): "WGBR",
}
EXIF = dict(
    zip((1, 2, 3, 4, 5, 6, 7, 8), ("RGBW", "GRWB", "WBGR", "BWRG", "RBGW", "BRWG", "WGBR", "GWRB"), strict=True)
)


def quarters() -> np.ndarray:
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32], image[:24, 32:], image[24:, :32], image[24:, 32:] = (
        *((220, 30, 30), (30, 220, 30)),
        *((30, 30, 220), (200, 200, 200)),
    )
    return image


def corners(image: np.ndarray) -> str:
    height, width = image.shape[0] // 4, image.shape[1] // 4
    found = (image[y * height, x * width].astype(int) for y, x in ((1, 1), (1, 3), (3, 1), (3, 3)))
    return "".join("W" if colour.min() > 150 else "RGB"[int(colour.argmax())] for colour in found)


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_display_matrices_of_clips(tmp_path: Path, matrix: tuple[int, ...]) -> None:
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(quarters(), format="rgb24")))
        out.mux(stream.encode())
    data = (tmp_path / "v.mp4").read_bytes()
    at = data.index(b"tkhd") + 44
    a, b, c, d = (entry << 16 for entry in matrix)
    turned = data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]
    shown = load_video(turned, 2, where=WHERE).frames[1]
    assert (corners(shown), shown.shape[0] > shown.shape[1]) == (ORIENTATIONS[matrix], matrix[0] == 0)
    np.testing.assert_array_equal(shown, list(read_frames(turned, where=WHERE))[1].pixels)
    if shutil.which("ffmpeg"):
        assert corners(corpus.frames_by_ffmpeg(turned)[1]) == ORIENTATIONS[matrix]


def test_a_clip_that_is_turned_by_half_a_quarter_is_refused() -> None:
    data = corpus.movie("mp4", "libx264", range(5))
    at = data.index(b"tkhd") + 44
    turned = data[:at] + struct.pack(">9i", 46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30) + data[at + 36 :]
    with pytest.raises(MediaError, match="rotated by another angle"):
        load_video(turned, 2, where=WHERE)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [*EXIF, 0, 9])
def test_orientations_of_pictures(form: str, orientation: int) -> None:
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x112] = orientation
    PIL.Image.fromarray(quarters()).save(file, form, exif=exif)
    assert corners(load_image(file.getvalue(), where=WHERE)) == EXIF.get(orientation, "RGBW")


def test_what_is_not_on_the_list_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container whose codec is not on the list is opened, and its decoder is not run."""
    monkeypatch.setattr(source, "CODECS", source.CODECS - {"mpeg4"})
    with pytest.raises(MediaError, match=r"a codec that is not read \(mpeg4\)"):
        load_video(corpus.movie("avi", "mpeg4", range(5)), 2, where=WHERE)
