"""Damages files of run folders at random, then resumes and loads them: is anything wrong without a word?

Each damage is drawn from its number, so that each can be tried again: ``--only envs:17``. What a damaged run does is
one of these outcomes, of which the last four are faults:

- same: it ended with the same weights, metrics and summary as the undamaged run
- error: one clear line
- told: other metrics or transcripts, but it said which file was changed
- silent: other results without a word
- traceback, hang, crash: what it says

    python benchmarks/robustness/damage.py --n 300
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import random
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from short_runs import ARENAS, cut, differing, lines, results

SECONDS = 60
"""After which something hangs."""
FAULTS = ("silent", "traceback", "hang", "crash")
NOBODY = 65534


# --- damages: each takes the file, the folder, a random stream and another run's folder, and says what it did ---------


def flip_bits(path: Path, draw: random.Random, **_: Any) -> str:
    data = bytearray(path.read_bytes())
    for _i in range(draw.choice((1, 1, 3))):
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"bits flipped at {place}"


def zero_block(path: Path, draw: random.Random, **_: Any) -> str:
    data = bytearray(path.read_bytes())
    size = min(len(data), draw.choice((16, 512, 4096)))
    place = draw.randrange(len(data) - size + 1)
    data[place : place + size] = bytes(size)
    path.write_bytes(data)
    return f"{size} bytes zeroed at {place}"


def truncate(path: Path, draw: random.Random, **_: Any) -> str:
    size = draw.choice((0, 1, 7, draw.randrange(path.stat().st_size), path.stat().st_size - 1))
    os.truncate(path, max(0, size))
    return f"cut to {size} bytes"


def append_rubbish(path: Path, draw: random.Random, **_: Any) -> str:
    rubbish = draw.choice((bytes(100), draw.randbytes(200), b"\n", b"1,2,3\n"))
    path.write_bytes(path.read_bytes() + rubbish)
    return f"{len(rubbish)} bytes appended"


def delete(path: Path, **_: Any) -> str:
    path.unlink()
    return "deleted"


def forbid(path: Path, **_: Any) -> str:
    path.chmod(0)
    return "without permissions"


def forbid_folder(path: Path, **_: Any) -> str:
    path.parent.chmod(0)
    return "its folder without permissions"


def put_pipe(path: Path, **_: Any) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a named pipe in its place"


def put_folder(path: Path, **_: Any) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def put_loop(path: Path, **_: Any) -> str:
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself in its place"


def put_device(path: Path, **_: Any) -> str:
    path.unlink()
    path.symlink_to("/dev/zero")
    return "a device in its place"


def put_sparse(path: Path, **_: Any) -> str:
    os.truncate(path, 1 << 36)
    return "a hole of 64 GB at its end"


def swap(path: Path, draw: random.Random, folder: Path, **_: Any) -> str:
    other = folder / draw.choice([name for name in lines(folder) if folder / name != path])
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)
    return f"swapped with {other.relative_to(folder)}"


def foreign(path: Path, draw: random.Random, folder: Path, other: Path, **_: Any) -> str:
    theirs = other / draw.choice(lines(other))
    path.write_bytes(theirs.read_bytes())
    return f"{theirs.relative_to(other)} of the other arena in its place"


def unpickle(path: Path, **_: Any) -> str:
    path.write_bytes(pickle.dumps({"a": 1}))
    return "a pickle in its place"


def edit_json(path: Path, draw: random.Random, **_: Any) -> str:
    """Change a number, text or entry of text that is JSON or YAML, or of the header of a state file."""
    data = path.read_bytes()
    digits = [i for i, byte in enumerate(data[:20_000]) if byte in b"0123456789"]
    if not digits:
        return append_rubbish(path, draw)
    place = draw.choice(digits)
    path.write_bytes(data[:place] + str((int(chr(data[place])) + 1) % 10).encode() + data[place + 1 :])
    return f"a digit changed at {place}"


def resave(path: Path, draw: random.Random, **_: Any) -> str:
    """Drop, reshape, retype or spoil a tensor, or drop or retype meta data, and save with valid checksums."""
    if path.suffix != ".safetensors":
        return edit_json(path, draw)
    import torch
    from safetensors.torch import load_file, save_file

    from grouprl.errors import UsageError
    from grouprl.runs.state import load_state, save_state

    try:
        tensors, meta = load_state(path)
    except UsageError:  # a model of Transformers
        tensors, meta = load_file(path), None
    name = draw.choice(sorted(tensors))
    change = draw.choice(
        ("dropped", "longer", "of another type", "NaN", "zero", "meta dropped", "meta of another type")
    )
    value = tensors[name]
    if change == "dropped":
        del tensors[name]
    elif change == "longer":
        tensors[name] = torch.cat([value.reshape(-1), value.reshape(-1)[:1]])
    elif change == "of another type":
        tensors[name] = value.to(torch.float64 if value.dtype != torch.float64 else torch.int32)
    elif change == "NaN":
        tensors[name] = torch.full(value.shape, float("nan"))
    elif change == "zero" or meta is None:
        change, tensors[name] = "zero", torch.zeros_like(value)
    else:
        inner, name = meta, draw.choice(sorted(meta))
        while isinstance(inner[name], dict) and inner[name] and draw.random() < 0.8:
            inner = inner[name]
            name = draw.choice(sorted(inner))
        if change == "meta dropped":
            del inner[name]
        else:
            inner[name] = draw.choice(("text", [], None, -1))
    if meta is None:
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        save_state(path, tensors, meta)
    return f"{name} {change}, saved anew"


DAMAGES = (
    flip_bits, flip_bits, flip_bits, zero_block, zero_block, truncate, append_rubbish, delete, forbid, forbid_folder,
    put_pipe, put_folder, put_loop, put_device, put_sparse, swap, foreign, unpickle, edit_json, edit_json, resave,
    resave,
)  # fmt: skip
FORGED = (resave,)
"""Damages with valid checksums: a state that someone made up may lead to other results, but never to a traceback."""


# --- what comes of it -------------------------------------------------------------------------------------------------


def in_a_process(work: Any, as_nobody: Path | None = None) -> tuple[str, Any, str]:
    """How ``work()`` ends in a forked process, what it gave or said, and all it printed."""
    read_end, write_end = os.pipe()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - the child writes there
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            logging.getLogger("grouprl").addHandler(logging.StreamHandler(os.fdopen(2, "w", closefd=False)))
            if as_nobody is not None and os.getuid() == 0:
                for path in [as_nobody, *as_nobody.rglob("*")]:
                    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            answer = json.dumps(_ending(work))
        except BaseException:
            answer = json.dumps(["traceback", traceback.format_exc()])
        try:
            os.set_blocking(write_end, True)
            left = answer.encode()
            while left:
                left = left[os.write(write_end, left) :]
        finally:
            os._exit(0)
    os.close(write_end)
    received, end = b"", time.monotonic() + SECONDS
    while True:
        ready, _, _ = select.select([read_end], [], [], max(0.0, end - time.monotonic()))
        part = os.read(read_end, 1 << 16) if ready else b""
        received += part
        if not part:
            break
    os.close(read_end)
    late = time.monotonic() >= end
    if late:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    log.seek(0)
    printed = log.read().decode(errors="replace")
    if late:
        return "hang", None, printed
    if os.WIFSIGNALED(status):
        return "crash", f"signal {os.WTERMSIG(status)}", printed
    kind, value = json.loads(received)
    return kind, value, printed


def _ending(work: Any) -> list[Any]:
    from grouprl.errors import GrouprlError

    try:
        return ["done", work()]
    except GrouprlError as error:
        return ["error", str(error)]
    except BaseException:
        return ["traceback", traceback.format_exc()]


def judge(kind: str, value: Any, printed: str, expected: Any, damaged: str, forged: bool) -> tuple[str, str]:
    """The outcome, and what is worth reading of it."""
    if kind in ("hang", "crash", "traceback"):
        return kind, str(value).strip().split("\n")[-1]
    if kind == "error":
        return ("error" if "\n" not in value.strip() else "traceback"), value
    different = differing(expected, value)
    if not different:
        return "same", ""
    if forged or any(part in printed for part in (Path(damaged).name, Path(damaged).parent.name + "/")):
        return "told", f"{', '.join(different)}; {printed.strip()[-200:]}"
    return "silent", ", ".join(different)


class Bench:
    """The undamaged runs, and a place for copies."""

    def __init__(self, work: Path) -> None:
        self.work, self.folders, self.expected = work, {}, {}
        work.chmod(0o755)
        for name, arena in ARENAS.items():
            whole = work / f"{name}-whole"
            arena.train(whole)
            evaluated = arena.evaluate(whole)
            shutil.copytree(whole, work / f"{name}-cut")
            cut(work / f"{name}-cut", arena)
            again = work / f"{name}-again"
            shutil.copytree(work / f"{name}-cut", again)
            arena.resume(again)
            self.expected[name] = {"resume": results(again, arena), "evaluate": {"numbers": evaluated}}
            assert not differing(self.expected[name]["resume"], results(whole, arena)), "resuming is not exact"

    def tries(self, name: str, number: int) -> tuple[str, str, str, str]:
        """Damage copy ``number``; what was done to which file, the outcome, and what is worth reading."""
        arena, draw = ARENAS[name], random.Random(f"{name} {number}")
        action = "resume" if draw.random() < 0.7 else "evaluate"
        source = self.work / f"{name}-{'cut' if action == 'resume' else 'whole'}"
        folder = self.work / "copy"
        _remove(folder)
        shutil.copytree(source, folder)
        wanted = [file for file in lines(folder) if _matters(file)]
        file, damage = draw.choice(wanted), draw.choice(DAMAGES)
        other = self.work / f"{'lm' if name == 'envs' else 'envs'}-whole"
        said = damage(folder / file, draw=draw, folder=folder, other=other)

        def act() -> Any:
            if action == "evaluate":
                return {"numbers": arena.evaluate(folder)}
            arena.resume(folder)
            return results(folder, arena)

        forbidden = folder if damage in (forbid, forbid_folder) else None
        kind, value, printed = in_a_process(act, as_nobody=forbidden)
        expected = json.loads(json.dumps(self.expected[name][action]))
        outcome, about = judge(kind, value, printed, expected, file, damage in FORGED)
        _remove(folder)
        return f"{action}: {file}: {said}", damage.__name__, outcome, about


def _matters(file: str) -> bool:
    return not file.endswith((".png", ".html", ".mp4"))


def _remove(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")] if folder.exists() else []:
        if path.is_dir() and not path.is_symlink():
            path.chmod(stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)


def prepare() -> None:
    """Everything that the forked processes use is imported and compiled once."""
    import torch

    torch.set_num_threads(1)
    logging.captureWarnings(True)


def table(counts: dict[str, Counter[str]], n: dict[str, int]) -> str:
    """Markdown: outcomes by arena."""
    outcomes = ("same", "error", "told", *FAULTS)
    rows = ["| arena | damages | " + " | ".join(outcomes) + " |", "| --- |" + " ---: |" * (len(outcomes) + 1)]
    rows += [
        f"| {ARENAS[name].name} | {n[name]} | " + " | ".join(str(counts[name][o]) for o in outcomes) + " |"
        for name in counts
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="damages per arena")
    parser.add_argument("--only", help="one damage, such as envs:17")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "damage.md")
    options = parser.parse_args()
    prepare()
    work = Path(tempfile.mkdtemp(prefix="damage-"))
    try:
        bench = Bench(work)
        if options.only:
            name, _, number = options.only.partition(":")
            print(*bench.tries(name, int(number)), sep="\n")
            return
        counts: dict[str, Counter[str]] = {name: Counter() for name in ARENAS}
        for name in ARENAS:
            for number in range(options.n):
                what, _, outcome, about = bench.tries(name, number)
                counts[name][outcome] += 1
                if outcome in FAULTS:
                    print(f"{name}:{number} {outcome}: {what}\n    {about}", flush=True)
        text = table(counts, dict.fromkeys(ARENAS, options.n))
        print(text)
        said = "\n".join(__doc__.split("\n")[2:14])
        options.out.write_text(
            f"# Damage to run folders\n\n`python benchmarks/robustness/damage.py --n {options.n}`\n\n{text}\n\n{said}\n"
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
