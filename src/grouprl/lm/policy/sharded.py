"""Models whose weights are shared out among processes by PyTorch's FSDP2, and the passes that all make together.

Each pass of such a model gathers its layers one by one, which takes all processes. But one process may sample longer
completions, or learn from fewer, than another. So before each pass all say what they are about to do, and those who
have nothing to do make a pass that changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.errors import TrainingError, UsageError, first_line
from grouprl.lm.models.core import core_of
from grouprl.lm.settings.fsdp import Sharding
from grouprl.machine.ranks import Ranks
from grouprl.runs.shards import check_available


class ShardedModels:
    """The model in training and perhaps its reference, sharded.

    Args:
        ranks: the processes that hold them. sharding: how. device: where this process computes.
    """

    def __init__(self, ranks: Ranks, sharding: Sharding, device: torch.device) -> None:
        self.ranks, self.sharding, self.device = ranks, sharding, device
        self._models: list[Any] = []
        self._mesh: Any = None
        self._standing_in = self._learning = False

    def take(self, model: Any) -> None:
        """Shard a model, in place: each process then holds a part of each weight, on its device.

        Args:
            model: of transformers, or PEFT's around one; the same in all processes.

        Raises UsageError if it cannot be sharded.
        """
        core = core_of(model)
        _check(model, core)
        check_available()
        layers, place = _layers(core, self.sharding), type(core).__name__
        try:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
        except ImportError as error:
            raise UsageError(f"fsdp needs torch 2.6 or newer ({error}); install it, or leave fsdp out") from error
        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (self.ranks.world,))
        try:
            for module in (*layers, core):
                sharded: Any = fully_shard(module, mesh=self._mesh, reshard_after_forward=self.sharding.reshard)
                # Losses hold the denominators of the whole job, so gradients are summed, and not averaged.
                sharded.set_gradient_divide_factor(1.0)
                sharded.set_force_sum_reduction_for_comms(True)
        except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(f"fsdp: PyTorch cannot shard {place}: {first_line(error)}; leave fsdp out") from error
        model.to(self.device)  # what is no part of the sharded model, such as frozen prompts
        number = len(self._models)
        self._models.append(core)
        core.register_forward_pre_hook(lambda *_: self._await_turn(number), prepend=True)

    @contextmanager
    def together(self, *, learning: bool = False) -> Iterator[None]:
        """Around passes of this process, however many: at the end it stands in until the others have made theirs.

        All processes must come here, those without a pass of their own too.

        Args:
            learning: each pass is followed by :meth:`backward`.
        """
        self._learning = learning
        try:
            yield
            self._await_turn(None)
        except RuntimeError as error:
            if isinstance(error, TrainingError) or ("gloo" not in str(error) and "NCCL" not in str(error)):
                raise
            raise self.ranks.lost(error) from error
        finally:
            self._learning = False
            for core in self._models:
                _reshard(core)

    def backward(self, loss: Tensor) -> None:
        """Differentiate ``loss``, while the others do the same with theirs: the gradients are those of the sum."""
        self.ranks.gather(None, "differentiate")
        loss.backward()  # type: ignore[no-untyped-call]

    def _await_turn(self, number: int | None) -> None:
        """Make the passes of others that come before a pass of the model of this number; None: all."""
        if self._standing_in:
            return
        while True:
            wanted = [other for other in self.ranks.gather(number, "make a pass") if other is not None]
            if not wanted or min(wanted) == number:
                return
            self._stand_in(self._models[min(wanted)])

    def _stand_in(self, core: Any) -> None:
        """A pass that changes nothing, of one token."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._standing_in = True
        try:
            with nullcontext() if self._learning else torch.no_grad():
                logits = core(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        finally:
            self._standing_in = False
        if self._learning:
            self.backward(logits.float().sum() * 0.0)


def _check(model: Any, core: Any) -> None:
    name = type(core).__name__
    if getattr(core, "is_quantized", False) or any(not p.is_floating_point() for p in model.parameters()):
        raise UsageError(
            f"fsdp: {name} is quantised, and weights in integers are not sharded; load it in float32 or bfloat16, or "
            "leave fsdp out"
        )
    if any(type(p.data) is not Tensor for p in model.parameters()):
        kind = next(type(p.data).__name__ for p in model.parameters() if type(p.data) is not Tensor)
        raise UsageError(f"fsdp: the weights of {name} are {kind}s already; give the model as it was loaded")
    inside = {id(p) for p in core.parameters()}
    for weight, p in model.named_parameters():
        if p.requires_grad and id(p) not in inside:
            raise UsageError(
                f"fsdp: the adapter trains {weight}, which is no part of the model's layers and is not sharded; use "
                "LoRA or another adapter of the layers, or leave fsdp out"
            )


def _layers(core: Any, sharding: Sharding) -> Sequence[nn.Module]:
    """The modules that are gathered one by one. Raises UsageError if the model has none of the name that is given."""
    if not sharding.wrap:
        return []
    kinds = {type(module).__name__ for module in core.modules()}
    unknown = [name for name in sharding.layers if name not in kinds]
    if unknown:
        within = sorted({type(m).__name__ for many in core.modules() if isinstance(many, nn.ModuleList) for m in many})
        raise UsageError(
            f"fsdp_config: transformer_layer_cls_to_wrap names {unknown[0]!r}, and {type(core).__name__} has no such "
            f"module; its layers are {', '.join(within) or 'not in a list'}"
        )
    names = set(sharding.layers) or set(getattr(core, "_no_split_modules", None) or ())
    found = [module for module in core.modules() if type(module).__name__ in names]
    if not found:  # the longest list of modules are its layers
        lists = [list(module) for module in core.modules() if isinstance(module, nn.ModuleList)]
        found = max(lists, key=len, default=[])
    return found


def _reshard(core: Any) -> None:
    """Let go of what is gathered."""
    for module in core.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()
