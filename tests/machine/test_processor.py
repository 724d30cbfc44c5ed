"""What a processor is called in rows and records."""

from __future__ import annotations

import platform

import pytest

from grouprl.machine.processor import entries, processor_name


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel\t: 1\n", "AMD EPYC, family 25, model 17"),
        ("processor\t: 0\nmodel name\t: ARMv8\n", "ARMv8"),
        ("", platform.processor()),
    ],
)
def test_a_processor_is_told_from_another_one_of_its_name(cpuinfo: str, name: str) -> None:
    assert processor_name(entries(cpuinfo)) == name
