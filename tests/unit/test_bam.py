"""Adapters touch the samples that have descriptors of their own dataset, and no other, to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hba.batch.pool import DescriptorConfig
from hba.errors import InputError
from hba.model.bam import AdapterSpec, Bam, load_bam, save_bam

H = 8


def spec(dataset, modality_dropout=0.0, **dims):
    return AdapterSpec(
        dataset=dataset,
        dims=dims,
        hidden=4,
        dropout=0.0,
        modality_dropout=modality_dropout,
        layer_norm=False,
        descriptors=DescriptorConfig(),
    )


@pytest.fixture
def bam():
    torch.manual_seed(0)
    return Bam([spec("daicwoz", video=3, audio=5), spec("tess", audio=2)], H).eval()


def described(**sizes):
    return {name: torch.randn(size) for name, size in sizes.items()}


def test_video_comes_first_then_audio_each_residual(bam):
    each, base_BH = described(video=3, audio=5), torch.randn(1, H)
    own = bam.adapters("daicwoz")
    expected = base_BH + own.adapter("video")(each["video"][None]) + own.adapter("audio")(each["audio"][None])
    torch.testing.assert_close(bam(base_BH, ["daicwoz"], [each]), expected)


def test_a_sample_without_descriptors_keeps_its_state_and_takes_nothing_from_the_others(bam):
    """The flaw: one sample without features dropped the features of its whole batch."""
    vectors = [described(video=3, audio=5), {}, described(audio=5), described(audio=2), {}]
    keys, base_BH = ["daicwoz", "daicwoz", "daicwoz", "tess", "mmsd"], torch.randn(5, H)
    together_BH = bam(base_BH, keys, vectors)
    assert torch.equal(together_BH[1], base_BH[1])
    assert torch.equal(together_BH[4], base_BH[4])
    for row in (0, 2, 3):
        alone_1H = bam(base_BH[row : row + 1], [keys[row]], [vectors[row]])
        torch.testing.assert_close(together_BH[row], alone_1H[0])
        assert not torch.equal(together_BH[row], base_BH[row])


def test_modality_dropout_is_drawn_for_each_sample_and_in_training_alone():
    torch.manual_seed(0)
    bam = Bam([spec("tess", modality_dropout=0.3, audio=2)], H)
    vectors, base_BH = [described(audio=2)] * 1000, torch.zeros(1000, H)
    moved_B = (bam.train()(base_BH, ["tess"] * 1000, vectors) != 0).any(1)
    assert 0.65 < moved_B.float().mean() < 0.75
    assert bool((bam.eval()(base_BH, ["tess"] * 1000, vectors) != 0).any(1).all())


def test_a_batch_without_any_descriptor_has_a_gradient_of_zero(bam):
    bam.train()(torch.randn(2, H), ["tess", "tess"], [{}, {}]).sum().backward()
    alpha = bam.adapters("tess").adapter("audio").alpha
    assert alpha.grad is not None and not alpha.grad.any()


def test_fresh_adapters_change_nothing_and_standardise_by_the_training_rows(bam):
    adapter = bam.adapters("tess").adapter("audio")
    rows_NF = torch.stack([torch.arange(6.0), torch.full((6,), 7.0)], 1)  # the second value never varies
    adapter.start(rows_NF)
    assert not adapter(rows_NF).any()
    x_NF = (rows_NF - adapter.center) / adapter.scale
    torch.testing.assert_close(x_NF.mean(0), torch.zeros(2))
    torch.testing.assert_close(x_NF.std(0, correction=0), torch.tensor([1.0, 0.0]))


def test_a_descriptor_of_another_size_is_named(bam):
    with pytest.raises(InputError, match=r"daicwoz: a pooled video descriptor has 4 values, the adapter reads 3"):
        bam(torch.randn(1, H), ["daicwoz"], [described(video=4)])


def test_adapters_come_back_from_their_files(bam, tmp_path):
    bam.adapters("tess").adapter("audio").center.fill_(2.0)
    save_bam(bam, tmp_path)
    loaded = load_bam(tmp_path, H).eval()
    keys, vectors = ["daicwoz", "tess"], [described(video=3, audio=5), described(audio=2)]
    base_BH = torch.randn(2, H)
    assert torch.equal(loaded(base_BH, keys, vectors), bam(base_BH, keys, vectors))
    assert json.loads((tmp_path / "bam/tess.json").read_text())["dims"] == {"audio": 2}
    assert loaded.descriptors == {"daicwoz": DescriptorConfig(), "tess": DescriptorConfig()}


def test_the_released_layout_loads_without_statistics(bam, tmp_path):
    save_bam(bam, tmp_path)
    file = tmp_path / "bam/daicwoz.safetensors"
    released = {name: value for name, value in load_file(file).items() if not name.endswith(("center", "scale"))}
    assert {name.split(".")[0] for name in released} == {"video_adapter", "audio_adapter"}
    save_file(released, file)
    torch.testing.assert_close(
        load_bam(tmp_path, H).eval().adapters("daicwoz").adapter("video").scale, torch.ones(3)
    )


def test_damaged_adapters_are_named(bam, tmp_path):
    save_bam(bam, tmp_path)
    (tmp_path / "bam/tess.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"bam/tess\.safetensors: cannot load the adapters"):
        load_bam(tmp_path, H)
    assert load_bam(tmp_path / "elsewhere", H) is None
