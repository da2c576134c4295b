"""`encode.sound_of_clips`, `fps` and `clip_pixels`: what of a clip is heard, and how much of it is seen."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import hba as package
from hba.atlas import open_atlas
from hba.atlas.media import load_audio, load_video
from hba.atlas.video import frames_at
from hba.batch.config import EncodeConfig, LoaderConfig, load_media
from hba.batch.encode import Encoder, ResizeAsProcessor, collate, require_perceived
from hba.batch.loader import load_batches
from hba.config import load_config
from hba.errors import ConfigError, InputError, MediaError
from hba.evaluate.backends.interface import open_backend
from hba.evaluate.backends.vllm import engine_inputs
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import EVERYTHING, open_rows
from hba.model import OmniSapiens, checkpoint
from hba.rl.config import RlConfig
from hba.rl.verl.config import Place, translate
from hba.run import RunFolder
from hba.train.config import SftConfig
from hba.train.sft import train_sft

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_chat
from media_corpus import movie

SEEN = {"num_frames": 4, "min_pixels": 3136, "max_pixels": 3136}
INTERLEAVING = ("qwen2.5-omni", "qwen3-omni")
ROWS = {  # id: what the row names
    "clip": {"videos": ["m/clip.mp4"]},
    "long": {"videos": ["m/long.mp4"]},
    "silent": {"videos": ["m/silent.mp4"]},
    "itself": {"videos": ["m/clip.mp4"], "audios": ["m/clip.mp4"]},
    "named": {"videos": ["m/clip.mp4"], "audios": ["m/other.wav"]},
    "two": {"videos": ["m/clip.mp4", "m/long.mp4"]},
    "half": {"videos": ["m/clip.mp4", "m/silent.mp4"]},
    "words": {},
}


def film(path, seconds, *, sound=True, size=(96, 64)):
    """A clip, whose sound is as long as its frames."""
    numbers = range(round(seconds * 10))
    path.write_bytes(movie("mp4", "libx264", numbers, rate=10, size=size, sound="aac" if sound else ""))


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """Clips with and without a sound track, in rows that name sounds or do not."""
    folder = tmp_path_factory.mktemp("heard") / "atlas"
    (folder / "m").mkdir(parents=True)
    film(folder / "m/clip.mp4", 1.5)
    film(folder / "m/long.mp4", 4.6)
    film(folder / "m/silent.mp4", 1.5, sound=False)
    soundfile.write(folder / "m/other.wav", np.random.default_rng(1).uniform(-0.2, 0.2, 22050), 22050)
    row = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "t"}
    lines = []
    for name, media in ROWS.items():
        kinds = [kind for kind in ("video", "audio") if f"{kind}s" in media]
        lines.append(row | media | {"id": name, "modality_signature": "_".join(["text", *kinds])})
    soundfile.write(folder / "m/clip.wav", load_audio(folder / "m/clip.mp4", where="x").samples, 16000, "FLOAT")
    media = {"videos": ["m/clip.mp4"], "audios": ["m/clip.wav"], "modality_signature": "text_video_audio"}
    lines.append(row | media | {"id": "taken out"})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def rows(atlas):
    return {sample.id: sample for sample in open_atlas(atlas, split="train")}


@pytest.fixture(scope="module")
def families(tmp_path_factory, backbone):
    """Tiny models, each made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("families"), {"qwen2.5-omni": backbone}

    def of(family):
        if family not in made:
            made[family] = tiny_chat.build(family, backbone, folder / family)
        return made[family]

    return of


def encoder_of(place, **encode):
    return Encoder(checkpoint.load_processor(place), EncodeConfig(**SEEN | encode))


def batch_of(encoder, *samples):
    return collate([encoder.encode(sample) for sample in samples], pad_token_id=encoder.pad_token_id)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- what is heard ---


