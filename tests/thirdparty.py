"""The neighbours' models that `fuse` has to work on."""

import pytest
from compatibility import without_compiled_operators


def torchvision_models():
    """The module torchvision.models."""
    with without_compiled_operators():
        return pytest.importorskip("torchvision").models


def transformers_resnet(name="ResNetForImageClassification", **config):
    """A small ResNet of transformers', randomly initialised."""
    transformers = pytest.importorskip("transformers")
    settings = {"embedding_size": 16, "hidden_sizes": [32, 64, 96], "depths": [2, 2, 1], "num_labels": 7} | config
    with without_compiled_operators():  # transformers imports torchvision where it is installed
        return getattr(transformers, name)(transformers.ResNetConfig(**settings))
