"""Fixtures that many tests share: one tiny mini-atlas and one tiny backbone a session."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

try:
    import torch
except ImportError:  # the light install, in which the tests run that ask for no model
    torch = None
try:
    import hypothesis
except ImportError:  # the environments of verl and vLLM, none of whose tests asks for it
    pass
else:  # how long an example takes says how busy the machine is; the same examples every time, so that a fault is the
    # change's and not the day's (`pytest --hypothesis-profile default` looks for new ones)
    unhurried = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("hba", derandomize=True, **unhurried)
    hypothesis.settings.load_profile("hba")
# Tests need no hub; offline, a wrong name fails at once instead of after retries.
os.environ["HF_HUB_OFFLINE"] = "1"
if torch is not None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mini_atlas(tmp_path_factory):
    """Folder of a mini-atlas of size tiny."""
    from hba.mini import build_mini_atlas

    out = tmp_path_factory.mktemp("mini") / "atlas"
    build_mini_atlas(out, size="tiny", seed=0, workers=1)
    return out


@pytest.fixture(scope="session")
def backbone(tmp_path_factory, mini_atlas):
    """Folder of a tiny backbone whose tokenizer knows the mini-atlas."""
    from hba import open_atlas
    from hba.model.tiny import atlas_texts, build_tiny

    out = tmp_path_factory.mktemp("tiny") / "backbone"
    return build_tiny(out, atlas_texts(open_atlas(mini_atlas, split="train")), seed=0)


@pytest.fixture(scope="session")
def model(backbone):
    """The tiny OmniSapiens with fresh heads, in evaluation mode; tests must not change it."""
    from hba.model import OmniSapiens

    torch.manual_seed(0)
    return OmniSapiens.from_pretrained(backbone).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory, mini_atlas):
    """A clip, a sound, a picture and a text."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("mine")
    shutil.copy(next(iter(sorted(mini_atlas.rglob("*.mp4")))), folder / "clip.mp4")
    shutil.copy(next(iter(sorted(mini_atlas.rglob("*.wav")))), folder / "sound.wav")
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(folder / "picture.png")
    (folder / "words.txt").write_text("Well, that went wonderfully.\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def answering(tmp_path_factory, backbone):
    """A checkpoint with heads that also speaks, and that nobody has trained."""
    from serving import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("answering") / "checkpoint", backbone)


@pytest.fixture
def hba(monkeypatch, capfd):
    """Call the entry point in this process: exit code, standard output, standard error."""
    from hba.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hba", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def chat_server():
    """Start chat servers of tests/servers/chat.py: `chat_server(brain="echo", seed=0, **faults)`.

    Each has `.url` (with /v1), `.stats()`, `.hold(answers)`, `.release()` and `.process`.
    """
    servers = []

    def start(brain="echo", seed=0, **faults):
        script = Path(__file__).parent / "servers" / "chat.py"
        options = ["--brain", brain, "--seed", str(seed), "--faults", json.dumps(faults)]
        process = subprocess.Popen([sys.executable, str(script), *options], stdout=subprocess.PIPE, text=True)
        servers.append(process)
        root = f"http://127.0.0.1:{int(process.stdout.readline())}"
        asked = {"stats": lambda: _get(f"{root}/stats"), "release": lambda: _get(f"{root}/release")}
        asked["hold"] = lambda answers: _get(f"{root}/hold/{answers}")
        return SimpleNamespace(url=f"{root}/v1", process=process, **asked)

    yield start
    for process in servers:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def launch():
    """Run an `hba` command on many ranks: tests/servers/ranks.py says how."""
    from ranks import RankLauncher

    launcher = RankLauncher()
    yield launcher
    launcher.close()


def _get(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=120) as response:
        return json.load(response)


@pytest.fixture(autouse=True)
def ordinary_floats():
    """Commands flush denormal numbers for the whole process; hypothesis refuses to work then."""
    yield
    if torch is not None:
        torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    """A Whisper whose letters are likelier than its control tokens."""
    import torch
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    control = (
        *("endoftext", "startoftranscript", "en", "translate", "transcribe"),
        *("startofprev", "nospeech", "notimestamps"),
    )
    folder = tmp_path_factory.mktemp("asr") / "whisper"
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=letters, merges=[])
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in control])
    tokenizer.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", special=False) for i in range(1501)])
    number = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in control}
    special = {"eos_token_id": number["endoftext"], "pad_token_id": number["endoftext"]}
    special |= {"bos_token_id": number["endoftext"], "decoder_start_token_id": number["startoftranscript"]}
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_target_positions": 64}
    config = WhisperConfig(vocab_size=len(tokenizer), **layers, **sizes, **special)
    model = WhisperForConditionalGeneration(config)
    model.model.decoder.embed_tokens.weight.data[len(letters) :] *= 0.01
    model.generation_config = GenerationConfig(
        **special,
        is_multilingual=True,
        lang_to_id={"<|en|>": number["en"]},
        task_to_id={"transcribe": number["transcribe"], "translate": number["translate"]},
        no_timestamps_token_id=number["notimestamps"],
        prev_sot_token_id=number["startofprev"],
        max_initial_timestamp_index=50,
        alignment_heads=[[0, 0]],
        max_length=16,
    )
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(folder)
    return folder