def test_separate_is_the_row_that_names_the_sound_of_its_clip(backbone, rows):
    plain, heard = encoder_of(backbone), encoder_of(backbone, sound_of_clips="separate")
    taken_out = batch_of(plain, rows["taken out"]).inputs
    assert equal(batch_of(heard, rows["clip"]).inputs, taken_out)
    assert "input_features" not in batch_of(plain, rows["clip"]).inputs  # off, as before
    for name in ("named", "itself", "taken out", "words"):  # rows that name a sound, or have no clip, as before
        assert equal(batch_of(heard, rows[name]).inputs, batch_of(plain, rows[name]).inputs), name
    assert len(batch_of(heard, rows["two"]).inputs["feature_attention_mask"]) == 2
    alone = encoder_of(backbone, sound_of_clips="separate", modalities=("audio",))
    assert list(batch_of(alone, rows["clip"]).inputs) == [
        "input_ids", "attention_mask", "input_features", "feature_attention_mask",
    ]  # fmt: skip


@pytest.mark.parametrize("family", INTERLEAVING)
def test_interleaved_logits_are_those_of_transformers_own_processor_and_model(families, rows, atlas, family):
    model = OmniSapiens.from_pretrained(families(family), dtype="float32").eval()
    encoder = encoder_of(families(family), sound_of_clips="interleaved")
    transformer, processor = model.transformer, encoder.processor
    for name in ("clip", "long"):
        clip = load_video(atlas / f"m/{name}.mp4", 4, where="x")
        pixels = {"min_pixels": 3136, "max_pixels": 3136}
        message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "How?"}]}
        theirs = processor(
            text=[processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)],
            audio=[load_audio(atlas / f"m/{name}.mp4", where="x").samples],
            videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2)],
            videos_kwargs={**pixels, "use_audio_in_video": True, "fps": clip.rate_hz, "do_sample_frames": False},
            audio_kwargs={"sampling_rate": 16000, "truncation": False},
            return_tensors="pt",
        )
        ours = batch_of(encoder, rows[name]).inputs
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        ids = ours["input_ids"][0].tolist()
        sounds = [i for i, token in enumerate(ids) if token == transformer.config.audio_token_id]
        frames = [i for i, token in enumerate(ids) if token == transformer.config.video_token_id]
        if name == "long":
            assert sounds[0] < frames[-1]  # some sound stands before the last frame, some behind it
        assert frames[0] < sounds[0] < sounds[-1] and frames[-1] < sounds[-1]
        with torch.no_grad():
            wanted = transformer(**theirs, use_audio_in_video=True, use_cache=False).logits
            found = transformer(**ours, use_cache=False).logits
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
            names = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
            given, lengths = [ours.get(each) for each in names], ours["feature_attention_mask"].sum(1)
            seconds = ours["video_second_per_grid"]
            own = type(transformer).get_rope_index(transformer, *given, True, lengths, seconds)
            placed = transformer.get_rope_index(*given, ours["use_audio_in_video"], lengths, seconds)
            assert all(map(torch.equal, own, placed))
            apart = batch_of(encoder_of(families(family), sound_of_clips="separate"), rows[name]).inputs
            assert apart["input_ids"].shape == ours["input_ids"].shape  # the same media in another order
            assert not torch.allclose(transformer(**apart, use_cache=False).logits[:, -1], found[:, -1], atol=1e-5)


@pytest.mark.parametrize("family", INTERLEAVING)
def test_rows_of_a_batch_are_placed_as_each_alone(families, rows, family):
    """Interleaved clips beside a clip without sound, other sounds of a row and text alone, padded."""
    model = OmniSapiens.from_pretrained(families(family), dtype="float32").eval()
    encoder = encoder_of(families(family), sound_of_clips="interleaved")
    samples = [rows[name] for name in ("named", "silent", "long", "words", "clip", "itself")]
    together = batch_of(encoder, *samples)
    assert together.inputs["use_audio_in_video"].tolist() == [False, False, True, False, True, True]
    said = [one.ids for one in model.say(together, max_new_tokens=3)]
    probable = model.logps(together, [["sad", "not sad at all"]] * len(samples))
    with torch.no_grad():
        pooled = model(together).pooled_BH
        for place, sample in enumerate(samples):
            alone = batch_of(encoder, sample)
            torch.testing.assert_close(model(alone).pooled_BH[0], pooled[place], atol=1e-5, rtol=1e-4)
            assert model.say(alone, max_new_tokens=3)[0].ids == said[place]
            assert model.logps(alone, [["sad", "not sad at all"]])[0] == pytest.approx(probable[place], abs=1e-3)
    assert torch.equal(together.inputs["input_ids"][-1], together.inputs["input_ids"][-2])  # a row that names its clip


