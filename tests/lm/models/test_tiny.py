import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grouprl.errors import UsageError
from grouprl.lm.models.save import save_model
from grouprl.lm.models.tiny import LETTERS, build_tiny, tiny_tokenizer, warm_start


def reverse(generator: random.Random) -> tuple[str, str]:
    text = "".join(generator.choice(LETTERS) for _ in range(3))
    return text, text[::-1]


def test_a_prompt_is_framed_and_a_completion_is_not() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcdef")["input_ids"]) == list("^abcdef>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("fed$", add_special_tokens=False)["input_ids"]) == list("fed$")
    assert tokenizer.decode(tokenizer("ab+12")["input_ids"], skip_special_tokens=True) == "ab+12>"


def test_a_conversation_is_framed_like_a_prompt() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer("abc")["input_ids"]


def test_a_character_outside_the_alphabet_becomes_the_unknown_token() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("aZé b")["input_ids"]) == list("^a???b>")


def test_the_four_special_tokens_are_four_tokens_of_the_model() -> None:
    model, tokenizer = build_tiny(0)
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    assert ids == [0, 1, 3, 4]
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 1, 3)
    assert model.config.vocab_size == len(tokenizer) == 32
    assert model.get_input_embeddings().padding_idx is None
    assert sum(parameter.numel() for parameter in model.parameters()) == 100_672


def test_the_seed_decides_the_weights_and_nothing_outside() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    (first, _), (second, _), (third, _) = build_tiny(0), build_tiny(0), build_tiny(1)
    assert torch.equal(torch.rand(3), expected)
    weights = [model.model.layers[1].mlp.up_proj.weight for model in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_model_and_tokenizer_survive_saving(tmp_path: Path) -> None:
    model, tokenizer = build_tiny(3)
    save_model(model, tokenizer, tmp_path / "tiny")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    again = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert again("pb+9")["input_ids"] == tokenizer("pb+9")["input_ids"]
    assert again.decode([0, 16, 2]) == "^a>"
    assert again.chat_template == tokenizer.chat_template
    assert again.special_tokens_map == tokenizer.special_tokens_map


def test_the_warm_start_learns_from_chance_and_repeats_itself() -> None:
    runs = []
    for _ in range(2):
        model, tokenizer = build_tiny(0)
        runs.append(warm_start(model, tokenizer, reverse, steps=12, seed=1, batch_size=32))
    assert runs[0] == runs[1]
    assert runs[0][0] == pytest.approx(torch.log(torch.tensor(32.0)).item(), abs=0.15)  # uniform over the alphabet
    assert runs[0][-1] < runs[0][0] - 0.5


def test_the_loss_is_the_mean_over_answers_and_their_ends_whatever_the_padding() -> None:
    model, tokenizer = build_tiny(0)
    pairs = [("ab", "ba"), ("abcdef", "f")]
    expected, tokens = 0.0, 0
    for question, answer in pairs:
        ids = tokenizer(question)["input_ids"] + tokenizer(answer + "$", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        for place in range(len(ids) - len(answer) - 1, len(ids)):
            expected -= logp[place - 1, ids[place]].item()
            tokens += 1
    queue = iter(pairs)
    losses = warm_start(model, tokenizer, lambda _: next(queue), steps=1, batch_size=2)
    assert losses == [pytest.approx(expected / tokens, abs=1e-5)]


def test_the_warm_start_ends_before_it_learns_from_the_first_batch_that_it_answers_well_enough() -> None:
    settings: dict[str, Any] = {"learning_rate": 5e-3, "seed": 1, "batch_size": 32}
    ended, tokenizer = build_tiny(0)
    losses = warm_start(ended, tokenizer, reverse, steps=200, accuracy=0.3, **settings)
    assert 5 < len(losses) < 200

    counted, _ = build_tiny(0)
    before = warm_start(counted, tokenizer, reverse, steps=len(losses) - 1, **settings)
    assert losses[:-1] == before
    assert all(torch.equal(a, b) for a, b in zip(ended.parameters(), counted.parameters(), strict=True))

    generator = random.Random(1)
    batches = [[reverse(generator) for _ in range(32)] for _ in losses]
    assert greedy_accuracy(ended, tokenizer, batches[-1]) >= 0.3
    with pytest.raises(UsageError, match=rf"right after {len(before)} steps, short of accuracy=0.3"):
        warm_start(build_tiny(0)[0], tokenizer, reverse, steps=len(before), accuracy=0.3, **settings)


def greedy_accuracy(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """The share of answers that decoding says token by token."""
    prompts = torch.tensor([tokenizer(question)["input_ids"] for question, _ in pairs])
    said = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=4)
    texts = tokenizer.batch_decode(said[:, prompts.shape[1] :], skip_special_tokens=False)
    return sum(text == f"{answer}$" for text, (_, answer) in zip(texts, pairs, strict=True)) / len(pairs)


@pytest.mark.parametrize("accuracy", [0.0, 1.5, float("nan")])
def test_an_accuracy_that_is_no_share_is_refused(accuracy: float) -> None:
    model, tokenizer = build_tiny(0)
    with pytest.raises(UsageError, match="must be a share of the answers"):
        warm_start(model, tokenizer, reverse, steps=1, accuracy=accuracy)


def test_a_pair_longer_than_the_model_is_refused() -> None:
    model, tokenizer = build_tiny(0)
    with pytest.raises(UsageError, match="A pair has 83 tokens, the model takes 64"):
        warm_start(model, tokenizer, lambda _: ("a" * 41, "b" * 40), steps=1, batch_size=2)
