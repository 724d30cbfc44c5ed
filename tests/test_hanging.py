"""A function that hangs in threads of its own keeps neither the run nor the process."""

import subprocess
import sys
from pathlib import Path

import grouprl

HANGING = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from grouprl import cli
from grouprl.errors import TrainingError
from grouprl.runs.time_limit import within

def hangs():
    with ThreadPoolExecutor() as pool:
        return list(pool.map(time.sleep, [600.0]))

@cli.app.command("hang")
def hang():
    try:
        within(0.2, hangs)
    except TimeoutError:
        raise TrainingError("it had not returned") from None

sys.argv = ["grouprl", "hang"]
cli.main()
"""


def test_threads_of_a_function_that_was_given_up_do_not_keep_the_process(tmp_path: Path) -> None:
    source = str(Path(grouprl.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", HANGING], timeout=60, capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PYTHONPATH": source},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: it had not returned\n")
