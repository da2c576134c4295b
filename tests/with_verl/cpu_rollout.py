"""verl rollouts on transformers' generate, for tests on a CPU: a server, its replica, and the actor's side of it."""

import os

import ray
import torch
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from hba.model.generate import generate_tokens, media_token_ids
from hba.rl.verl.thinker import OmniForConditionalGeneration

NAME = "transformers_cpu"


class QuickBuffer(ReplayBuffer):
    """verl's, which looks for finished rollouts every two seconds, for steps that take less than one."""

    def __init__(self, **options):
        super().__init__(**options, poll_interval=0.05)


class Server:
    """One Ray actor a replica: a prompt with one placeholder a medium, as vLLM takes it, to sampled tokens."""

    def __init__(self, config, model_config, rank):
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        torch.manual_seed(rank)
        self.config, self.model_config = omega_conf_to_dataclass(config), omega_conf_to_dataclass(model_config)
        self.model = OmniForConditionalGeneration.from_pretrained(
            self.model_config.local_path, dtype=torch.float32
        ).eval()
        self.step = 0

    async def generate(
        self, prompt_ids, sampling_params, request_id, image_data=None, video_data=None, audio_data=None,
        mm_processor_kwargs=None, **_,
    ):  # fmt: skip
        processor = self.model_config.processor
        text = self.model_config.tokenizer.decode(prompt_ids)
        videos, metadata = zip(*video_data, strict=True) if video_data else ((), ())
        pixels = {name: mm_processor_kwargs[name] for name in ("min_pixels", "max_pixels")}
        inputs = processor([text], image_data, videos, audio_data, video_metadata=metadata, **pixels)
        assert set(sampling_params["logit_bias"]) == set(processor.media_token_ids)
        said = generate_tokens(
            self.model.thinker, processor.real, inputs, max_new_tokens=self.config.response_length,
            temperature=sampling_params["temperature"],
        )  # fmt: skip
        ids = said.ids_BL[0, : said.lengths[0]]
        logps = self._logps(inputs, ids, sampling_params["temperature"] or 1.0)
        return TokenOutput(
            token_ids=ids.tolist(), log_probs=logps, stop_reason="completed", extra_fields={"global_steps": self.step}
        )

    @torch.inference_mode()
    def _logps(self, inputs, ids, temperature):
        tokens = torch.cat([inputs["input_ids"][0], ids]).unsqueeze(0)
        again = {**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        logits = self.model.thinker(**again).logits[0, -len(ids) - 1 : -1].float()
        logits[:, media_token_ids(self.model.config.thinker_config, self.model_config.processor.real)] = -torch.inf
        return torch.log_softmax(logits / temperature, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1).tolist()

    async def update_weights(self, state):
        self.model.load_state_dict(state, strict=True)

    async def set_global_steps(self, step):
        self.step = step

    async def _ignored(self, *_, **__):
        return None

    wake_up = sleep = clear_kv_cache = abort_all_requests = resume_generation = start_profile = stop_profile = _ignored


class Replica(RolloutReplica):
    async def launch_servers(self):
        options = {"name": _server_name(self.replica_rank), "num_cpus": 0.1, "max_concurrency": 64}
        server = ray.remote(Server).options(**options).remote(self.config, self.model_config, self.replica_rank)
        await server.set_global_steps.remote(0)
        self.servers, self._server_handle, self._server_address = [server], server, f"cpu-{self.replica_rank}"


def _server_name(rank):
    return f"{NAME}_server_{rank}"


class Adapter(BaseRollout):
    """In the actor's process: sends its weights to the server."""

    def __init__(self, config, model_config, device_mesh, replica_rank=-1, **_):
        super().__init__(config, model_config, device_mesh)
        self.rank = int(os.environ["RANK"])

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    @torch.no_grad()
    async def update_weights(self, weights, global_steps=None, **_):
        state = {name: tensor.detach().float().cpu().clone() for name, tensor in weights}
        server = ray.get_actor(_server_name(self.rank))
        await server.update_weights.remote(state)
        if global_steps is not None:
            await server.set_global_steps.remote(global_steps)
