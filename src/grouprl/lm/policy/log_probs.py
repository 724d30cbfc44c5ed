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
from grouprl.lm.packed.low_precision import Products
from grouprl.lm.packed.packing import Group, Pack, micro_batches
from grouprl.objective.packed import position


@dataclass(frozen=True)
class Part:
    """What is learned from at once: some groups, and which samples ``[n]`` their completions are, in order."""

    groups: Sequence[Group]
    samples: Tensor


class Learner:
    """The current policy's view of completions.

    Args:
        model: the model. backbone: its packed form, or None for the plain path. products: the precision.
        temperature: what logits are divided by: the temperature the completions were sampled at.
        budget: most input tokens of a part.
        dropout: whether the model's dropout layers are active while learning.
        native: use compiled attention. layers: the model's layers as fused functions, or None.
    """

    def __init__(
        self, model: nn.Module, backbone: Backbone | None, products: Products, temperature: float, budget: int,
        dropout: bool = False, native: bool = True, layers: LlamaLayers | None = None,
    ) -> None:  # fmt: skip
        self.layers = layers
        self.model, self.backbone, self.products = model, backbone, products
        self.temperature, self.budget, self.dropout = temperature, budget, dropout
        self._plan = PackedAttention(None, products.dtype, native=native)
        self._learning = False

    def parts(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], group: Sequence[int]
    ) -> list[Part]:
        """Split samples into parts within the budget; samples of one prompt share it.

        Args:
            prompts: token ids of each prompt. completions: of each sample. group: the prompt of each sample.
        """
        members: dict[int, list[int]] = {}
        for sample, prompt in enumerate(group):
            members.setdefault(prompt, []).append(sample)
        if self.backbone is None:
            alone = (Group(prompts[p], [completions[i]]) for i, p in enumerate(group))
            return [Part([one], torch.tensor([i])) for i, one in enumerate(alone)]
        groups = [Group(prompts[p], [completions[i] for i in samples]) for p, samples in members.items()]
        of_group = list(members.values())
        parts = []
        for chosen in micro_batches(groups, self.budget, None if self.layers is None else self.layers.together):
            cut = [Group(groups[g].prompt, [groups[g].completions[j] for j in which]) for g, which in chosen]
            parts.append(Part(cut, torch.tensor([of_group[g][j] for g, which in chosen for j in which])))
        return parts

    @contextmanager
    def learning(self, *, dropout: bool = True) -> Iterator[None]:
        """Surround :meth:`evaluate` and its backward pass with it; weights are rounded once for as long as it lasts.

        Args:
            dropout: False leaves dropout out even where the learner has it.
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
                with self.products.learning(self.layers.linears), self.layers.learning(), self.backbone.on_device():
                    yield
            else:
                with self.products.learning(), self.backbone.following(self._plan), self.backbone.on_device():
                    yield
        finally:
            self._learning = False
            for module, training in modes:
                module.training = training
            self._plan.forget()

    def evaluate(self, part: Part) -> TokenTerms:
        """Terms of the part's completion tokens ``[m]``, sample after sample. Raises UsageError outside of
        :meth:`learning`, where attention would be the model's own and see the packed row as one sequence."""
        if not self._learning:
            raise UsageError("Learner.evaluate works within learning() alone: with learner.learning(): ...")
        if self.backbone is None:
            return self._evaluate_plainly(part.groups)
        pack = self._plan.pack = Pack.of(part.groups, self.backbone.device)
        hidden = self.backbone.hidden(pack.ids, pack.positions) if self.layers is None else self.layers.hidden(pack)
        # On a GPU the gradient of index_select is added up in whatever order threads arrive, that of indexing is not.
        hidden = hidden[pack.predictors] if hidden.is_cuda else hidden.index_select(0, pack.predictors)
        head = self.backbone.head
        return log_probs(hidden, head.weight, head.bias, pack.targets, self.temperature, self.products)

    def _evaluate_plainly(self, groups: Sequence[Group]) -> TokenTerms:
        """Sample by sample, the way anybody would: for models that cannot be packed."""
        logps, entropies = [], []
        device = next(self.model.parameters()).device
        low = self.products.dtype != torch.float32
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor([[*group.prompt, *completion]], device=device)
                with torch.autocast(device.type, self.products.dtype, enabled=low):
                    logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
                logits = logits[0, len(group.prompt) - 1 : -1].float() / self.temperature
                logp = logits.log_softmax(-1)
                entropies.append(-(logp.detach().exp() * logp.detach()).sum(-1))
                logps.append(logp.gather(1, ids[0, len(group.prompt) :, None])[:, 0])
        return TokenTerms(torch.cat(logps), torch.cat(entropies))

    @torch.no_grad()
    def log_probs(self, parts: Sequence[Part], lengths: Tensor) -> Tensor:
        """Log-probabilities ``[S]`` of the samples in ``parts``, packed by ``lengths [N]``; 0 for other samples.

        Always without dropout: these are kept, as those of the policy that sampled or of a reference.
        """
        ends = lengths.cumsum(0)
        out = torch.zeros(int(ends[-1]), device=lengths.device)
        with self.learning(dropout=False):
            for part in parts:
                out[steps_of(part.samples, lengths)] = self.evaluate(part).logp.to(out.device)
        return out


def steps_of(samples: Tensor, lengths: Tensor) -> Tensor:
    """``[m]``: where the steps of ``samples [n]``, one after another, lie among packed steps of ``lengths [N]``."""
    starts = (lengths.cumsum(0) - lengths)[samples]
    return torch.repeat_interleave(starts, lengths[samples]) + position(lengths[samples])
