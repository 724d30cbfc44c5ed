"""Log-probabilities of completions under a model, with or without gradients. They are packed if the model allows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grouprl.errors import UsageError
from grouprl.lm.llama.layers import LlamaLayers
from grouprl.lm.packed.attention import PackedAttention
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.head import TokenTerms, log_probs
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group, Pack, split_into_packs
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
    """

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
        self._learning = False

    def micro_batches(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], group: Sequence[int]
    ) -> list[MicroBatch]:
        """Split N samples of P prompts into micro-batches within the token budget.

        The samples of a prompt share its tokens within a micro-batch. Without a backbone, each sample is a micro-batch.

        Args:
            prompts: the token ids of each of the P prompts.
            completions: the token ids of each of the N samples.
            group: for each sample the index of its prompt.
        """
        members: dict[int, list[int]] = {}
        for sample, prompt in enumerate(group):
            members.setdefault(prompt, []).append(sample)
        if self.backbone is None:
            alone = (Group(prompts[p], [completions[i]]) for i, p in enumerate(group))
            return [MicroBatch([one], torch.tensor([i])) for i, one in enumerate(alone)]
        groups = [Group(prompts[p], [completions[i] for i in samples]) for p, samples in members.items()]
        members_of_group = list(members.values())
        batches = []
        for pack in split_into_packs(groups, self.budget, None if self.layers is None else self.layers.pack_tokens):
            pieces = [Group(groups[g].prompt, [groups[g].completions[j] for j in which]) for g, which in pack]
            samples = [members_of_group[g][j] for g, which in pack for j in which]
            batches.append(MicroBatch(pieces, torch.tensor(samples)))
        return batches

    @contextmanager
    def learning(self, *, dropout: bool = True) -> Iterator[None]:
        """Prepare the model for :meth:`evaluate` and its backward pass while the context is open.

        The context rounds each weight once, so weights must not change in it.

        Args:
            dropout: False turns dropout off, even if the constructor turned it on.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        if self.dropout and dropout:
            self.model.train()
        else:
            # Modules with gradient checkpointing work in training mode alone. All others are in evaluation mode, which
            # turns off every form of dropout.
            self.model.eval()
            for module, _ in modes:
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
        self._learning = True
        try:
            if self.backbone is None:
                yield
            elif self.layers is not None:
                with self.precision.learning(self.layers.linears), self.layers.learning(), self.backbone.on_device():
                    yield
            else:
                with self.precision.learning(), self.backbone.following(self._plan), self.backbone.on_device():
                    yield
        finally:
            self._learning = False
            for module, training in modes:
                module.training = training
            self._plan.forget()

    def evaluate(self, batch: MicroBatch) -> TokenTerms:
        """Compute log-probabilities and entropies of the completion tokens of a micro-batch.

        Args:
            batch: a micro-batch with m completion tokens in total.

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
        hidden = self.backbone.hidden(pack.ids, pack.positions) if self.layers is None else self.layers.hidden(pack)
        # On a GPU the gradient of index_select adds rows in the order in which threads arrive. The gradient of indexing
        # adds them in a fixed order.
        hidden = hidden[pack.predictors] if hidden.is_cuda else hidden.index_select(0, pack.predictors)
        head = self.backbone.head
        return log_probs(hidden, head.weight, head.bias, pack.targets, self.temperature, self.precision)

    def _evaluate_plainly(self, groups: Sequence[Group]) -> TokenTerms:
        """Compute the same as :meth:`evaluate` with a plain call of the model for each sample."""
        device, low = next(self.model.parameters()).device, self.precision.dtype != torch.float32
        with torch.autocast(device.type, self.precision.dtype, enabled=low):
            terms = [
                own_terms(self.model, group.prompt, completion, self.temperature)
                for group in groups
                for completion in group.completions
            ]
        return TokenTerms(torch.cat([t.logp for t in terms]), torch.cat([t.entropy for t in terms]))

    @torch.no_grad()
    def without_gradient(self, micro_batches: Sequence[MicroBatch], lengths: Tensor) -> Tensor:
        """Compute log-probabilities without gradients and without dropout.

        Args:
            micro_batches: the samples to evaluate.
            lengths: ``[N]`` int64, the completion lengths of all N samples.

        Returns:
            Log-probabilities ``[S]`` float32 in nats of all S completion tokens of the N samples, one sample after the
            other. Samples that are in no micro-batch have 0.

        Raises:
            TrainingError: some are not finite.
        """
        ends = lengths.cumsum(0)
        out = torch.zeros(int(ends[-1]), device=lengths.device)
        with self.learning(dropout=False):
            for batch in micro_batches:
                out[steps_of(batch.samples, lengths)] = self.evaluate(batch).logp.to(out.device)
        if not all_finite(out):
            raise not_finite("log-probabilities of completions", self.model)
        return out


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


def own_terms(
    model: nn.Module, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> TokenTerms:
    """Compute log-probabilities and entropies of a completion by the model's own forward pass over one sequence.

    Args:
        model: a causal model.
        prompt: the token ids of the prompt.
        completion: the ``n`` token ids of the completion.
        temperature: a positive number that divides the logits.

    Returns:
        Log-probabilities and entropies, each ``[n]`` float32 in nats.
    """
    ids = torch.tensor([[*prompt, *completion]], device=next(model.parameters()).device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    # From the end, because adapters with virtual tokens may have logits for these in front.
    logits = logits[0, -len(completion) - 1 : -1].float() / temperature
    logp = logits.log_softmax(-1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return TokenTerms(logp.gather(1, ids[0, -len(completion) :, None])[:, 0], entropy)


def steps_of(samples: Tensor, lengths: Tensor) -> Tensor:
    """Find the completion tokens of some samples in a tensor ``[S]`` that holds the tokens of all samples end to end.

    Args:
        samples: ``[n]`` int64, the indices of the samples.
        lengths: ``[N]`` int64, the completion lengths of all N samples.

    Returns:
        The indices ``[m]`` int64 of the m tokens of the samples, in the order of ``samples``.
    """
    starts = (lengths.cumsum(0) - lengths)[samples]
    return torch.repeat_interleave(starts, lengths[samples]) + position(lengths[samples])
