"""Packed weights: made once, made again when the weight changed, gone with it."""

import gc
import threading
import time

import pytest
import torch

from resnet_fused.kernels import packing
from resnet_fused.kernels.packing import packed


class Maker:
    """Counts how often a pack is made."""

    def __init__(self, seconds=0.0):
        self.count, self.seconds = 0, seconds

    def __call__(self):
        time.sleep(self.seconds)
        self.count += 1
        return self.count


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.randn(4, 3, 3, 3))


def test_made_once(weight):
    make = Maker()
    assert [packed(weight, "key", make) for _ in range(3)] == [1, 1, 1]
    assert packed(weight, "other", make) == 2
    assert packing.count(weight) == 2
    assert packed(torch.nn.Parameter(weight.detach()), "key", make) == 3  # an alias is another weight


def mul(w):
    with torch.no_grad():
        w.mul_(2)


def replace_data(w):
    w.data = w.data.clone()


def there_and_back(w):
    """The storage of the first data is free when the third is made, and may be given to it."""
    w.data = w.data.bfloat16()
    w.data = w.data.float()


def load(w):
    holder = torch.nn.Module()
    holder.w = w
    holder.load_state_dict({"w": torch.zeros_like(w)})


def transpose(w):
    w.data = w.data.transpose(2, 3)


@pytest.mark.parametrize("change", (mul, replace_data, there_and_back, load, transpose))
def test_made_again_after_a_change(weight, change):
    make = Maker()
    packed(weight, "key", make)
    change(weight)
    assert packed(weight, "key", make) == 2
    assert packed(weight, "key", make) == 2


def test_depends_on_the_scale(weight):
    make, scale = Maker(), torch.rand(4)
    assert packed(weight, "key", make) == 1
    assert packed(weight, "key", make, scale) == 2
    assert packed(weight, "key", make, scale) == 2
    assert packed(weight, "key", make, scale.clone()) == 3
    scale.add_(1)
    assert packed(weight, "key", make, scale) == 4
    assert packed(weight, "key", make) == 5


def test_another_tensor_at_the_same_address_is_another_scale(weight):
    make = Maker()
    for i in range(1, 20):
        assert packed(weight, "key", make, torch.rand(4)) == i


def test_oldest_makes_room(weight):
    make = Maker()
    for key in range(packing.PACKS_PER_WEIGHT + 1):
        packed(weight, key, make)
    assert packing.count(weight) == packing.PACKS_PER_WEIGHT
    assert packed(weight, 1, make) == 2
    assert packed(weight, 0, make) == packing.PACKS_PER_WEIGHT + 2


def test_gone_with_the_weight():
    weight = torch.randn(3)
    packed(weight, "key", object)
    key = id(weight)
    assert key in packing._all
    del weight
    gc.collect()
    assert key not in packing._all


def test_forget(weight):
    make = Maker()
    packed(weight, "key", make)
    packing.forget(weight)
    assert packing.count(weight) == 0
    assert packed(weight, "key", make) == 2


def test_inference_tensors():
    with torch.inference_mode():
        weight = torch.randn(3)
        make = Maker()
        assert [packed(weight, "key", make) for _ in range(2)] == [1, 1]
        assert not packed(weight, "tensor", lambda: torch.zeros(3)).is_inference()


def test_threads_make_it_once(weight):
    make, start, found = Maker(seconds=0.05), threading.Barrier(4), []

    def work():
        start.wait()
        found.append(packed(weight, "key", make))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1, 1, 1, 1]


def test_a_failure_leaves_nothing(weight):
    with pytest.raises(ZeroDivisionError):
        packed(weight, "key", lambda: 1 / 0)
    assert packing.count(weight) == 0
    assert packed(weight, "key", Maker()) == 1
