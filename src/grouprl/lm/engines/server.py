"""vLLM as a server, which is asked over HTTP. It takes new weights from files, by vLLM's own `reload_weights`."""

from __future__ import annotations

import json
import os
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError, first_line, shown
from grouprl.lm.engines.engine import Answer, Request, Weights, drawing
from grouprl.lm.models.context import read_setting
from grouprl.lm.settings.config import GRPOConfig
from grouprl.machine.ranks import ALONE, Ranks

_AT_ONCE = 64
"""Requests on their way at the same time. The server has a queue of its own."""

_LONGEST = 3600.0
"""Seconds after which a request counts as lost. A server that dies closes its connections at once."""

_EVERY = 0.5
"""Seconds between two looks whether the server is up."""

_PART = 1 << 30
"""Bytes of weights that are written into one file, and held on the way there."""

_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Settings of a model's configuration by which another model is known."""


class ServerError(TrainingError):
    """The server did not do as it was asked."""


class ServerEngine:
    """A vLLM server that the user has started.

    Args:
        model: a causal model of transformers, or a PEFT model around one.
        dtype: of the learner's products; the server has its own.
        ranks: the processes that ask it.

    Raises UsageError if there is no such server, or it serves another model or in another way.
    """

    context_setting = "--max-model-len of the server"
    side_by_side = serves_all = True

    def __init__(self, model: Any, config: GRPOConfig, dtype: torch.dtype, ranks: Ranks = ALONE) -> None:
        given = config.vllm_server_base_url
        self.url, self._headers = _address(given or f"http://{config.vllm_server_host}:{config.vllm_server_port}")
        setting = "vllm_server_base_url" if given else "vllm_server_host, vllm_server_port"
        self.where = f"the vLLM server at {self.url} ({setting})"
        name = str(read_setting(model.config, "_name_or_path") or "MODEL")
        start = f"VLLM_SERVER_DEV_MODE=1 vllm serve {name} --logprobs-mode processed_logprobs"
        self._wait(config.vllm_server_timeout, start)
        try:
            served = self._ask("GET", "/v1/models")["data"][0]
            self.name, self.context = str(served["id"]), int(served["max_model_len"])
        except (ServerError, LookupError, TypeError, ValueError) as error:
            raise UsageError(
                f"{self.where} answers, but not as vLLM does: {first_line(error)}; give the address of: {start}"
            ) from error
        try:
            of_model = self._ask("GET", "/server_info?config_format=json")["vllm_config"]["model_config"]
        except (ServerError, LookupError, TypeError) as error:
            raise UsageError(f"{self.where} lets nobody change its weights; start it with: {start}") from error
        mode = of_model.get("logprobs_mode")
        if mode != "processed_logprobs":
            raise UsageError(
                f"{self.where} gives log-probabilities as they are before temperature and filters ({mode}); start it "
                f"with: {start}"
            )
        self._check_model(model, of_model, start)
        named = getattr(torch, str(of_model.get("dtype")).removeprefix("torch."), None)
        self.dtype = named if isinstance(named, torch.dtype) else dtype
        self._folder = _folder()

    def load(self, weights: Weights) -> None:
        """As `Engine.load`: through files that the server reads."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(self._folder.name)
        try:
            for number, part in enumerate(self._parts(weights)):
                save_file(part, folder / f"model-{number:05d}.safetensors", {"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"cannot write the weights for {self.where} to {folder}: {first_line(error)}; set TMPDIR to a folder "
                "with more room, which the server sees too"
            ) from error
        self._ask(
            "POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
            f"did not take the model's weights from {folder}",
            "it must see that folder (set TMPDIR to one that both see) and serve the model that is trained",
        )  # fmt: skip
        self._ask("POST", "/reset_prefix_cache", {})

    def _parts(self, weights: Weights) -> Iterator[dict[str, Tensor]]:
        """The weights as the server computes with them, on the CPU, so many at a time that they take about `_PART`."""
        part: dict[str, Tensor] = {}
        size = 0
        for name, value in weights:  # copies, as no two tensors of a file may share memory
            dtype = self.dtype if value.is_floating_point() else value.dtype
            part[name] = value.to("cpu", dtype, copy=True).contiguous()
            size += part[name].nbytes
            if size >= _PART:
                yield part
                part, size = {}, 0
        if part:
            yield part

    def generate(self, requests: Sequence[Request], options: Mapping[str, Any]) -> list[Answer]:
        """As `Engine.generate`."""
        shared = {
            "model": self.name, "return_token_ids": True, "skip_special_tokens": False,
            "add_special_tokens": False,
        }  # fmt: skip

        def ask(request: Request) -> Answer:
            return self._answer({**drawing(request, options), **shared, "prompt": request.prompt})

        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(requests)))) as threads:
            running = [threads.submit(ask, request) for request in requests]
            try:
                return [one.result() for one in running]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _answer(self, body: Mapping[str, Any]) -> Answer:
        choice = self._ask("POST", "/v1/completions", body, "failed while it sampled")["choices"][0]
        try:
            ids = [int(token) for token in choice["token_ids"]]
            logp = [float("nan") if x is None else float(x) for x in choice["logprobs"]["token_logprobs"]]
            if len(ids) != len(logp):
                raise ValueError(f"{len(ids)} tokens and {len(logp)} log-probabilities")
            return Answer(ids, logp, choice["finish_reason"] == "stop")
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{self.where} gave an answer that is no completion: {shown(choice)}") from error

    def _wait(self, seconds: float, start: str) -> None:
        until = time.monotonic() + seconds
        while True:
            try:
                self._ask("GET", "/health", timeout=max(1.0, min(10.0, until - time.monotonic())))
                return
            except ServerError as error:
                if time.monotonic() + _EVERY > until:
                    raise UsageError(
                        f"{error} (after vllm_server_timeout={seconds:g} seconds); start one with: {start}, or set "
                        "vllm_mode='colocate'"
                    ) from error
                time.sleep(_EVERY)

    def _check_model(self, model: Any, served: Mapping[str, Any], start: str) -> None:
        theirs = served.get("hf_text_config") or served.get("hf_config")
        if not isinstance(theirs, Mapping):
            return  # the trial looks at what it says
        own = model.config.get_text_config()
        for name in _SHAPE:
            here, there = read_setting(own, name), theirs.get(name)
            if None not in (here, there) and here != there:
                raise UsageError(
                    f"{self.where} serves another model ({self.name}): its {name} is {there}, and that of the trained "
                    f"one {here}; start it with: {start}"
                )

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, failed: str = "failed", advice: str = "",
        timeout: float = _LONGEST,
    ) -> Any:  # fmt: skip
        """What the server answers. Raises ServerError, which says what failed."""
        data = None if body is None else json.dumps(body).encode()
        request = HttpRequest(self.url + path, data, self._headers, method=method)
        try:
            with urlopen(request, timeout=timeout) as response:
                text = response.read()
                return json.loads(text) if text.strip() else None
        except HTTPError as error:
            reason = f"{path} says {error.code} {_said(error)}"
        except ValueError as error:
            reason = f"{path} gives no JSON: {first_line(error)}"
        except (OSError, HTTPException) as error:
            why = getattr(error, "reason", error)
            raise ServerError(
                f"{self.where} does not answer: {first_line(why) if isinstance(why, BaseException) else why}"
                + ("; start it again, and resume from the last checkpoint" if failed != "failed" else "")
            ) from error
        raise ServerError(f"{self.where} {failed}: {reason}" + (f"; {advice}" if advice else ""))


def _address(given: str) -> tuple[str, dict[str, str]]:
    """An address without the name and password that it may hold, and the headers of requests, which send them."""
    headers = {"Content-Type": "application/json"}
    before, sign, rest = given.rstrip("/").partition("://")
    host, slash, path = rest.partition("/")
    who, at, host = host.rpartition("@")
    if at:
        headers["Authorization"] = f"Basic {b64encode(unquote(who).encode()).decode()}"
    return f"{before}{sign}{host}{slash}{path}", headers


def _said(error: HTTPError) -> str:
    """What the server says of an error, in one line."""
    try:
        text = error.read().decode(errors="replace")
        said = json.loads(text)
        said = said.get("error", said.get("detail", said)) if isinstance(said, Mapping) else said
        text = str(said.get("message", said) if isinstance(said, Mapping) else said)
    except (OSError, HTTPException, ValueError):
        text = str(error.reason)
    return " ".join(text.split())[:300]


def _folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for weights that ends with this process: in memory, unless TMPDIR names one."""
    memory = "/dev/shm"
    place = memory if "TMPDIR" not in os.environ and os.access(memory, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="grouprl-weights-", dir=place)
