"""Log-probabilities of completions under the current model, with gradients: packed where the model allows it."""

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
        backbone: its packed form, or None for the plain path.
        precision: how linear layers compute.
        temperature: logits are divided by it; the temperature the completions were sampled at.
        budget: most input tokens of a micro-batch.
        dropout: whether the model's dropout layers are active while learning.
        native: use compiled attention where it is available.
        layers: the model's layers as fused functions, or None to run its own modules.
    """

    def __init__(
        self, model: nn.Module, backbone: Backbone | None, precision: LowPrecision, temperature: float, budget: int,
        dropout: bool = False, native: bool = True, layers: LlamaLayers | None = None,
    ) -> None:  # fmt: skip
        self.layers = layers
        self.model, self.backbone, self.precision = model, backbone, precision
        self.temperature, self.budget, self.dropout = temperature, budget, dropout
        self._plan = PackedAttention(None, precision.dtype, native=native)
        self._learning = False

    def micro_batches(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], group: Sequence[int]
    ) -> list[MicroBatch]:
        """Split N samples of P prompts into micro-batches within the budget; samples of one prompt share it.

        Without a backbone each sample is a micro-batch of its own.

        Args:
            prompts: token ids of each of the P prompts.
            completions: token ids of each of the N samples.
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
        """The context in which :meth:`evaluate` and its backward pass run. Weights are rounded once, at its start.

        Args:
            dropout: False turns dropout off, even where the constructor turned it on.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        if self.dropout and dropout:
            self.model.train()
        else:
            # Only what recomputes activations must believe that it trains; dropout must not, however it is written.
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
        """Log-probability and entropy ``[m]`` of the batch's completion tokens in nats, sample after sample.

        Raises UsageError outside of :meth:`learning`: there the model's own attention would read the packed row as one
        sequence.
        """
        if not self._learning:
            raise UsageError("LogProbs.evaluate works within learning() alone: with log_probs.learning(): ...")
        if self.backbone is None:
            return self._evaluate_plainly(batch.groups)
        pack = self._plan.pack = Pack.of(batch.groups, self.backbone.device)
        hidden = self.backbone.hidden(pack.ids, pack.positions) if self.layers is None else self.layers.hidden(pack)
        # On a GPU the gradient of index_select is added up in whatever order threads arrive, that of indexing is not.
        hidden = hidden[pack.predictors] if hidden.is_cuda else hidden.index_select(0, pack.predictors)
        head = self.backbone.head
        return log_probs(hidden, head.weight, head.bias, pack.targets, self.temperature, self.precision)

    def _evaluate_plainly(self, groups: Sequence[Group]) -> TokenTerms:
        """Sample by sample, the way anybody would: for models that cannot be packed."""
        logps, entropies = [], []
        device = next(self.model.parameters()).device
        low = self.precision.dtype != torch.float32
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor([[*group.prompt, *completion]], device=device)
                with torch.autocast(device.type, self.precision.dtype, enabled=low):
                    logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
                logits = logits[0, len(group.prompt) - 1 : -1].float() / self.temperature
                logp = logits.log_softmax(-1)
                entropies.append(-(logp.detach().exp() * logp.detach()).sum(-1))
                logps.append(logp.gather(1, ids[0, len(group.prompt) :, None])[:, 0])
        return TokenTerms(torch.cat(logps), torch.cat(entropies))

    @torch.no_grad()
    def without_gradient(self, micro_batches: Sequence[MicroBatch], lengths: Tensor) -> Tensor:
        """Log-probabilities ``[S]`` of samples in ``micro_batches``, packed by ``lengths [N]``; 0 for other samples.

        Dropout is always off: the caller keeps these as the log-probabilities of the old policy or of a reference.
        """
        ends = lengths.cumsum(0)
        out = torch.zeros(int(ends[-1]), device=lengths.device)
        with self.learning(dropout=False):
            for batch in micro_batches:
                out[steps_of(batch.samples, lengths)] = self.evaluate(batch).logp.to(out.device)
        return out


def steps_of(samples: Tensor, lengths: Tensor) -> Tensor:
    """Indices ``[m]`` of the tokens of ``samples [n]``, sample after sample, in a tensor packed by ``lengths [N]``."""
    starts = (lengths.cumsum(0) - lengths)[samples]
    return torch.repeat_interleave(starts, lengths[samples]) + position(lengths[samples])
