"""Adapters give the deltas of the released ones, from the released state dicts."""

import json
from pathlib import Path

import pytest
import torch

from hba.model.bam import DescriptorAdapter

DATA = Path(__file__).with_name("data")
FORWARD = json.loads((DATA / "bam/adapter_forward.json").read_text())
RELEASED = json.loads((DATA / "descriptors.json").read_text())["adapter"]


def adapter(state, layer_norm):
    """An adapter of the released layout, which knows no `center` and `scale`."""
    tensors = {name: torch.tensor(value) for name, value in state.items()}
    hidden, dim = tensors["mlp.0.weight"].shape
    made = DescriptorAdapter(dim, hidden, len(tensors["mlp.2.bias"]), dropout=0.5, layer_norm=layer_norm)
    made.load_state_dict(dict(made.named_buffers()) | tensors)
    return made.eval()


@pytest.mark.parametrize("case", RELEASED, ids=lambda case: f"layer_norm={case['use_layer_norm']}")
def test_released_adapters(case):
    delta_BH = adapter(case["state_dict"], case["use_layer_norm"])(torch.tensor(case["features"]))
    torch.testing.assert_close(delta_BH, torch.tensor(case["expected_delta"]), atol=1e-6, rtol=1e-5)


CASES = list(zip(FORWARD["inputs"]["cases"], FORWARD["expected"]["cases"], strict=True))


@pytest.mark.parametrize(("case", "expected"), CASES)
def test_deltas_and_gradients(case, expected):
    made = adapter(case["parameters"], case["use_ln"])
    delta_BH = made(torch.tensor(case["feats"]))
    (delta_BH**2).sum().backward()
    torch.testing.assert_close(delta_BH, torch.tensor(expected["delta"]), atol=1e-4, rtol=1e-4)
    for value, name in ((made.alpha.grad, "grad_alpha_of_sum_sq"), (made.mlp[0].weight.grad, "grad_w1_of_sum_sq")):
        wanted = torch.tensor(expected[name]).reshape(value.shape)
        torch.testing.assert_close(value, wanted, atol=1e-3, rtol=1e-3)
    assert sum(p.numel() for p in made.parameters()) == expected["n_parameters"]
