"""The tiny omni backbone as a chat model for other harnesses: text and sound in, a few greedy tokens out."""

from __future__ import annotations

import soundfile
import torch
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration


class TinyChat:
    def __init__(self, folder: str) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder).eval()

    def answer(self, text: str, sounds: list) -> str:
        content = [{"type": "audio"} for _ in sounds] + [{"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        audio = [soundfile.read(path, dtype="float32")[0] for path in sounds] or None
        inputs = self.processor(text=prompt, audio=audio, return_tensors="pt")
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def scripted(sample_id: str, target: str) -> str:
    """A known answer for every sample: right for most, another word or none of the labels for others."""
    number = int(sample_id.split("/")[-1])
    return ["no label at all", "anger", "neutral"][number % 3] if number % 4 == 0 else f"\\boxed{{{target}}}"
