"""Fixtures that many tests share: one tiny mini-atlas and one tiny backbone a session."""

import os

import pytest
import torch

# Tests need no hub; offline, a wrong name fails at once instead of after retries.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mini_atlas(tmp_path_factory):
    """Folder of a mini-atlas of size tiny."""
    from hba.atlas.mini import build_mini_atlas

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


@pytest.fixture(autouse=True)
def ordinary_floats():
    """Commands flush denormal numbers for the whole process; hypothesis refuses to work then."""
    yield
    torch.set_flush_denormal(False)
