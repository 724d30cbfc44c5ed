"""The trainable parameters of a module, which own their weights, and one gradient of all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grouprl.errors import UsageError
from grouprl.learning.shards import held
from grouprl.machine.ranks import Ranks


class _Form(NamedTuple):
    """What about a parameter decides how it is trained."""

    parameter: nn.Parameter
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    trained: bool

    @classmethod
    def of(cls, p: nn.Parameter) -> _Form:
        return cls(p, p.shape, p.dtype, p.device, p.requires_grad)


class TrainedParameters:
    """The trainable parameters of a module, and one gradient of all of them, so that one norm serves any module.

    The module owns its weights: each parameter keeps its own storage, and whoever gives it another one changes nothing
    here (``.half().float()``, a trip to another device), as an optimizer steps the parameter itself. The gradient is a
    vector. It comes about in one of two ways. Either it is computed as a vector, by :meth:`gradient_of`
    or by other means, which several threads may do at once: :meth:`start`, :meth:`add` for each. Or backward passes
    write it, within :meth:`written_in_place`: :meth:`start`, any number of ``loss.backward()``, :meth:`finish`. Each
    parameter's ``main_grad`` is then its place in the vector, so that a layer with a backward pass of its own may write
    there directly.

    Args:
        module: whose parameters.

    Attributes:
        tensors: the parameters, in the module's order. size: P, the number of their entries.

    Raises UsageError if nothing is trainable, or some parameter cannot be trained as it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._forms = {name: _Form.of(p) for name, p in module.named_parameters()}
        self.tensors = [form.parameter for form in self._forms.values() if form.trained]
        if not self.tensors:
            raise UsageError("the model has no trainable parameter; set requires_grad on some, or pass peft_config")
        for name, form in self._forms.items():
            if form.trained:
                _check_trainable(name, form)
        devices = sorted({str(p.device) for p in self.tensors})
        if len(devices) > 1:
            raise UsageError(
                f"trainable parameters must be on one device, got {', '.join(devices)}; load the model on one"
            )
        self.size = sum(p.numel() for p in self.tensors)
        self._whole: list[Tensor] = []
        self._places: list[Tensor] = []
        self._added = False
        self.check()
        self._check_apart()

    def check(self) -> None:
        """Check that the module holds the very parameters that were found in it, of the same kind.

        Raises UsageError if one was replaced, added, removed, frozen, or has another shape, dtype or device.
        """
        found = dict(self.module.named_parameters())
        for name, p in found.items():
            form = self._forms.get(name)
            if form is None or form.parameter is not p or form != _Form.of(p):
                raise UsageError(f"{_difference(name, form, p)} since training was set up; {_ADVICE}")
            if not p.is_contiguous():
                p.data = p.data.contiguous()
        if len(found) != len(self._forms):
            gone = next(name for name in self._forms if name not in found)
            raise UsageError(f"the parameter {gone} is gone since training was set up; {_ADVICE}")

    def _check_apart(self) -> None:
        """Raise UsageError if two trainable parameters share memory."""
        _check_apart(self._forms)

    # --- values ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def values(self) -> Tensor:
        """A copy ``[P]`` of all weights, end to end."""
        return torch.cat([p.reshape(-1) for p in self.tensors])

    @torch.no_grad()
    def load(self, values: Tensor) -> None:
        """Set all weights to ``values [P]``, as :meth:`values` gave them."""
        for p, part in zip(self.tensors, self.split(values), strict=True):
            p.copy_(part)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector ``[P]``, one for each parameter, in its shape."""
        parts = torch.split(vector, [p.numel() for p in self.tensors])
        return [part.view(p.shape) for part, p in zip(parts, self.tensors, strict=True)]

    @torch.no_grad()
    def total(self) -> float:
        """The sum of all weights."""
        return sum(float(held(p).sum(dtype=torch.float64)) for p in self.tensors)

    def not_finite(self) -> str:
        """The name of a trained parameter, as the module has it now, that is not finite, or ""."""
        trained = {name for name, form in self._forms.items() if form.trained}
        found = {name: held(p) for name, p in self.module.named_parameters() if name in trained or p.requires_grad}
        # A sum is finite wherever its terms are, unless they are huge, and takes a tenth of the time of asking each.
        sums = [p.sum(dtype=torch.promote_types(p.dtype, torch.float32)) for p in found.values()]
        if not sums or bool(torch.stack(sums).isfinite().all()):
            return ""
        return next((name for name, p in found.items() if not bool(p.isfinite().all())), "")

    # --- the gradient ------------------------------------------------------------------------------------------------

    @contextmanager
    def written_in_place(self) -> Iterator[None]:
        """Keep a vector for backward passes to write the gradient in, while the context is open.

        There is one for each dtype. Nothing of it stays with the parameters afterwards.
        """
        of_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for p in self.tensors:
            of_dtype.setdefault(p.dtype, []).append(p)
        places: dict[nn.Parameter, Tensor] = {}
        for members in of_dtype.values():
            whole = torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype, device=members[0].device)
            self._whole.append(whole)
            parts = torch.split(whole, [p.numel() for p in members])
            places |= {p: part.view(p.shape) for p, part in zip(members, parts, strict=True)}
        self._places = [places[p] for p in self.tensors]
        try:
            yield
        finally:
            self._whole, self._places = [], []
            for p in self.tensors:
                p.grad = None
                vars(p).pop("main_grad", None)

    @property
    def gradient(self) -> Tensor:
        """``[P]``, of the last step, where all parameters have one dtype."""
        (whole,) = self._whole
        return whole

    def start(self) -> None:
        """Begin a gradient: whoever writes first, writes over what is there."""
        self._added = False
        for p in self.tensors:
            p.grad = None
        for p, place in zip(self.tensors, self._places, strict=bool(self._places)):
            p.main_grad = place  # type: ignore[attr-defined]

    def add(self, gradient: Tensor) -> None:
        """Add a part ``[P]``, which must not be used afterwards: the first one becomes the gradient."""
        if self._added:
            self.gradient.add_(gradient)
        else:
            self._whole, self._added = [gradient], True

    def finish(self) -> None:
        """End a gradient that backward passes wrote: parameters that no loss reached get 0."""
        if self._added:
            return
        for p, place in zip(self.tensors, self._places, strict=True):
            if p.grad is None:
                place.zero_()
            elif p.grad is not place:
                place.copy_(p.grad)
            p.grad = place

    def add_over(self, ranks: Ranks) -> None:
        """Replace the gradient by the sum of those of all processes."""
        ranks.add(*self._whole)

    def gradient_of(self, loss: Tensor) -> Tensor:
        """d loss / d parameters, ``[P]``; those the loss does not reach get 0. Safe to call from several threads."""
        grads = torch.autograd.grad(loss, self.tensors, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, self.tensors, strict=True)]
        )

    def clip(self, max_norm: float) -> float:
        """The norm of the gradient, which is scaled down to ``max_norm`` if that is above 0 and exceeded."""
        norm = math.hypot(*map(norm_of, self._whole))
        if 0 < max_norm < norm:
            for whole in self._whole:
                whole.mul_(max_norm / (norm + 1e-6))
        return norm


_ROW = 1 << 12


def norm_of(vector: Tensor) -> float:
    """The Euclidean norm of ``vector [n]``, to about 1e-6 of it whatever n.

    PyTorch adds the squares in float32, one behind the other: of 134 million numbers the norm came out 1 % too small.
    Rows of 4096 are short enough for that, and their norms are added in float64. It takes no longer.
    """
    rows = len(vector) // _ROW * _ROW
    wide = torch.promote_types(vector.dtype, torch.float32)
    parts = [torch.linalg.vector_norm(vector[:rows].view(-1, _ROW), dim=1, dtype=wide)] if rows else []
    rest = torch.linalg.vector_norm(vector[rows:], dtype=wide)
    return float(torch.linalg.vector_norm(torch.cat([*parts, rest[None]]), dtype=torch.float64))


_ADVICE = "undo that, or begin anew with the model as it is now"


def _check_trainable(name: str, form: _Form) -> None:
    if form.dtype in (torch.float16, *_TINY):
        raise UsageError(
            f"the trainable parameter {name} is {_said(form.dtype)}, in which Adam's moments underflow and weights are "
            "destroyed; load the model with dtype=torch.float32, or convert it: model.float(). Where the processor has "
            "bfloat16, products run in it anyway"
        )
    if not form.dtype.is_floating_point:
        raise UsageError(f"the trainable parameter {name} is {_said(form.dtype)}; only floating point can be trained")
    if form.parameter.is_inference():
        raise UsageError(
            f"the trainable parameter {name} was made in torch.inference_mode, so nothing can train it; make or load "
            "the model outside of it"
        )
    if form.device.type == "meta":
        raise UsageError(f"the trainable parameter {name} is on the meta device and has no values; load the model")


def _check_apart(forms: Mapping[str, _Form]) -> None:
    places = sorted(
        (form.parameter.data_ptr(), form.parameter.nbytes, name)
        for name, form in forms.items()
        if form.trained and form.parameter.numel()
    )
    for (start, size, one), (next_start, _, other) in itertools.pairwise(places):
        if next_start < start + size:
            raise UsageError(
                f"the trainable parameters {one} and {other} are two, but share their memory, which would be "
                "stepped twice; tie them as one parameter, or give one of them a copy: p.data = p.data.clone()"
            )


_TINY = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8") or name.startswith("float4"))


def _difference(name: str, form: _Form | None, p: nn.Parameter) -> str:
    """What became of a parameter, in words."""
    if form is None:
        return f"the model has a new parameter {name}"
    if form.parameter is not p:
        return f"the parameter {name} was replaced by another"
    was, now = form, _Form.of(p)
    if was.shape != now.shape:
        return f"the parameter {name} changed its shape from {list(was.shape)} to {list(now.shape)}"
    if was.dtype != now.dtype:
        return f"the parameter {name} became {_said(now.dtype)}, from {_said(was.dtype)}"
    if was.device != now.device:
        return f"the parameter {name} moved from {was.device} to {now.device}"
    return f"the parameter {name} was {'frozen' if was.trained else 'made trainable'} (requires_grad={now.trained})"


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
