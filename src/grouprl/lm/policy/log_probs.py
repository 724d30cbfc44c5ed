"""Log-probabilities of completions under a model, with or without gradients. They are packed if the model allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.errors import UsageError
from grouprl.lm.llama.layers import LlamaLayers
from grouprl.lm.packed.attention import PackedAttention
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.experts import Experts, Routed, weights_of
from grouprl.lm.packed.head import TokenTerms, log_probs
from grouprl.lm.packed.low_precision import LowPrecision, is_touched
from grouprl.lm.packed.packing import Group, Pack, Spans, split_into_packs
from grouprl.lm.packed.trial import own_terms
from grouprl.lm.sample.finite import all_finite, not_finite
from grouprl.objective.packed import position


@dataclass(frozen=True)
class MicroBatch:
    """Completions that run through the model in one pass.

    Attributes:
        groups: the prompts and their completions.
        samples: ``[n]`` int64, the index of each completion among all samples, in the order of ``groups``.
    """

    groups: Sequence[Group]
    samples: Tensor


class LogProbs:
    """Computes log-probabilities of completions under a model, with or without gradients.

    Args:
        model: the model.
        backbone: the parts of the model for the packed path, or None for the plain path.
        precision: the precision of matrix products.
        temperature: a positive number that divides the logits. It should be the temperature of sampling.
        budget: the most input tokens of a micro-batch.
        dropout: whether the model's dropout layers are active while learning.
        native: whether to use compiled attention where it supports the model.
        layers: fused implementations of the model's layers, or None to run the modules of the model.

    Attributes:
        by_entropy: whether entropies carry a gradient, as an entropy bonus needs; False unless it is set.
        experts: reads the routers of a mixture of experts, whose load is to be balanced; None unless it is set.
    """

    by_entropy = False
    experts: Experts | None = None

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone | None,
        precision: LowPrecision,
        temperature: float,
        budget: int,
        dropout: bool = False,
        native: bool = True,
        layers: LlamaLayers | None = None,
    ) -> None:
        self.layers = layers
        self.model, self.backbone, self.precision = model, backbone, precision
        self.temperature, self.budget, self.dropout = temperature, budget, dropout
        self._plan = PackedAttention(None, precision.dtype, native=native)
        self._learning = self._fused = False

    def micro_batches(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        group: Sequence[int],
        turns: Sequence[Spans] | None = None,
    ) -> list[MicroBatch]:
        """Split N samples of P prompts into micro-batches within the token budget.

        The samples of a prompt share its tokens within a micro-batch. Without a backbone, each sample is a micro-batch.
        With dropout, each group is one or several: what is dropped in it then depends on no other group.

        Args:
            prompts: the token ids of each of the P prompts.
            completions: the token ids of each of the N samples.
            group: for each sample the index of its prompt.
            turns: for each sample the turns of the model in it, or None if each is one turn.
        """
        members: dict[int, list[int]] = {}
        for sample, prompt in enumerate(group):
            members.setdefault(sample if self.backbone is None else prompt, []).append(sample)
        members_of_group = list(members.values())
        groups = [
            Group(
                prompts[group[samples[0]]],
                [completions[i] for i in samples],
                None if turns is None else [turns[i] for i in samples],
            )
            for samples in members_of_group
        ]
        if self.backbone is None:
            return [MicroBatch([one], torch.tensor([i])) for i, one in enumerate(groups)]
        batches = []
        together = 0 if self.dropout else None if self.layers is None else self.layers.pack_tokens
        for pack in split_into_packs(groups, self.budget, together):
            pieces = [groups[g].only(which) for g, which in pack]
            samples = [members_of_group[g][j] for g, which in pack for j in which]
            batches.append(MicroBatch(pieces, torch.tensor(samples)))
        return batches

    @contextmanager
    def learning(self, *, dropout: bool = True) -> Iterator[None]:
        """Prepare the model for :meth:`evaluate` and its backward pass while the context is open.

        The context rounds each weight once, so weights must not change in it. Fused layers stand aside while modules
        of the model have hooks, since these would not be called.

        Args:
            dropout: False turns dropout off, even if the constructor turned it on.

        Raises:
            UsageError: the head of the model was given a hook since construction.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        checkpointing: list[tuple[Any, Any]] = []
        if self.backbone is not None and is_touched(self.backbone.head):
            raise UsageError("the head of the model has a hook that it had not at construction; make the trainer anew")
        if self.dropout and dropout:
            self.model.train()
        else:
            # Layers with gradient checkpointing work in training mode alone. All others are in evaluation mode, which
            # turns off every form of dropout.
            self.model.eval()
            for module, _ in modes:
                if torch.is_grad_enabled() and _has_checkpointing(module):
                    module.training = True
                    checkpointing.append((module, _stay_at_rest(module)))
        self._learning = True
        watched = nullcontext() if self.experts is None else self.experts.watched()
        self._fused = self.layers is not None and not any(map(is_touched, self.layers.decoder.modules()))
        try:
            if self.backbone is None:
                with watched:
                    yield
            elif self.layers is not None and self._fused:
                with self.precision.learning(self.layers.linears), self.layers.learning(), self.backbone.on_device():
                    yield
            else:
                with (
                    self.precision.learning(), self.backbone.following(self._plan), self.backbone.on_device(), watched,
                ):  # fmt: skip
                    yield
        finally:
            self._learning = False
            for module, function in checkpointing:
                module._gradient_checkpointing_func = function
            for module, training in modes:
                module.training = training
            self._plan.forget()

    def evaluate(self, batch: MicroBatch) -> TokenTerms:
        """Compute log-probabilities and entropies of the tokens that the model predicts in a micro-batch.

        Args:
            batch: a micro-batch with m tokens of the model in total. Tokens of its partner are read and not predicted.

        Returns:
            Log-probabilities and entropies, each ``[m]`` float32 in nats, one sample after the other.

        Raises:
            UsageError: the call is outside of :meth:`learning`. The attention of the model would read the packed row
                as one sequence there.
        """
        if not self._learning:
            raise UsageError("LogProbs.evaluate works within learning() alone: with log_probs.learning(): ...")
        if self.backbone is None:
            return self._evaluate_plainly(batch.groups)
        pack = self._plan.pack = Pack.of(batch.groups, self.backbone.device)
        fused = self.layers if self._fused else None
        hidden = self.backbone.hidden(pack.ids, pack.positions) if fused is None else fused.hidden(pack)
        routed = None
        if self.experts is not None:
            routed = self.experts.routed(torch.tensor(weights_of(batch.groups), device=hidden.device))
        # On a GPU the gradient of index_select adds rows in the order in which threads arrive. The gradient of indexing
        # adds them in a fixed order.
        hidden = hidden[pack.predictors] if hidden.is_cuda else hidden.index_select(0, pack.predictors)
        head = self.backbone.head
        return log_probs(
            hidden, head.weight, head.bias, pack.targets, self.temperature, self.precision, self.by_entropy
        )._replace(routed=routed)

    def _evaluate_plainly(self, groups: Sequence[Group]) -> TokenTerms:
        """Compute the same as :meth:`evaluate` with a plain call of the model for each sample."""
        device, low = next(self.model.parameters()).device, self.precision.dtype != torch.float32
        with torch.autocast(device.type, self.precision.dtype, enabled=low):
            terms, routed = [], None
            for group in groups:
                for completion, turns in zip(group.completions, group.turns or repeat(None), strict=False):
                    terms.append(
                        own_terms(self.model, group.prompt, completion, self.temperature, turns, self.by_entropy)
                    )
                    if self.experts is not None:
                        here = self.experts.routed()
                        routed = here if routed is None else routed.plus(here)
        return TokenTerms(torch.cat([t.logp for t in terms]), torch.cat([t.entropy for t in terms]), routed)

    def without_gradient(self, micro_batches: Sequence[MicroBatch], lengths: Tensor) -> Tensor:
        """Compute log-probabilities without gradients and without dropout.

        Args:
            micro_batches: the samples to evaluate.
            lengths: ``[N]`` int64, the numbers of the model's tokens in all N samples.

        Returns:
            Log-probabilities ``[S]`` float32 in nats of all S tokens of the model in the N samples, sample after
            sample. Samples that are in no micro-batch have 0.

        Raises:
            TrainingError: some are not finite.
        """
        return self.terms_without_gradient(micro_batches, lengths).logp

    @torch.no_grad()
    def terms_without_gradient(self, micro_batches: Sequence[MicroBatch], lengths: Tensor) -> TokenTerms:
        """The same with entropies, two of ``[S]``, and what routers did with all tokens that were read."""
        ends = lengths.cumsum(0)
        logp, entropy = (torch.zeros(int(ends[-1]), device=lengths.device) for _ in range(2))
        routed: Routed | None = None
        with self.learning(dropout=False):
            for batch in micro_batches:
                at, terms = steps_of(batch.samples, lengths), self.evaluate(batch)
                logp[at], entropy[at] = terms.logp.to(logp.device), terms.entropy.to(logp.device)
                if terms.routed is not None:
                    routed = terms.routed if routed is None else routed.plus(terms.routed)
        if not all_finite(logp):
            raise not_finite("log-probabilities of completions", self.model)
        return TokenTerms(logp, entropy, routed)


