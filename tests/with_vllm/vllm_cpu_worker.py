"""verl's extension of a vLLM worker, on a CPU: weights arrive in shared memory, for layers that vLLM has packed."""

import gc

import torch
import vllm.model_executor.layers.utils as layers
from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


class CpuWorker(vLLMColocateWorkerExtension):
    def _update_weights(self, weights, *args, **options):
        # `tensor.to(device)` is no copy where device is the CPU: the buffer would be reused under the weights.
        super()._update_weights([(name, tensor.clone()) for name, tensor in weights], *args, **options)


class Receiver(bucketed_weight_transfer.BucketedWeightReceiver):
    def _cleanup(self):
        gc.collect()
        try:
            super()._cleanup()
        except BufferError:  # a tensor still looks at the shared memory, which ends with it
            self.shm = None
            if self._ack_pending:
                self.socket.send(b"")
            self.socket.close()
            self.socket = None


def _unpacked(layer, remove_weight):
    """vLLM packs the weights of a linear layer on a CPU and drops them: nothing would be there to load into."""
    layer.cpu_linear = torch.nn.functional.linear


bucketed_weight_transfer.BucketedWeightReceiver = Receiver
layers.dispatch_cpu_unquantized_gemm = _unpacked
