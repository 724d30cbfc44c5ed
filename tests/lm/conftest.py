from collections.abc import Iterator

import pytest

import registers
from several import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models are fastest so, and sums do not depend on the machine."""
    with one_thread():
        yield


@pytest.fixture(params=[False, True], ids=["torch's products", "compiled products"])
def products_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Products of many rows by torch or by compiled code, whichever this processor prefers."""
    from grouprl.lm.kernels import head
    from grouprl.lm.llama import layers

    for module in (layers, head):
        monkeypatch.setattr(module, "preferred", lambda: request.param)
    return bool(request.param)


@pytest.fixture(params=registers.WITHOUT)
def floats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code for registers of so many floats."""
    from grouprl.lm.kernels.compile import kernels

    registers.use(monkeypatch, kernels, request.param, "-fopenmp")