def test_a_clip_without_a_sound_track_is_seen_alone_named_and_counted(backbone, atlas, rows, caplog):
    plain = encoder_of(backbone)
    for how in ("separate", "interleaved"):
        heard = encoder_of(backbone, sound_of_clips=how)
        assert equal(batch_of(heard, rows["silent"]).inputs, batch_of(plain, rows["silent"]).inputs)
    heard = encoder_of(backbone, sound_of_clips="separate")
    opened = open_atlas(atlas, split="train")
    plan = [np.arange(len(opened))] * 2
    for _ in range(2):  # what is loaded again, such as a validation, says nothing anew
        batches = load_batches(opened, heard, plan, LoaderConfig(workers=0))
        assert not next(batches).quarantined
        batches.close()
    told = [record.getMessage() for record in caplog.records if "sound track" in record.getMessage()]
    assert len(told) == 2
    assert "train.jsonl:3" in told[0] and "2 samples" in told[1] and "train/half, train/silent" in told[1]


def test_clips_of_which_some_are_silent_cannot_be_interleaved_in_one_row(backbone, rows):
    encoder = encoder_of(backbone, sound_of_clips="interleaved")
    with pytest.raises(MediaError, match=r"videos: 1 of 2 clips have no sound track.*separate"):
        encoder.encode(rows["half"])
    with pytest.raises(MediaError, match=r"clips of different frame rates in one prompt.*separate"):
        encoder.encode(rows["two"])


def test_a_sound_of_a_clip_that_is_too_long_is_refused_or_cut_as_others(backbone, rows):
    how = {"sound_of_clips": "separate", "max_audio_seconds": 1.0}
    with pytest.raises(MediaError, match=r"train\.jsonl:2, videos: audio of 4\.\d s, more than max_audio_seconds"):
        encoder_of(backbone, **how).encode(rows["long"])
    cut = encoder_of(backbone, **how, long_audio="head").encode(rows["long"])
    assert cut.mels[0].shape[1] == 100
    parts = encoder_of(backbone, **how | {"max_audio_seconds": 2.4}, long_audio="windows").encode(rows["long"])
    assert len(parts.windows) == 1


def test_what_cannot_be_heard_so_is_refused_in_one_sentence(families, backbone, atlas, monkeypatch):
    columns = open_atlas(atlas, split="train").filter(modalities=["text_video"]).columns
    refused = {
        "gemma4": ("interleaved", "Gemma4Processor takes no sound among the frames of a clip.*separate"),
        "qwen2.5-vl": ("separate", "Qwen2_5_VLProcessor takes no audio, so that it hears no clip"),
    }
    for family, (how, said) in refused.items():
        processor = checkpoint.load_processor(families(family))
        with pytest.raises(InputError, match=said):
            require_perceived(processor, EncodeConfig(sound_of_clips=how), columns, where="x")
    require_perceived(checkpoint.load_processor(families("gemma4")), EncodeConfig(sound_of_clips="separate"), columns,
                      where="x")  # fmt: skip
    with pytest.raises(ConfigError, match="cannot be cut into windows"):
        EncodeConfig(sound_of_clips="interleaved", long_audio="windows")
    monkeypatch.setattr("hba.batch.encode.load_media", lambda *_, **__: pytest.fail("a medium was read"))
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "x")
    asked = {
        ("openai", "interleaved", ""): "no API takes sound among the frames",
        ("openai", "separate", "file"): "with video=file a clip brings its sound along",
        ("anthropic", "separate", ""): "the anthropic API takes no audio",
        ("vllm", "interleaved", ""): "the vllm backend interleaves no sound",
    }
    for (backend, how, video), said in asked.items():
        given = [f"encode.sound_of_clips={how}", "remote.base_url=http://127.0.0.1:9/v1", f"video={video or 'frames'}"]
        config = load_config(PredictConfig, None, given)
        model = str(backbone) if backend == "vllm" else "m"
        options = {"split": "train", "config": config, "backend": backend, "selection": EVERYTHING}
        with pytest.raises((InputError, ConfigError), match=said):
            open_backend(backend, open_rows(model, str(atlas), **options))
    given = ["atlas=x", "model.name=m", "model.strategy=full", "encode.sound_of_clips=separate"]
    with pytest.raises(ConfigError, match=r"encode\.sound_of_clips: verl takes clips as the rows have them"):
        translate(load_config(RlConfig, None, given), Place(Path("run"), "m", 1))
    given[-1:] = ["encode.sound_of_clips=interleaved", "rollout.sampler=server", "remote.base_url=http://x/v1"]
    with pytest.raises(ConfigError, match="a sampling server interleaves no sound"):
        load_config(RlConfig, None, given)


