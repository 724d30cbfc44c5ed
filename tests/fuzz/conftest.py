"""Random inputs: a few hundred in every test run, the same each time; some thousand, always new, by `make fuzz`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile(
    "short", max_examples=25, derandomize=True, phases=[Phase.explicit, Phase.generate, Phase.shrink], **_COMMON
)
settings.register_profile("long", max_examples=int(os.environ.get("EXAMPLES", "400")), print_blob=True, **_COMMON)


def pytest_configure(config: pytest.Config) -> None:
    """Load the short profile, unless another one was asked for. A test keeps the profile of the time of its import."""
    if config.getoption("--hypothesis-profile") is None:
        settings.load_profile("short")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written by mistake is written among temporary files."""
    monkeypatch.chdir(tmp_path)
