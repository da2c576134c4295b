"""An OpenAI-compatible server over a local Qwen2.5-Omni thinker: transformers and http.server, run as a script.

    python model_server.py MODEL --num-frames 2 --min-pixels 3136 --max-pixels 3136

prints its port. Messages go through the processor's own chat template one request at a time, greedy, without batches
or padding. Only the choice of a clip's frames is hba's, since every server has its own.
"""

import argparse
import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import PIL.Image
import soundfile
import torch
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from hba.atlas.media import load_video
from hba.model.generate import media_token_ids


class Model:
    def __init__(self, options):
        self.options = options
        self.processor = Qwen2_5OmniProcessor.from_pretrained(options.model)
        loaded = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
        self.model = loaded.eval()
        self.lock = threading.Lock()
        torch.set_num_threads(1)

    def answer(self, asked):
        messages, audios, images, videos, spans = [], [], [], [], []
        for message in asked["messages"]:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            content = []
            for part in parts:
                if part["type"] == "input_audio":
                    samples, rate = soundfile.read(decoded(part["input_audio"]["data"]), dtype="float32")
                    assert rate == 16000
                    audios.append(samples)
                elif part["type"] == "image_url":
                    images.append(PIL.Image.open(decoded(part["image_url"]["url"].partition(",")[2])).convert("RGB"))
                elif part["type"] == "video_url":
                    data = decoded(part["video_url"]["url"].partition(",")[2]).getvalue()
                    video = load_video(data, self.options.num_frames, where="request")
                    videos.append(torch.from_numpy(video.frames).permute(0, 3, 1, 2))
                    spans.append(video.duration_seconds)
                kind = part["type"].removeprefix("input_").removesuffix("_url")
                content.append({"type": "text", "text": part["text"]} if kind == "text" else {"type": kind})
            messages.append({"role": message["role"], "content": content})
        with self.lock, torch.inference_mode():
            return self.generate(messages, audios, images, videos, spans, asked)

    def generate(self, messages, audios, images, videos, spans, asked):
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        pixels = {"min_pixels": self.options.min_pixels, "max_pixels": self.options.max_pixels}
        call = {"text": [text], "return_tensors": "pt"}
        call |= {"audio": audios} if audios else {}
        call |= {"images": images, "images_kwargs": pixels} if images else {}
        call |= {"videos": videos, "videos_kwargs": pixels | {"do_sample_frames": False}} if videos else {}
        inputs = self.processor(**call)
        if videos:
            step = self.processor.video_processor.temporal_patch_size / self.options.num_frames
            inputs["video_second_per_grid"] = torch.tensor([step * span for span in spans])
        tokenizer = self.processor.tokenizer
        tokens = self.model.generate(
            **inputs,
            max_new_tokens=asked["max_tokens"],
            do_sample=False,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=media_token_ids(self.model.config, self.processor),
        )[0, inputs["input_ids"].shape[1] :]
        said = tokenizer.decode(tokens, skip_special_tokens=True)
        usage = {"prompt_tokens": inputs["input_ids"].shape[1], "completion_tokens": len(tokens)}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        return {"object": "chat.completion", "model": asked["model"], "choices": [choice], "usage": usage}


def decoded(text):
    return io.BytesIO(base64.b64decode(text))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model = None

    def log_message(self, *_):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = json.dumps(self.model.answer(asked)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name in ("--num-frames", "--min-pixels", "--max-pixels"):
        parser.add_argument(name, type=int, required=True)
    Handler.model = Model(parser.parse_args())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)  # noqa: T201 - whoever started it reads the port
    server.serve_forever()


if __name__ == "__main__":
    main()
