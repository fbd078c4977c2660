"""The neighbours' models that `fuse` has to work on."""

import contextlib

import pytest
import torch


@contextlib.contextmanager
def _without_compiled_operators():
    """torchvision imports although its compiled operators do not match the installed torch: no test needs them."""
    register_fake = torch.library.register_fake

    def skip_torchvision(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = skip_torchvision
    try:
        yield
    finally:
        torch.library.register_fake = register_fake


def torchvision_models():
    """The module torchvision.models."""
    with _without_compiled_operators():
        return pytest.importorskip("torchvision").models


def transformers_resnet(name="ResNetForImageClassification", **config):
    """A small ResNet of transformers', randomly initialised."""
    transformers = pytest.importorskip("transformers")
    settings = {"embedding_size": 16, "hidden_sizes": [32, 64, 96], "depths": [2, 2, 1], "num_labels": 7} | config
    with _without_compiled_operators():  # transformers imports torchvision where it is installed
        return getattr(transformers, name)(transformers.ResNetConfig(**settings))
