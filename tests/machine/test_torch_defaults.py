"""Nothing depends on what a script has set torch to for the whole process."""

import pytest
import torch

from grouprl.machine.torch_defaults import torch_defaults


@torch_defaults()
def learn_and_fail() -> None:
    made = torch.ones(2, requires_grad=True)
    assert (made.dtype, made.device.type, made.is_inference()) == (torch.float32, "cpu", False)
    (2 * made).sum().backward()
    raise KeyError(made.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_tensors_are_float32_on_the_cpu_and_what_was_set_comes_back(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), torch.inference_mode():
            with pytest.raises(KeyError, match=r"tensor\(\[2"):
                learn_and_fail()
            assert torch.ones(2).device.type == "meta"
            assert torch.is_inference_mode_enabled()
        assert torch.ones(2).dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_is_cast_while_it_is_open_and_afterwards_as_before() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with torch_defaults():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_what_is_set_while_it_is_open_ends_with_it() -> None:
    with torch_defaults():
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
    assert (torch.ones(2).dtype, torch.ones(2).device.type) == (torch.float32, "cpu")
    assert torch.is_grad_enabled()
