"""An OpenAI-compatible server over a local Qwen2.5-Omni thinker: transformers and http.server, run as a script.

    python model_server.py MODEL --num-frames 2 --min-pixels 3136 --max-pixels 3136

prints its port. Messages go through the processor's own chat template one request at a time, without batches or
padding. Only the choice of a clip's frames is hba's, since every server has its own. Of vLLM it has what sampling for
training needs: choices by seed, token ids, log-probabilities of what was sampled, frame lists as videos, processor
settings of a request, adapters by name, weights loaded in place while paused. A POST to /restart gives it the weights
with which it was started, one to /faults makes it misbehave: {"stale": true} keeps its weights, {"mute": true} gives no
token ids, {"deaf": true} has its own size of frames, {"short": true} cuts responses, {"busy": n} and {"die": n} refuse
n requests and exit at the n-th, {"shift": x} has other log-probabilities.
"""

import argparse
import base64
import io
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import soundfile
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LogitsProcessor, LogitsProcessorList

from hba.atlas.media import load_video
from hba.model.generate import media_token_ids
from hba.model.weights import silence_transformers


class Model:
    def __init__(self, options):
        silence_transformers()  # before it knows the class: whoever started the server reads its port alone
        from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

        self.options, self.faults = options, {}
        self.processor = Qwen2_5OmniProcessor.from_pretrained(options.model)
        loaded = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
        self.model = loaded.eval()
        self.lock = threading.Lock()
        self.adapters, self.paused, self.loads, self.chats, self.key = {}, False, 0, 0, None
        self.started = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
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
                    frames, span = self.clip(part["video_url"]["url"], asked.get("mm_processor_kwargs", {}))
                    videos.append(torch.from_numpy(frames).permute(0, 3, 1, 2))
                    spans.append(span)
                kind = part["type"].removeprefix("input_").removesuffix("_url")
                content.append({"type": "text", "text": part["text"]} if kind == "text" else {"type": kind})
            messages.append({"role": message["role"], "content": content})
        with self.lock, torch.inference_mode():
            return self.generate(messages, audios, images, videos, spans, asked)

    def clip(self, url, kwargs):
        """Frames [N, H, W, 3] and the seconds that they are spread over."""
        kind, _, data = url.partition(",")
        if kind == "data:video/jpeg;base64":
            frames = np.stack([np.asarray(PIL.Image.open(decoded(frame))) for frame in data.split(",")])
            return frames, len(frames) / kwargs["fps"]
        video = load_video(decoded(data).getvalue(), self.options.num_frames, where="request")
        return video.frames, video.duration_seconds

    def generate(self, messages, audios, images, videos, spans, asked):
        asks, goes_on = asked.get("add_generation_prompt", True), asked.get("continue_final_message", False)
        how = {"add_generation_prompt": asks, "continue_final_message": goes_on}
        text = self.processor.apply_chat_template(messages, tokenize=False, **how)
        pixels = {"min_pixels": self.options.min_pixels, "max_pixels": self.options.max_pixels}
        if not self.faults.get("deaf"):
            pixels |= {k: v for k, v in asked.get("mm_processor_kwargs", {}).items() if k in pixels}
        call = {"text": [text], "return_tensors": "pt"}
        call |= {"audio": audios} if audios else {}
        call |= {"images": images, "images_kwargs": pixels} if images else {}
        call |= {"videos": videos, "videos_kwargs": pixels | {"do_sample_frames": False}} if videos else {}
        inputs = self.processor(**call)
        if videos:
            patch = self.processor.video_processor.temporal_patch_size
            steps = [patch / len(clip) * span for clip, span in zip(videos, spans, strict=True)]
            inputs["video_second_per_grid"] = torch.tensor(steps)
        self.use(asked.get("model"))
        prompt = inputs["input_ids"][0].tolist()
        choices = [self.choice(index, inputs, asked) for index in range(asked.get("n", 1))]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": sum(len(c["token_ids"]) for c in choices)}
        if not asked.get("return_token_ids") or self.faults.get("mute"):
            for choice in choices:
                del choice["token_ids"]
            prompt = None
        logps = None
        if asked.get("prompt_logprobs") is not None and not self.faults.get("mute_prompt"):
            logits_TV = self.model(**inputs).logits[0, :-1].float().log_softmax(-1)
            told = logits_TV.gather(1, inputs["input_ids"][0, 1:, None])[:, 0].tolist()
            logps = [None, *({str(i): {"logprob": p, "rank": 1}} for i, p in zip(prompt[1:], told, strict=True))]
        said = {"object": "chat.completion", "model": asked["model"], "choices": choices, "usage": usage}
        return said | {"prompt_token_ids": prompt, "prompt_logprobs": logps}

    def choice(self, index, inputs, asked):
        tokenizer, temperature = self.processor.tokenizer, asked.get("temperature", 0)
        suppressed = {str(i): -1e4 for i in media_token_ids(self.model.config, self.processor)}
        ends = asked.get("stop_token_ids") or [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        sampling = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None}
        if temperature:
            torch.manual_seed(asked["seed"] + index)
            sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": temperature}
        made = self.model.generate(
            **inputs,
            max_new_tokens=asked["max_tokens"],
            min_new_tokens=asked["max_tokens"] if asked.get("ignore_eos") else None,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            prefix_allowed_tokens_fn=self.bound(inputs["input_ids"].shape[1], ends, asked),
            logits_processor=LogitsProcessorList([Bias(asked.get("logit_bias", suppressed))]),
            output_scores=True,
            return_dict_in_generate=True,
            **sampling,
        )
        tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        shift = self.faults.get("shift", 0.0)
        logps = [torch.log_softmax(s[0], -1)[t].item() + shift for s, t in zip(made.scores, tokens, strict=True)]
        if self.faults.get("short"):
            tokens, logps = tokens[:1], logps[:1]
        finish = "stop" if tokens[-1] in ends else "length"
        message = {"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)}
        content = [{"token": tokenizer.decode(t), "logprob": p} for t, p in zip(tokens, logps, strict=True)]
        logprobs = {"content": content} if asked.get("logprobs") else None
        said = {"index": index, "finish_reason": finish, "message": message, "token_ids": tokens}
        return said | {"logprobs": logprobs}

    def bound(self, prompt_length, ends, asked):
        """What may follow where a request names the texts that it may be answered with, in any of four ways."""
        texts = asked.get("structured_outputs", {}).get("choice") or asked.get("guided_choice") or []
        if "grammar" in asked:
            texts = [json.loads(each) for each in asked["grammar"].removeprefix("root ::= ").split(" | ")]
        if "response_format" in asked:
            schema = asked["response_format"]["json_schema"]["schema"]
            texts = [json.dumps({"answer": each}) for each in schema["properties"]["answer"]["enum"]]
        if not texts or self.faults.get("loose"):
            return None
        whole = [[*self.processor.tokenizer(text)["input_ids"], ends[0]] for text in texts]

        def following(_, ids):
            said = ids[prompt_length:].tolist()
            return [each[len(said)] for each in whole if each[: len(said)] == said and len(each) > len(said)]

        return following

    def use(self, name):
        """Switch to the adapter of that name, or to the model without."""
        if name in self.adapters:
            self.model.enable_adapters()
            self.model.set_adapter(name)
        elif self.adapters:
            self.model.disable_adapters()

    def load_adapter(self, asked):
        name, folder = asked["lora_name"], Path(asked["lora_path"])
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        tensors = load_file(folder / "adapter_model.safetensors")
        assert all(key.startswith("base_model.model.thinker.model.layers.") for key in tensors)
        given = {key.replace("thinker.", "", 1): value for key, value in tensors.items()}
        if self.faults.get("stale") and self.adapters:
            given = self.adapters[next(iter(self.adapters))]
        config = LoraConfig.from_pretrained(folder)
        self.model.load_adapter(adapter_name=name, peft_config=config, adapter_state_dict=dict(given))
        self.adapters[name] = given
        self.loads += 1
        return 200, None

    def unload_adapter(self, asked):
        self.model.delete_adapter(asked["lora_name"])
        del self.adapters[asked["lora_name"]]
        return 200, None

    def call(self, asked):
        assert self.paused and asked["method"] == "reload_weights", "weights are loaded while the server is paused"
        files = Path(asked["kwargs"]["weights_path"]).glob("*.safetensors")
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert all(name.startswith("thinker.") for name in found)
        self.loads += 1
        if self.faults.get("stale"):
            return 200, {"results": [None]}
        return self.write({name.removeprefix("thinker."): tensor for name, tensor in found.items()})

    def write(self, weights):
        own = {name.replace(".base_layer", ""): tensor for name, tensor in self.model.state_dict().items()}
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        return 200, {"results": [None]}

    def post(self, path, asked):
        """Status and body of the answer to a POST."""
        path = path.partition("?")[0]
        with self.lock:
            if path == "/v1/load_lora_adapter":
                return self.load_adapter(asked)
            if path == "/v1/unload_lora_adapter":
                return self.unload_adapter(asked)
            if path == "/collective_rpc":
                return self.call(asked)
            if path in ("/pause", "/resume"):
                self.paused = path == "/pause"
                return 200, {"status": "ok"}
            if path == "/faults":
                self.faults, self.chats = asked, 0
                return 200, {}
            if path == "/restart":
                for name in list(self.adapters):
                    self.unload_adapter({"lora_name": name})
                return self.write(self.started)
            self.chats += 1
            if self.chats == self.faults.get("die"):
                os._exit(9)
            if self.chats <= self.faults.get("busy", 0):
                return 503, {"error": {"message": "busy"}}
        known = {"tiny", *self.adapters}
        if asked.get("model") not in known:
            return 404, {"error": {"message": f"The model {asked.get('model')!r} does not exist."}}
        return 200, self.answer(asked)


class Bias(LogitsProcessor):
    """Adds a number to the logits of some tokens."""

    def __init__(self, bias):
        self.bias = {int(token): value for token, value in bias.items()}

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for token, value in self.bias.items():
            scores[:, token] += value
        return scores


def decoded(text):
    return io.BytesIO(base64.b64decode(text))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model = None

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.model.key = self.headers.get("authorization") or self.model.key
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send(*self.model.post(self.path, json.loads(raw) if raw else {}))

    def do_GET(self):
        if self.path == "/stats":
            return self.send(200, {"loads": self.model.loads, "chats": self.model.chats, "key": self.model.key})
        models = [{"id": name, "parent": "tiny"} for name in self.model.adapters]
        return self.send(200, {"data": [*models, {"id": "tiny", "parent": None}]})

    def send(self, status, said):
        body = b"Success" if said is None else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


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
