"""Speech to text through transformers' recognition pipeline, with any model that it loads.

The published transcripts come from openai/whisper-large-v3. A sound longer than 30 s is heard to its end: Whisper
models by their own long-form decoding, others in overlapping windows. Where no speech is recognised there is a
MediaError and no transcript; a model may still invent words over noise, which nothing here can tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hba.atlas.audio import Audio
from hba.errors import HbaError, InputError, MediaError
from hba.storage import file_sha256, json_sha256

WINDOW_SECONDS = 30
_WEIGHTS = (".safetensors", ".json", ".bin", ".model", ".txt")


def extractor_id(model: str) -> str:
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
        try:
            written = (AutoConfig.from_pretrained(model).architectures or [""])[0]
            require_whole(model, getattr(transformers, written))
            with without_load_reports():
                self._pipeline: Any = pipeline("automatic-speech-recognition", model=model, device=device, dtype=dtype)
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
