"""Trained weights and real pictures: fusing must not change what the net sees."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import resnet_fused as rf

EXAMPLE = Path(__file__).parent.parent / "examples" / "fashion_mnist"
sys.path.insert(0, str(EXAMPLE))
import model as example  # noqa: E402


@torch.inference_mode()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.cat([model(batch.to(dtype)).argmax(1) for batch in images.split(500)])


@pytest.fixture(scope="module")
def images_and_labels() -> tuple[Tensor, Tensor]:
    return example.load_test_images()


@pytest.fixture(scope="module")
def fp32_predictions(images_and_labels: tuple[Tensor, Tensor]) -> Tensor:
    return predictions(example.load_model(), images_and_labels[0])


def test_the_example_is_small():
    assert sum(parameter.numel() for parameter in example.FashionNet().parameters()) <= 300_000
    assert example.WEIGHTS.stat().st_size < 1_000_000


def test_the_sample_is_the_start_of_the_data_set():
    images, labels = example.load_split("t10k", example.SAMPLE)
    assert images.shape == (512, 1, 28, 28)
    assert labels.unique().tolist() == list(range(10))
    if example.DATASET.is_dir():
        all_images, all_labels = example.load_split("t10k", example.DATASET)
        assert torch.equal(images, all_images[:512])
        assert torch.equal(labels, all_labels[:512])


def test_the_net_has_learnt(images_and_labels, fp32_predictions):
    assert fp32_predictions.eq(images_and_labels[1]).float().mean() >= 0.92


@pytest.mark.parametrize("accuracy", ["strict", "fast"])
def test_fp32_flips_no_prediction(accuracy, images_and_labels, fp32_predictions):
    fused = rf.fuse(example.load_model(), accuracy=accuracy)
    flips = predictions(fused, images_and_labels[0]).ne(fp32_predictions).sum().item()
    assert flips == 0


def test_bf16_flips_no_more_than_unfused(images_and_labels, fp32_predictions):
    unfused = example.load_model().bfloat16()
    fused = rf.fuse(unfused)
    allowed, flips = (predictions(m, images_and_labels[0]).ne(fp32_predictions).sum().item() for m in (unfused, fused))
    assert flips <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity_on_real_pictures(dtype, images_and_labels):
    model = example.load_model().to(dtype)
    report = rf.verify(model, rf.fuse(model), images_and_labels[0][:64].to(dtype))
    assert report.ok, str(report)
