"""How many processes a launcher started."""

from __future__ import annotations

import os

from grouprl.errors import UsageError

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they started: torchrun and accelerate, Open MPI, MPICH, MVAPICH."""


def refuse_several_processes() -> None:
    """Raise UsageError if a launcher started several processes: each would train the same, and write the same files."""
    for name in _SIZES:
        started = os.environ.get(name, "").strip()
        if started.isdigit() and int(started) > 1:
            raise UsageError(
                f"{started} processes were started ({name}={started}), but grouprl trains in one, and each would do "
                "the same work and write the same files; start it without torchrun, accelerate launch or mpirun. If "
                f"these are runs of their own, unset {name} and give each its own seed and folder"
            )
