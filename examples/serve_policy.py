"""Serve an exported policy over HTTP, with NumPy and ONNX Runtime alone: neither grouprl nor torch is needed.

    grouprl train CartPole-v1 --out runs/cartpole
    grouprl export runs/cartpole                          # writes runs/cartpole/export-onnx
    python examples/serve_policy.py runs/cartpole/export-onnx
    curl localhost:8000 -d '{"observation": [0.0, 0.1, 0.02, -0.1]}'      # {"action": 0}

A GET says what goes in and comes out. A POST names every input, for one observation or for a batch. This is a start for
a service of your own: it has neither TLS nor a password.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

MOST_BYTES = 1 << 24


class Policy:
    """An exported policy that takes and gives what JSON can hold."""

    def __init__(self, folder: Path) -> None:
        self.about = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        self.inputs = self.about["inputs"]
        self.session = onnxruntime.InferenceSession(str(folder / self.about["file"]))

    def act(self, request: dict[str, Any]) -> Any:
        """The action for one observation, or the actions for a batch. Raises ValueError for what is no observation."""
        if not isinstance(request, dict) or set(request) != {one["name"] for one in self.inputs}:
            raise ValueError(f"give a JSON object with {', '.join(one['name'] for one in self.inputs)}")
        given = {one["name"]: self._array(one, request[one["name"]]) for one in self.inputs}
        single = all(
            array.ndim == len(one["shape"]) - 1 for one, array in zip(self.inputs, given.values(), strict=True)
        )
        if single:
            given = {name: array[None] for name, array in given.items()}
        if len({len(array) for array in given.values()}) > 1:
            raise ValueError("all inputs must have the same number of rows")
        (actions,) = self.session.run(["action"], given)
        return (actions[0] if single else actions).tolist()

    @staticmethod
    def _array(about: dict[str, Any], value: Any) -> Any:
        """The value of one input, ``[...]`` or ``[batch, ...]``."""
        shape = about["shape"][1:]
        array = np.asarray(value)
        if array.dtype.kind not in "biuf" or (list(array.shape) != shape and list(array.shape[1:]) != shape):
            raise ValueError(f"{about['name']} must be numbers of shape {shape}, or a list of such")
        with np.errstate(all="ignore"):
            taken = array.astype(about["dtype"])
        if not np.isfinite(taken).all():
            raise ValueError(f"{about['name']} must be finite, also as {about['dtype']}")
        if taken.dtype.kind in "iu" and not np.array_equal(taken, array):
            raise ValueError(f"{about['name']} must be whole numbers that {about['dtype']} can hold")
        return taken


def server(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is ready to answer once its ``serve_forever`` is called."""
    policy = Policy(folder)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer(200, {name: policy.about[name] for name in ("env_id", "inputs", "outputs")})

        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length") or 0)
                if not 0 <= length <= MOST_BYTES:
                    self.answer(413, {"error": f"a request has at most {MOST_BYTES} bytes, and says how many"})
                    return
                self.answer(200, {"action": policy.act(json.loads(self.rfile.read(length)))})
            except (ValueError, RecursionError) as error:  # no length, no JSON, or no observation
                self.answer(400, {"error": str(error)})

        def log_message(self, format: str, *args: Any) -> None:
            """One line a request would be more than the policy costs."""

    return ThreadingHTTPServer((host, port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what grouprl export wrote, in the format onnx")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    given = parser.parse_args()
    serving = server(given.folder, given.host, given.port)
    print(f"serving {given.folder} at http://{given.host}:{serving.server_port}", flush=True)
    try:
        serving.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        serving.server_close()


if __name__ == "__main__":
    main()
