"""What is taken from one sound: openSMILE's ComParE 2016 or eGeMAPSv02 descriptors, and a transcript.

The sound is what every other part of hba hears, 16 kHz mono, from an audio file or the sound track of a clip. A sound
that openSMILE cannot measure (25 ms give nothing but NaN and a warning) is a MediaError, never a file of NaN or zeros.
Saved as {'features'}, as published: [D] for functionals, [T, D] for a sequence of one value each 10 ms.
"""

from __future__ import annotations

import asyncio
import io
import re
import warnings
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import soundfile

from hba.atlas.audio import Audio
from hba.environment import installed_version
from hba.errors import HbaError, InputError, MediaError, nearest
from hba.storage import file_sha256, json_sha256

if TYPE_CHECKING:
    from torch import Tensor

    from hba.remote import ClientConfig


INSTALL = "pip install 'human-behavior-atlas[descriptors]'"


class FeatureSet(NamedTuple):
    """A set and level in openSMILE's own names, how many values it has, and the folder for its files."""

    set_name: str
    level: str
    num_values: int
    folder: str


FEATURE_SETS = {
    "compare": FeatureSet("ComParE_2016", "Functionals", 6373, "opensmile"),
    "compare-lld": FeatureSet("ComParE_2016", "LowLevelDescriptors", 65, "opensmile_lld"),
    "egemaps": FeatureSet("eGeMAPSv02", "Functionals", 88, "opensmile_egemaps"),
}


def feature_set(name: str) -> FeatureSet:
    """The feature set of a command-line name. Raises InputError listing the names."""
    if name not in FEATURE_SETS:
        raise InputError(f"unknown audio descriptor {name!r}", where="--audio", fix=nearest(name, FEATURE_SETS))
    return FEATURE_SETS[name]


def opensmile_id(name: str) -> str:
    """What the manifest calls this extractor: two files of equal id and equal sound are equal.

    Raises HbaError when openSMILE is not installed, InputError for an unknown `name`.
    """
    chosen, version = feature_set(name), installed_version("opensmile")
    if version is None:
        raise HbaError("opensmile is not installed", where="--audio", fix=f"{INSTALL}, or pass --audio none.")
    return f"opensmile {version} {chosen.set_name} {chosen.level} 16 kHz mono"


class Opensmile:
    """openSMILE set up for one feature set, a key of FEATURE_SETS. Raises HbaError when it does not load."""

    def __init__(self, name: str) -> None:
        self._set = feature_set(name)
        try:
            import opensmile  # type: ignore[import-untyped,unused-ignore]
        except (ImportError, OSError) as error:
            raise HbaError(f"opensmile does not load ({error})", where="--audio", fix=INSTALL) from None
        self._smile = opensmile.Smile(
            feature_set=opensmile.FeatureSet[self._set.set_name],
            feature_level=opensmile.FeatureLevel[self._set.level],
        )

    def extract(self, audio: Audio, *, where: str) -> dict[str, Tensor]:
        """{'features': float32 [D] or [T, D]}. Raises MediaError when any value is NaN, infinite or missing."""
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it fills with NaN, which is an error here
            values_TD = self._smile.process_signal(audio.samples, audio.sample_rate).to_numpy(np.float32)
        if values_TD.ndim != 2 or values_TD.shape[1] != self._set.num_values or not len(values_TD):
            what = f"openSMILE gave the shape {list(values_TD.shape)}, expected [T, {self._set.num_values}]"
            raise MediaError(what, where=where, fix="Install the opensmile release of the constraints file.")
        gaps = int((~np.isfinite(values_TD)).sum())
        if gaps:
            what = f"cannot be measured: {gaps:,} of {values_TD.size:,} openSMILE values are NaN or infinite"
            raise MediaError(f"{what} ({audio.seconds:.3f} s of sound)", where=where, fix="Leave the sample out.")
        features = values_TD[0] if self._set.level == "Functionals" else values_TD
        return {"features": torch.from_numpy(features.copy())}


# Speech to text through transformers' recognition pipeline, with any model that it loads.
#
# The published transcripts come from openai/whisper-large-v3. A sound longer than 30 s is heard to its end: Whisper
# models by their own long-form decoding, others in overlapping windows. Where no speech is recognised there is a
# MediaError and no transcript; a model may still invent words over noise, which nothing here can tell.


WINDOW_SECONDS = 30
_WEIGHTS = (".safetensors", ".json", ".bin", ".model", ".txt")


def transcriber_id(model: str) -> str:
    """What the manifest calls this recogniser: a hub id, or a folder by the content of its files."""
    folder = Path(model)
    if not folder.is_dir():
        return f"transformers asr {model}"
    files = sorted((file.name, file_sha256(file)) for file in folder.iterdir() if file.suffix in _WEIGHTS)
    return f"transformers asr {folder.name} {json_sha256(files)[:12]}"


