"""A slice of the fault campaign of `benchmarks/`, and proof that the campaign sees the faults that it is there for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# What is broken on purpose in the process of a campaign: a checksum is not looked at, a decoder crashes or raises an
# error of its own, a refusal names no place.
BROKEN = """
import os
from hba.atlas import media
media._check_archive = lambda *rest: None
media.load_image = lambda source, **options: os.abort() if source.suffix == ".png" else {}[1]
load = media.load_video
media.load_video = lambda *rest, **options: load(*rest, **(options | {"where": "somewhere"}))
"""
SEEN = (
    "pt, flip 1: medium 12: is served altered",
    "png, flip 1: medium 10: the process ends with SIGABRT",
    "jpg, flip 1: medium 11: KeyError: 1",
    "the refusal names no place: somewhere",
)


def campaign(*options, broken=""):
    """Exit code, and what the campaign counted."""
    script = BENCHMARKS / "fault_campaign.py"
    # The media are checked against plain decoders first, so the fault comes after that.
    code = f"""
import runpy, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
sys.argv[0] = {str(script)!r}
import fault_loader
write = fault_loader.write_atlas
def then_break(*rest):
    exec({broken!r}, {{}})
    return write(*rest)
fault_loader.write_atlas = then_break
runpy.run_path({str(script)!r}, run_name="__main__")
"""
    command = [sys.executable, "-c", code, *options, "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode in (0, 1) and done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_damage_is_refused_or_harmless():
    code, found = campaign("--media", "126", "--rows", "60", "--seed", "1")
    assert (code, found["problems"]) == (0, [])
    counts = found["counts"]
    assert sum(counts.values()) == 186 and set(counts) == {"refused", "identical", "altered"}
    assert counts["refused"] > 120
    # No decoder can tell these from sound data; whatever carries a checksum is not among them.
    unprotected = {"wav", "mp3", "m4a", "opus", "mp4", "mkv", "vp8", "vp9", "jpg", "safetensors", "jsonl", "parquet"}
    assert {place.split(",")[0] for place in found["altered"]} <= unprotected


def test_the_campaign_sees_faults():
    code, found = campaign("--media", "26", "--rows", "0", broken=BROKEN)
    assert code == 1
    for message in SEEN:
        assert any(message in problem for problem in found["problems"]), message
