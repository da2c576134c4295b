"""What the tests against a real vLLM share. Its attention on a CPU wants heads of 32 at least."""

import pytest
import torch

from hba import open_atlas
from hba.model import OmniSapiens
from hba.model.merge import write_thinker
from hba.model.tiny import TinySizes, atlas_texts, build_tiny


@pytest.fixture(scope="session")
def served(tmp_path_factory, mini_atlas):
    """A tiny backbone laid out as the release is."""
    folder = tmp_path_factory.mktemp("served")
    texts = atlas_texts(open_atlas(mini_atlas, split="train"))
    model = OmniSapiens.from_pretrained(
        build_tiny(folder / "thinker", texts, seed=0, sizes=TinySizes(heads=2, key_value_heads=1))
    )
    (folder / "whole").mkdir()
    write_thinker(model.transformer, folder / "whole", dtype=torch.float32)
    model.transformer.generation_config.save_pretrained(folder / "whole")
    model.processor.save_pretrained(folder / "whole")
    return folder / "whole"
