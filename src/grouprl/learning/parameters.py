"""All trainable parameters of a module as one vector, their gradient as another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grouprl.errors import UsageError


class FlatParameters:
    """All trainable parameters of a module as views into one vector, so that one norm and one optimizer call serve any.

    A gradient comes about in one of two ways. Either backward passes write it: :meth:`start`, any number of
    ``loss.backward()``, :meth:`finish`. Each parameter's ``main_grad`` is its place in the flat gradient, so that a
    layer with a backward pass of its own may write there directly. Or it is computed as a vector, by
    :meth:`gradient_of` or by other means, which several threads may do at once: :meth:`start`, :meth:`add` for each.

    Args:
        module: whose parameters. decayed_first: order them so that those with two dimensions or more come first, which
            are the ones that weight decay is for; otherwise they stay in the module's order.

    Attributes:
        tensors: the parameters. vector: ``[P]``. n_decayed: how many of its entries have two dimensions or more.

    Raises UsageError if nothing is trainable, or the trainable parameters differ in type or device.
    """

    def __init__(self, module: nn.Module, *, decayed_first: bool = False) -> None:
        trainable = [p for p in module.parameters() if p.requires_grad]
        if not trainable:
            raise UsageError("the model has no trainable parameter; set requires_grad on some, or pass peft_config")
        kinds = {(p.dtype, p.device) for p in trainable}
        if len(kinds) > 1:
            raise UsageError(
                "trainable parameters must share one type and device, got "
                f"{', '.join(sorted(f'{dtype} on {device}' for dtype, device in kinds))}; load the model with one dtype"
            )
        self.tensors = sorted(trainable, key=lambda p: p.dim() < 2) if decayed_first else trainable
        self.n_decayed = sum(p.numel() for p in self.tensors if p.dim() >= 2)
        total = sum(p.numel() for p in self.tensors)
        self.vector = nn.Parameter(torch.empty(total, dtype=trainable[0].dtype, device=trainable[0].device))
        self._gradient = torch.zeros_like(self.vector.data)
        self.vector.grad = self._gradient
        self._added = False
        offset = 0
        with torch.no_grad():
            for p in self.tensors:
                place = slice(offset, offset + p.numel())
                self.vector[place] = p.detach().reshape(-1)
                p.data = self.vector.data[place].view(p.shape)
                p.main_grad = self._gradient[place].view(p.shape)  # type: ignore[attr-defined]
                p.grad = p.main_grad  # type: ignore[attr-defined]
                offset += p.numel()

    @property
    def gradient(self) -> Tensor:
        """``[P]``, of the last step."""
        assert self.vector.grad is not None
        return self.vector.grad

    def start(self) -> None:
        """Begin a gradient: whoever writes first, writes over what is there."""
        self._added = False
        for p in self.tensors:
            p.grad = None

    def add(self, gradient: Tensor) -> None:
        """Add a part ``[P]``, which must not be used afterwards: the first one becomes the gradient."""
        if self._added:
            self.gradient.add_(gradient)
        else:
            self.vector.grad, self._added = gradient, True

    def finish(self) -> None:
        """End a gradient that backward passes wrote: parameters that no loss reached get 0."""
        if self._added:
            return
        self.vector.grad = self._gradient
        for p in self.tensors:
            place: Tensor = p.main_grad  # type: ignore[attr-defined]
            if p.grad is None:
                place.zero_()
            elif p.grad is not place:
                place.copy_(p.grad)
            p.grad = place

    def gradient_of(self, loss: Tensor) -> Tensor:
        """d loss / d vector, ``[P]``; parameters the loss does not reach get 0. Safe to call from several threads."""
        grads = torch.autograd.grad(loss, self.tensors, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, self.tensors, strict=True)]
        )

    def clip(self, max_norm: float) -> float:
        """The norm of the gradient, which is scaled down to ``max_norm`` if that is above 0 and exceeded."""
        dtype = torch.promote_types(self.gradient.dtype, torch.float32)
        norm = float(torch.linalg.vector_norm(self.gradient, dtype=dtype))
        if 0 < max_norm < norm:
            self.gradient.mul_(max_norm / (norm + 1e-6))
        return norm

    def slices(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What an optimizer steps: the decayed part and the rest, each a parameter or nothing, in the same memory."""
        parts: list[list[nn.Parameter]] = []
        for place in (slice(0, self.n_decayed), slice(self.n_decayed, len(self.vector))):
            parameter = nn.Parameter(self.vector.data[place])
            parameter.grad = self._gradient[place]
            parts.append([parameter] if parameter.numel() else [])
        return parts[0], parts[1]
