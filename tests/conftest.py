"""What holds for every test."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def the_same_random_numbers_at_every_run() -> None:
    """What libraries draw from global streams (PEFT its adapters, say) must not decide whether a test passes."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
