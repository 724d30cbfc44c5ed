"""Becomes another program, on one core, that ends with the process that started it.

    python launch.py PARENT CORE COMMAND...

It imports nothing of grouprl: it is run by its path, without the folder of any package in Python's search path.
"""

import os
import sys
from contextlib import suppress

if __name__ == "__main__":
    parent, core, *command = sys.argv[1:]
    with suppress(OSError, AttributeError, ImportError):  # systems other than Linux have no such call
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it ended before it could be watched
        sys.exit(1)
    with suppress(OSError, AttributeError):
        os.sched_setaffinity(0, {int(core)})
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot start {command[0]!r}: {error.strerror}")