class Transcriber:
    """A loaded recognition model, on the GPU where there is one.

    Raises InputError when `model` cannot be loaded as one.
    """

    def __init__(self, model: str) -> None:
        import torch
        import transformers
        from transformers import AutoConfig, pipeline
        from transformers.utils import logging

        from hba.model.weights import require_whole, without_load_reports

        logging.disable_progress_bar()  # it would mix with the command's own

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if device == "cuda" else torch.float32
        how: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": False}
        try:
            written = (AutoConfig.from_pretrained(model, trust_remote_code=False).architectures or [""])[0]
            require_whole(model, getattr(transformers, written))
            with without_load_reports():
                self._pipeline: Any = pipeline("automatic-speech-recognition", model=model, **how)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, InputError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            fix = "Name a folder or a hub id of a speech recognition model, such as openai/whisper-large-v3."
            raise InputError(f"cannot load a recognition model ({reason})", where=model, fix=fix) from None
        self._is_whisper = self._pipeline.type == "seq2seq_whisper"

    def extract(self, audio: Audio, *, where: str) -> str:
        """The words that are heard. Raises MediaError when there are none or the model fails."""
        options: dict[str, Any] = {}
        if audio.seconds > WINDOW_SECONDS:
            options = {"return_timestamps": True} if self._is_whisper else {"chunk_length_s": WINDOW_SECONDS}
        try:
            heard = self._pipeline({"raw": audio.samples, "sampling_rate": audio.sample_rate}, **options)
        except (RuntimeError, ValueError, IndexError) as error:
            if "out of memory" in str(error):
                raise HbaError("out of memory while transcribing", where=where, fix="Choose a smaller model.") from None
            raise MediaError(f"cannot be transcribed ({error})", where=where, fix="Leave the sample out.") from None
        text = " ".join(heard["text"].split())
        if not text:
            raise MediaError("no speech was recognised", where=where, fix="Write its transcript by hand, or leave it.")
        return text

    def close(self) -> None:
        """Nothing is left open."""


REMOTE = "openai:"
"""before the name of a recogniser that a service has"""
PART_SECONDS = 600  # services take files of up to 25 MB: 13 minutes


class RemoteTranscriber:
    """A recogniser of a service that speaks OpenAI's API, such as whisper-1, by `hba.remote`. Close it.

    Raises ConfigError for a key that is not in the environment.
    """

    def __init__(self, model: str, config: ClientConfig) -> None:
        from hba.remote import RemoteClient  # httpx, which descriptors of files need not

        self._client = RemoteClient(model, config)
        # A loop in a thread of its own: a notebook has one at work in its own.
        self._thread, self._loop = ThreadPoolExecutor(1), asyncio.Runner()
        self._run(self._client.__aenter__())

    def extract(self, audio: Audio, *, where: str) -> str:
        """The words that are heard, of long sounds in parts of ten minutes. Raises MediaError where there are none and
        where the service refuses this sound, ServiceError and UnansweredError where it is the service."""
        from hba.remote import RequestError, UnansweredError

        step, words = PART_SECONDS * audio.sample_rate, list[str]()
        for start in range(0, len(audio.samples), step):
            file = io.BytesIO()
            part = np.clip(audio.samples[start : start + step], -1, 1)
            soundfile.write(file, part, audio.sample_rate, format="FLAC", subtype="PCM_16")
            try:
                words += self._run(self._client.hear(file.getvalue(), name="sound.flac")).split()
            except UnansweredError:
                raise
            except RequestError as error:
                raise MediaError(f"cannot be transcribed ({error.what})", where=where, fix="Leave it out.") from None
        if not words:
            raise MediaError("no speech was recognised", where=where, fix="Write its transcript by hand, or leave it.")
        return " ".join(words)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            return self._thread.submit(self._loop.run, work).result()
        except HbaError as error:
            in_options_of_recogniser(error)

    def close(self) -> None:
        """Close the connections."""
        self._run(self._client.__aexit__())
        self._thread.submit(self._loop.close).result()
        self._thread.shutdown()


def in_options_of_recogniser(error: HbaError) -> NoReturn:
    """Raise an error of a client in the words of the options that say where a recogniser is: the keys of `remote` are
    the model's own."""

    def said(text: str) -> str:
        for key, option in (("base_url", "--transcribe-url"), ("api_key_env", "--transcribe-key-env")):
            text = re.sub(rf"(?:remote\.)?\b{key}=", f"{option} ", text)
            text = re.sub(rf"(?:remote\.)?\b{key}\b", option, text)
        return text

    raise type(error)(error.what, where=said(error.where), fix=said(error.fix)) from None
