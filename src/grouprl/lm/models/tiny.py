"""A language model small enough to learn in seconds on one core: for tests, and for trying things out.

Llama with 100,672 parameters over 32 characters. The prompt ``abcdef`` reaches it as ``^abcdef>``, the completion ends
with ``$``. A short supervised :func:`warm_start` gives it a chance of rewards; GRPO does the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from grouprl.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOS, EOS, SEPARATOR, PAD, UNKNOWN = "^", "$", ">", "_", "?"
LETTERS = "abcdefghijklmnop"
ALPHABET = BOS + EOS + SEPARATOR + PAD + UNKNOWN + "+0123456789" + LETTERS
MAX_LENGTH = 64
_IGNORED = -100
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}{{ '" + SEPARATOR + "' }}"
)


def build_tiny(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, with random weights that `seed` decides, and its tokenizer; no random state outside is touched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed those of GPUs as well
        model = LlamaForCausalLM(config)
    embedding: Any = model.get_input_embeddings()
    embedding.padding_idx = None
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token a character. It frames a text as a prompt, ``^text>``, unless `add_special_tokens` is False."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    ids = {character: i for i, character in enumerate(ALPHABET)}
    backend = Tokenizer(models.BPE(ids, merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {SEPARATOR}", special_tokens=[(BOS, ids[BOS]), (SEPARATOR, ids[SEPARATOR])]
    )
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer  # type: ignore[no-any-return]


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Callable[[random.Random], tuple[str, str]],
    steps: int = 100,
    learning_rate: float = 2e-3,
    seed: int = 0,
    batch_size: int = 128,
    accuracy: float | None = None,
) -> list[float]:
    """Supervised steps on (question, answer) pairs, with AdamW; the loss of each batch, in nats per answer token.

    Args:
        pairs: draws a pair with the random generator it is given.
        steps, learning_rate, batch_size: of AdamW, without weight decay, gradients clipped to norm 1.
        seed: of the generator.
        accuracy: end as soon as this share of a new batch is answered right, before learning from it; `steps` is then
            the most. Models of different seeds get there at different steps, so no number of steps leaves them alike.

    Raises UsageError if a pair is longer than the model can take, or `steps` do not reach `accuracy`; TrainingError if
    the loss stops being finite.
    """
    if accuracy is not None and not 0 < accuracy <= 1:
        raise UsageError(f"accuracy={accuracy} must be a share of the answers, above 0 and at most 1.")
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses: list[float] = []
    reached = 0.0
    for step in range(steps):
        inputs, targets = _batch(tokenizer, [pairs(generator) for _ in range(batch_size)])
        if inputs.shape[1] > model.config.max_position_embeddings:
            raise UsageError(
                f"A pair has {inputs.shape[1]} tokens, the model takes {model.config.max_position_embeddings}. "
                "Draw shorter pairs."
            )
        targets = targets.to(model.device)
        logits = model(input_ids=inputs.to(model.device)).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED)
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss of warm-start step {step} is {losses[-1]}. Lower learning_rate={learning_rate}."
            )
        if accuracy is not None:
            # Every token is the likeliest after those before it, so the greedy answer is the right one, and its end.
            right = (logits.argmax(-1) == targets) | (targets == _IGNORED)
            reached = right.all(1).float().mean().item()
            if reached >= accuracy:
                break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    else:
        if accuracy is not None:
            raise UsageError(
                f"The warm start answers {reached:.2f} right after {steps} steps, short of accuracy={accuracy}. "
                "Raise steps, or lower accuracy."
            )
    optimizer.zero_grad()
    return losses


def _batch(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets ``[B, T]``; padded on the right, where causal attention makes it harmless."""
    rows = []
    for question, answer in pairs:
        prompt = tokenizer(question)["input_ids"]
        completion = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt + completion[:-1], [_IGNORED] * (len(prompt) - 1) + completion))
    longest = max(len(inputs) for inputs, _ in rows)
    inputs, targets = (
        torch.tensor([[*row[side], *[filler] * (longest - len(row[side]))] for row in rows])
        for side, filler in ((0, tokenizer.pad_token_id), (1, _IGNORED))
    )
    return inputs, targets