@torch.no_grad()
def check_logits(what: str, model: nn.Module) -> None:
    """Raise UsageError, about ``what``, if the logits of a model for its first few tokens are not finite."""
    training = model.training
    model.eval()
    try:
        ids = torch.arange(4, device=next(model.parameters()).device)[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError):
        return  # a model may not know this form of the call, or need the products that the paths make for it
    finally:
        model.train(training)
    if not bool((logits.float().amax(-1).abs() < float("inf")).all()):  # nor NaN; a model may rule tokens out by -inf
        raise UsageError(str(not_finite(what, model)))


def _has_checkpointing(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing


def _stay_at_rest(module: Any) -> Any:
    """Let a layer with gradient checkpointing run its dropout in evaluation mode. Returns what to restore later."""
    function = module._gradient_checkpointing_func

    def checkpointed(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def at_rest(*inputs: Any, **options: Any) -> Any:
            module.training = False
            try:
                return run(*inputs, **options)
            finally:
                module.training = True

        return function(at_rest, *args, **kwargs)

    module._gradient_checkpointing_func = checkpointed
    return function


def steps_of(samples: Tensor, lengths: Tensor) -> Tensor:
    """Find the tokens of some samples in a tensor ``[S]`` that holds those of all samples end to end.

    Args:
        samples: ``[n]`` int64, the indices of the samples.
        lengths: ``[N]`` int64, the numbers of the model's tokens in all N samples. With the number of turns of each
            sample, the function finds their turns.

    Returns:
        The indices ``[m]`` int64 of the m tokens of the samples, in the order of ``samples``.
    """
    starts = (lengths.cumsum(0) - lengths)[samples]
    return torch.repeat_interleave(starts, lengths[samples]) + position(lengths[samples])
