"""A function that may never return, called in a process of its own and with a time limit.

Computer algebra can take forever to compare two expressions (9^{9^{9}}), and a model that is rewarded for expressions
will write such one day. An alarm signal would work in the main thread alone, and not on Windows; a process can always
be ended.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from grouprl.errors import TrainingError, error_text

_MEMORY = 4 << 30  # bytes: a number of a billion digits must not take the machine down


class Worker:
    """Calls `function` ("module:name") with keyword arguments that JSON can hold; what it returns must be such too.

    The process is started at the first call, started again after it had to be ended, and ends with this one. Calls from
    several threads wait for each other.
    """

    def __init__(self, function: str, timeout: float, imports: Sequence[str] = ()) -> None:
        """`timeout`: seconds a call may take; `imports`: modules it needs, whose loading does not count."""
        self._function = function
        self._imports = tuple(imports)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # the id of the process that started it: a forked child must not share its pipes
        atexit.register(self.close)

    def call(self, late: Any, **arguments: Any) -> Any:
        """What the function returns, or `late` if it takes too long or too much memory.

        Raises TrainingError if it raises, or if the process does not start.
        """
        question = json.dumps(arguments) + "\n"
        with self._lock:
            for _ in range(2):  # once more if it died of something else, perhaps of the question before
                line, expired = self._ask(question)
                if line:
                    answer = json.loads(line)
                    if "error" in answer:
                        raise TrainingError(f"{self._function} raised {answer['error']}")
                    return answer["value"]
                if expired:
                    break
            return late

    def close(self) -> None:
        """End the process, if there is one of ours."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            _end(process)

    def _ask(self, question: str) -> tuple[str, bool]:
        """The line of the answer, empty if the process died, and whether that was because its time was up."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def end() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(self._timeout, end)
        timer.start()
        line = ""
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:  # it had died before; an empty line says so
            pass
        except BaseException:  # Ctrl-C, or a time limit: its answer must not be taken for that to the next question
            self.close()
            raise
        finally:
            timer.cancel()
            timer.join()
        if expired.is_set() or not line:
            self.close()
        return line, expired.is_set()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid():
            self._process, self._owner = _start(self._function, self._imports), os.getpid()
        return self._process


def _start(function: str, imports: tuple[str, ...]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import serve; serve({function!r}, {imports!r})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONUTF8": "1"},
        start_new_session=True,  # Ctrl-C ends a run in its own time, and until then it needs its rewards
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        _end(process)
        raise TrainingError(f"the process that calls {function} did not start; its message stands above.")
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # half a question may still be in the buffer
                pipe.close()
    process.wait()


def serve(name: str, imports: Sequence[str]) -> None:
    """The other side, in the process: a line of arguments in, a line with what the function returned or raised out."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not be taken for an answer
    for needed in imports:
        import_module(needed)
    module, _, attribute = name.partition(":")
    function = getattr(import_module(module), attribute)
    if sys.platform != "win32":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY if hard < 0 else min(_MEMORY, hard), hard))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = {"value": function(**json.loads(line))}
        except Exception as error:  # handed over, to be raised where it was called for
            answer = {"error": error_text(error, whole=True)}
        print(json.dumps(answer), file=answers, flush=True)
