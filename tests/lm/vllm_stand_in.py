"""Stand-ins of vLLM, which sample by the weights that they are handed: a server, and one in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from small_vllm import build
from transformers import AutoModelForCausalLM

from grouprl.lm.engines.engine import Answer, Request, Weights, drawing


@torch.no_grad()
def drawn(
    model: Any, prompt: Sequence[int], seed: int, options: Mapping[str, Any]
) -> tuple[list[int], list[float]]:  # fmt: skip
    """A completion: its token ids and their log-probabilities."""
    generator, ids, logps = torch.Generator().manual_seed(seed), list[int](), list[float]()
    while len(ids) < options["max_tokens"] and not (ids and ids[-1] in options["stop_token_ids"]):
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, -1] / options["temperature"]
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        logps.append(float(logits.log_softmax(-1)[ids[-1]]))
    return ids, logps


class OwnEngine:
    """A vLLM in this process, with a model of its own."""

    where, context_setting, side_by_side = "the stand-in", "no setting", False
    serves_all = False

    def __init__(self, model: Any, config: Any, dtype: torch.dtype, ranks: Any = None) -> None:
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.dtype, self.loads = AutoModelForCausalLM.from_config(core.config).eval(), dtype, 0
        self.context = core.config.max_position_embeddings

    def load(self, weights: Weights) -> None:
        """As `Engine.load`."""
        self.model.load_state_dict({name: value.clone() for name, value in weights})
        self.loads += 1

    def generate(self, requests: Sequence[Request], options: Mapping[str, Any]) -> list[Answer]:
        """As `Engine.generate`."""
        found = [drawn(self.model, request.prompt, request.seed, drawing(request, options)) for request in requests]
        return [Answer(ids, logps, ids[-1] in options["stop_token_ids"]) for ids, logps in found]


class _Patient(ThreadingHTTPServer):
    request_queue_size = 128  # all requests of a generation come at once


class StandIn:
    """A server of the routes that are asked, whose model has weights of its own until it is handed some.

    Args:
        model: default: that of `small_vllm`.
    """

    def __init__(self, model: Any = None) -> None:
        self.model = build(7)[0] if model is None else model
        self.mode, self.dev, self.loads = "processed_logprobs", True, 0
        self.fails: dict[str, Any] = {}
        """What routes answer instead: a status and a body."""
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}"))

            def answer(self, body: Any) -> None:
                path = self.path.partition("?")[0]
                failure = outer.fails.get(path)
                status, answer = failure or (200, None)
                if failure is None:
                    try:
                        answer = outer.route(path, body)
                    except KeyError:
                        status, answer = 404, {"detail": "Not Found"}
                    except ConnectionAbortedError:
                        self.connection.close()
                        return
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        self.http = _Patient(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def route(self, path: str, body: Any) -> Any:
        served = {"id": "small", "max_model_len": self.model.config.max_position_embeddings}
        of_model = {"dtype": "torch.float32", "logprobs_mode": self.mode, "hf_text_config": self.model.config.to_dict()}
        fixed: dict[str, Any] = {
            "/health": {}, "/v1/models": {"data": [served]}, "/reset_prefix_cache": None,
        }  # fmt: skip
        if path in fixed:
            return fixed[path]
        if path == "/v1/completions":
            with self.lock:
                return self.complete(body)
        if not self.dev:
            raise KeyError(path)
        if path == "/server_info":
            return {"vllm_config": {"model_config": of_model}}
        assert path == "/collective_rpc"
        assert body["method"] == "reload_weights"
        files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
        self.model.load_state_dict({name: value for file in files for name, value in load_file(file).items()})
        self.loads += 1
        return {"results": [None]}

    def complete(self, body: dict[str, Any]) -> Any:
        self.asked.append(body)
        ids, logps = drawn(self.model, body["prompt"], body["seed"], body)
        reason = "stop" if ids[-1] in body["stop_token_ids"] else "length"
        return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": reason}]}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
