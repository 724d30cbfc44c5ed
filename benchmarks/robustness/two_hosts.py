"""Two hosts train one model: two network namespaces of Linux, a cable between them, and a torchrun in each.

Trains the tiny model over the cable, with whole and with sharded weights, and compares the weights at the end with
those of two processes on one host. Then it cuts the cable in the middle of a run, and shows what each host says. Needs
root and iproute2; where namespaces are not allowed it says so and ends with 0.

    python benchmarks/robustness/two_hosts.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rank_kills import end_of, launch

NAMES = [f"grouprl-{os.getpid()}-{side}" for side in "ab"]
CABLE = [f"g{os.getpid() % 100_000}{side}" for side in "ab"]
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
SECONDS = 240


def ip(*arguments: str) -> bool:
    """Run iproute2; whether it worked."""
    try:
        return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def connect() -> bool:
    """Make both namespaces and the cable; whether that is allowed here."""
    if not all(ip("netns", "add", name) for name in NAMES):
        return False
    made = ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
    for name, end, address in zip(NAMES, CABLE, ADDRESSES, strict=True):
        made = made and ip("link", "set", end, "netns", name)
        made = made and ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
        made = made and ip("-n", name, "link", "set", end, "up") and ip("-n", name, "link", "set", "lo", "up")
    return made


def start(folder: Path, side: int, fsdp: bool) -> subprocess.Popen[bytes]:
    """torchrun on one of the hosts."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        "ip", "netns", "exec", NAMES[side], sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
        "--node-rank", str(side), "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29402",
        str(Path(__file__).with_name("rank_kills.py")), "--work", str(folder), *(["--fsdp"] if fsdp else []),
    ]  # fmt: skip
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": CABLE[side], "OMP_NUM_THREADS": "1"}
    log = (folder / f"log{side}").open("wb")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def on_two_hosts(folder: Path, fsdp: bool, cut_after: float | None = None) -> list[int]:
    """Train, and perhaps cut the cable so many seconds after both have begun; how the two torchruns ended."""
    processes = [start(folder, side, fsdp) for side in (0, 1)]
    try:
        if cut_after is not None:
            ends = time.monotonic() + SECONDS
            while not all((folder / f"starts{rank}").exists() for rank in (0, 1)) and time.monotonic() < ends:
                time.sleep(0.05)
            time.sleep(cut_after)
            ip("-n", NAMES[0], "link", "set", CABLE[0], "down")
        return [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.terminate()


def equal(a: Path, b: Path) -> bool:
    import torch

    wanted = torch.load(a / "weights0.pt")
    return all(
        torch.equal(wanted[name], value)
        for rank in (0, 1)
        for name, value in torch.load(b / f"weights{rank}.pt").items()
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        try:
            if not connect():
                print("skipped: network namespaces are not allowed here (they need root and iproute2)")
                return
            for fsdp in (False, True):
                what = "sharded weights" if fsdp else "whole weights"
                if end_of(launch(root / f"one {fsdp}", 0, fsdp)):
                    sys.exit((root / f"one {fsdp}" / "log").read_text())
                found = on_two_hosts(root / f"two {fsdp}", fsdp)
                if any(found):
                    sys.exit("\n".join((root / f"two {fsdp}" / f"log{side}").read_text() for side in (0, 1)))
                same = equal(root / f"one {fsdp}", root / f"two {fsdp}")
                print(f"two hosts, {what}: {'the same weights, bit for bit' if same else 'OTHER WEIGHTS'}", flush=True)
            began = time.monotonic()
            found = on_two_hosts(root / "cut", False, cut_after=1.0)
            print(f"cable cut: the hosts ended with {found}, {time.monotonic() - began:.0f} s after their start")
            for side in (0, 1):
                lines = (root / "cut" / f"log{side}").read_text().splitlines()
                said = [line for line in lines if "TrainingError: " in line]
                print(f"  host {side}: {said[-1].split('TrainingError: ')[1] if said else 'nothing'}")
        finally:
            for name in NAMES:
                ip("netns", "delete", name)


if __name__ == "__main__":
    main()