def test_servers_and_vllm_get_the_sound_of_a_clip_beside_it(backbone, atlas, rows):
    given = ["encode.sound_of_clips=separate", "encode.num_frames=4", "remote.base_url=http://127.0.0.1:9/v1"]
    config = load_config(PredictConfig, None, given)
    options = {"split": "train", "config": config, "backend": "openai", "selection": EVERYTHING}
    backend = open_backend("openai", open_rows("m", str(atlas), **options))
    kinds = {
        name: [part["type"] for part in backend.request(rows[name]).messages[-1]["content"]]
        for name in ("clip", "silent", "taken out")
    }
    assert kinds["clip"] == kinds["taken out"] and "input_audio" in kinds["clip"]
    assert "input_audio" not in kinds["silent"] and kinds["silent"].count("image_url") == 4
    encoder = encoder_of(backbone, sound_of_clips="separate")
    found = engine_inputs(rows["clip"], encoder.processor, encoder.config, encoder.wording)
    named = engine_inputs(rows["taken out"], encoder.processor, EncodeConfig(**SEEN), encoder.wording)
    assert found["prompt"] == named["prompt"] and len(found["multi_modal_data"]["audio"]) == 1
    assert "audio" not in engine_inputs(rows["silent"], encoder.processor, encoder.config, encoder.wording)[
        "multi_modal_data"
    ]


def test_a_run_is_asked_as_it_was_trained(backbone, atlas, tmp_path, monkeypatch):
    """Training, prediction by its checkpoint, and `hba ask` of the same clip, which its rows name alone."""
    given = [f"atlas={atlas}", f"model.name={backbone}", "model.strategy=heads", "train.batch_size=4"]
    given += ["train.max_steps=1", "validation_split=train[:2]", "loader.workers=0", "model.dtype=float32"]
    given += [f"encode.{key}={value}" for key, value in {**SEEN, "sound_of_clips": "interleaved"}.items()]
    config = load_config(SftConfig, None, given)
    seen = []

    def collated(encoded, **options):
        seen.extend((one.sample.id, one.interleaved, one.input_ids_T.tolist()) for one in encoded)
        return collate(encoded, **options)

    monkeypatch.setattr("hba.batch.loader.collate", collated)
    with RunFolder.open(tmp_path / "run", config=config, command="train sft", seed=0) as run:
        train_sft(config, run)
    trained = {name: (interleaved, len(ids)) for name, interleaved, ids in seen}
    assert trained["clip"][0]
    seen.clear()
    opened = open_rows(str(tmp_path / "run"), str(atlas), split="train", config=PredictConfig(), backend=None,
                       selection=EVERYTHING)  # fmt: skip
    assert opened.encode == config.encode
    replies = package.ask(tmp_path / "run", [atlas / "m/clip.mp4", atlas / "m/silent.mp4"], tasks=["EMO"])
    assert [reply.error for reply in replies] == [None, None]
    assert [interleaved for _, interleaved, _ in seen] == [True, False]


