"""Which implementation of a decode step a model gets: the fastest whose logits are those of its own forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import util

import torch
from torch import Tensor

from grouprl.errors import first_line
from grouprl.lm.kernels.compile import UnavailableError
from grouprl.lm.llama.block import JoinedProducts, LlamaBlocks, find_llama
from grouprl.lm.llama.decode_c import can_decode_in_c
from grouprl.lm.llama.decode_triton import can_decode_in_triton
from grouprl.lm.packed.attention import UnsupportedError
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group
from grouprl.lm.packed.trial import Trial, is_rounding
from grouprl.lm.sample.decode_steps import DecodeSteps, Steps

_log = logging.getLogger("grouprl")

Work = Callable[[], object]


def find_decode_steps(
    backbone: Backbone, precision: LowPrecision, fastest: Steps, trial: Trial
) -> tuple[DecodeSteps, str]:
    """Choose the fastest implementation that supports the model and agrees with its own forward pass.

    Args:
        backbone: the model.
        precision: the precision of matrix products.
        fastest: the fastest implementation that may be chosen. "modules" is not tried.
        trial: a trial of this model with its weights as they are.

    Returns:
        The implementation, and the reason why a faster one was expected and cannot be used, or "".

    Raises:
        UnsupportedError: the modules give other logits in decode steps than in a forward pass.
    """
    modules, why = DecodeSteps(backbone, precision, "modules"), ""
    if fastest == "modules":
        return modules, why
    llama = find_llama(backbone)
    if llama is not None and fastest == "native":
        found, why = _compiled_steps(backbone, precision, llama, trial)
        if found is not None:
            return found, ""
    if llama is not None:
        found = DecodeSteps(backbone, precision, "blocks", llama)
        if not disagreement(found, trial):
            return found, why
    try:
        wrong = disagreement(modules, trial)
    except (RuntimeError, TypeError) as error:  # some layers do not take the dtype of the others' outputs
        raise UnsupportedError(f"its layers cannot run in {precision.dtype}: {first_line(error)}") from error
    if wrong:
        raise UnsupportedError("decode steps give other logits than the model's own forward pass")
    return modules, why


def _compiled_steps(
    backbone: Backbone, precision: LowPrecision, llama: LlamaBlocks, trial: Trial
) -> tuple[DecodeSteps | None, str]:
    """Compiled code, C on a CPU and Triton on a GPU, if it supports the model and agrees with its own forward pass.

    Returns None if not, with the reason if it was expected to.
    """
    if backbone.device.type == "cpu":
        supported = can_decode_in_c(backbone.decoder, backbone.head)
    else:
        joined = backbone.device.type == "cuda" and JoinedProducts.can_join(llama)
        supported = joined and can_decode_in_triton(llama, precision.dtype)
        if supported and util.find_spec("triton") is None:
            why = "there is no Triton; install it with: pip install triton"
            warn_slower(backbone, "and learns more slowly", why)
            return None, why
    if not supported:
        return None, ""
    found = DecodeSteps(backbone, precision, "native", llama)
    try:
        if not disagreement(found, trial):
            return found, ""
        raise UnavailableError("compiled decode steps give other logits than the model")
    except Exception as error:  # Triton raises many types of errors
        if not isinstance(error, UnavailableError) and backbone.device.type == "cpu":
            raise
        warn_slower(backbone, "at half the speed, without compiled code", str(error))
        return None, str(error)


def warn_slower(backbone: Backbone, how: str, why: str) -> None:
    """Log that the model samples more slowly than it could."""
    _log.warning("%s samples %s: %s", type(backbone.core).__name__, how, why)


def disagreement(decode: DecodeSteps, trial: Trial) -> str:
    """Compare decode steps with the model's own forward pass. Returns "", or what is wrong."""
    low, own = decode.precision.dtype, trial.own().flatten(0, 1).transpose(0, 1)
    pieces = _piece_logits(decode, trial.groups).log_softmax(-1)

    def wrong(found: Tensor, at: list[int], what: str) -> str:
        difference = relative_difference(found, own[at])

        def of_the_model() -> float:
            return relative_difference(trial.own(low).flatten(0, 1).transpose(0, 1)[at], own[at])

        if is_rounding(difference, low, of_the_model):
            return ""
        return f"log-probabilities of {what} differ by {difference:.2g} from those of the model's forward pass"

    return wrong(step_logits(decode, trial.groups).log_softmax(-1), list(range(len(own))), "decode steps") or wrong(
        pieces, [0, len(own) - 1], "stretches of tokens"
    )


@torch.no_grad()
def step_logits(
    decode: DecodeSteps, groups: Sequence[Group], repeated: Callable[[Work], Work] = lambda work: work
) -> Tensor:
    """Logits ``[n, B, V]`` before each of the n tokens of B completions, which take the place of draws.

    Args:
        decode: runs the model.
        groups: two completions of each prompt, all of n tokens.
        repeated: makes of the decode step what is called for each token, such as a recording of it.
    """
    device = decode.backbone.device
    tokens = torch.tensor([c for group in groups for c in group.completions]).t()
    with decode.prepared():
        decoder, first = decode.read([group.prompt for group in groups], 2, len(tokens))
        out = [first.repeat_interleave(2, 0)]
        token = torch.empty_like(tokens[0], device=device)
        position = decoder.lengths.repeat_interleave(2)
        logits = torch.empty_like(out[0])
        step = repeated(lambda: logits.copy_(decoder.step(token, position)))
        for new in tokens[:-1]:
            token.copy_(new)
            decoder.reserve()
            step()
            out.append(logits.clone())
            position += 1
    return torch.stack(out)


@torch.no_grad()
def _piece_logits(decode: DecodeSteps, groups: Sequence[Group]) -> Tensor:
    """Logits ``[2, B, V]`` before the first and the last of the n tokens of B completions, read in pieces.

    The prompts are read once for their completions. Then every completion is read in two pieces, cut at different
    places, beside another one or alone.
    """
    prompts, rows = [group.prompt for group in groups], [c[:-1] for group in groups for c in group.completions]
    slots = list(range(len(rows)))[::-1]
    with decode.prepared():
        decoder = decode.appending(len(rows), max(map(len, rows)))
        first = decoder.begin(prompts, [slots[2 * i : 2 * i + 2] for i in range(len(prompts))])
        last = first.new_empty(len(rows), first.shape[-1])
        cut = [1 + i % 2 for i in range(len(rows))]
        decoder.append(slots[1:], [row[:n] for row, n in zip(rows[1:], cut[1:], strict=True)])
        last[:1] = decoder.append(slots[:1], rows[:1])
        last[1:] = decoder.append(slots[1:], [row[n:] for row, n in zip(rows[1:], cut[1:], strict=True)])
    return torch.stack([first.repeat_interleave(2, 0), last])


def relative_difference(logits: Tensor, reference: Tensor) -> float:
    """The relative difference of ``logits`` from ``reference``."""
    return float((logits - reference).norm() / reference.norm())
