"""A model and weights as after training, for all tests of exports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.model.language_model import load_language_model
from trainer.model.source import Source, open_model


@pytest.fixture(scope="package")
def source() -> Source:
    return open_model("debug")


@pytest.fixture(scope="package")
def state(source: Source) -> dict[str, Tensor]:
    """Weights that differ from the source's in every tensor, as after training."""
    torch.manual_seed(1)
    language_model = load_language_model(source).state_dict()
    return {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in language_model.items()}
