"""Nothing depends on what a script has set torch to for the whole process."""

import threading

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


def test_what_one_thread_sets_is_not_what_another_one_puts_back() -> None:
    turns = [threading.Event() for _ in range(3)]

    def sets() -> None:
        with torch_defaults():
            torch.set_default_dtype(torch.float64)
            turns[0].set()
            turns[1].wait(30)
        turns[2].set()

    def lasts() -> None:
        turns[0].wait(30)
        with torch_defaults():
            turns[1].set()
            turns[2].wait(30)

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch_defaults():
            threads = [threading.Thread(target=target) for target in (sets, lasts)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
