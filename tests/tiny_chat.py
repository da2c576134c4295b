"""Tiny chat models of other families than Qwen2.5-Omni, with the tokenizer of the tiny backbone."""

from hba.model import tiny

FAMILIES = ("qwen2.5-vl", "qwen2-audio", "gemma3", "llama")
MODALITIES = {family: tiny.FAMILIES[family].modalities for family in tiny.FAMILIES}


def build(family, backbone, out):
    """Save a tiny model of `family`, whose tokenizer is that of the tiny `backbone`, into the folder `out`."""
    from transformers import AutoTokenizer

    return tiny.build_family(out, AutoTokenizer.from_pretrained(backbone), family, seed=0)