def test_frames_and_sounds_of_clips_are_decoded_once(backbone, atlas, tmp_path):
    """With a rate, a budget of pixels and interleaved sounds: the same to the bit, and nothing is read again."""
    how = {"sound_of_clips": "interleaved", "fps": 2.0, "num_frames": 8, "clip_pixels": 25088, "max_pixels": 12544}
    opened = open_atlas(atlas, split="train").filter(modalities=["text_video"]).select(np.arange(2))
    kept = LoaderConfig(workers=0, cache_megabytes=0, decode_once=True, decoded_folder=str(tmp_path / "kept"))
    found = []
    for loader in (LoaderConfig(workers=0, cache_megabytes=0), kept, kept):
        found.append(next(load_batches(opened, encoder_of(backbone, **how), [np.arange(2)], loader)).inputs)
        if len(found) == 2:
            spoiled = {path: path.read_bytes() for path in (atlas / "m").glob("*.mp4")}
            for path, data in spoiled.items():
                status = path.stat()
                path.write_bytes(bytes(len(data)))
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for path, data in spoiled.items():
        path.write_bytes(data)
    assert equal(found[0], found[1]) and equal(found[0], found[2])


# --- what is seen ---


@pytest.mark.parametrize(
    ("seconds", "fps", "most", "count"),
    [(4.6, 1.0, 8, 4), (4.6, 2.0, 8, 8), (4.6, 2.0, 16, 8), (0.3, 1.0, 8, 2), (3.0, 1.0, 8, 2), (4.0, 1.0, 8, 4)],
)
def test_frames_are_taken_by_a_rate_up_to_the_number(seconds, fps, most, count):
    assert frames_at(fps, seconds, most) == count


def test_a_rate_gives_the_frames_of_that_number(rows, atlas):
    media = load_media(rows["two"], EncodeConfig(num_frames=8, fps=1.0), 16000)
    assert [len(video.frames) for video in media.videos] == [2, 4]
    for video, name, count in zip(media.videos, ("clip", "long"), (2, 4), strict=True):
        fixed = load_video(atlas / f"m/{name}.mp4", count, where="x")
        assert np.array_equal(video.frames, fixed.frames) and video.duration_seconds == fixed.duration_seconds
    through = load_video(atlas / "m/long.mp4", 8, where="x", fps=1.0, frames="nearest_keyframe")
    assert len(through.frames) == 4


@pytest.mark.parametrize("family", ["qwen2.5-omni", "qwen3-vl"])
def test_all_frames_of_a_clip_stay_within_a_budget(families, tmp_path, family):
    (tmp_path / "m").mkdir()
    film(tmp_path / "m/wide.mp4", 0.8, size=(640, 360))
    row = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "t", "videos": ["m/wide.mp4"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row | {"modality_signature": "text_video"}) + "\n")
    (sample,) = open_atlas(tmp_path, split="train")
    processor = checkpoint.load_processor(families(family))
    per_patch = processor.video_processor.patch_size**2 * processor.video_processor.temporal_patch_size
    areas = {}
    for budget in (None, 200_704, 100_352):
        config = EncodeConfig(num_frames=8, clip_pixels=budget, modalities=("video",))
        found = Encoder(processor, config).encode(sample)
        areas[budget] = int(found.media["video_grid_thw"].prod()) * per_patch
    assert areas[None] > 200_704 >= areas[200_704] > areas[100_352] > 30_000 and areas[100_352] <= 100_352
    per_frame = EncodeConfig(num_frames=8, max_pixels=200_704 // 8, modalities=("video",))
    alone = Encoder(processor, per_frame).encode(sample)
    assert int(alone.media["video_grid_thw"].prod()) * per_patch == areas[200_704]


def test_a_budget_is_refused_where_frames_have_one_size_and_where_it_cannot_be_met(families, rows):
    with pytest.raises(ConfigError, match=r"clip_pixels: 12544 pixels are fewer than num_frames \* min_pixels"):
        EncodeConfig(num_frames=8, clip_pixels=12544)
    processor = checkpoint.load_processor(families("gemma4"))
    with pytest.raises(ConfigError, match="Gemma4Processor does not make the frames of a clip smaller together"):
        Encoder(processor, EncodeConfig(clip_pixels=100_352)).encode(rows["clip"])


def test_without_a_budget_frames_are_resized_as_before(backbone):
    processor = checkpoint.load_processor(backbone)
    frames = np.random.default_rng(0).integers(0, 255, (4, 360, 640, 3), np.uint8)
    one, other = (
        ResizeAsProcessor.of(processor, EncodeConfig(num_frames=4, clip_pixels=budget))
        for budget in (None, 4 * 50176)
    )
    assert np.array_equal(one(frames), other(frames)) and one.key != other.key
