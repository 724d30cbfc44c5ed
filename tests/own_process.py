"""Functions of tests in a process of their own, whose memory holds nothing of what other tests left."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHILD = """
import pickle, sys
path, function, arguments, keywords = pickle.load(sys.stdin.buffer)
found = pickle.dumps(function(*arguments, **keywords))
with open(path, "wb") as file:
    file.write(found)
"""


def in_a_process_of_its_own(folder: Path, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What a function of a module returns; it passes through a file in ``folder``, since the function may print."""
    result = folder / "result.pickle"
    subprocess.run(
        [sys.executable, "-c", _CHILD], input=pickle.dumps((str(result), function, arguments, keywords)),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True, timeout=300,
    )  # fmt: skip
    return pickle.loads(result.read_bytes())
