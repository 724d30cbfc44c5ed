"""A trained policy in a folder of its own, for programs that know nothing of grouprl: ONNX, or a program of torch.

The folder holds the policy, ``policy.json``, which says what goes in and comes out, and README.md, a model card.
Normalisation, masks and the decoding of actions are part of the policy. Before the folder takes its place, the file is
read again and compared with what ``predict`` gives.

The second format is what ``torch.export`` writes. TorchScript, the older way, is deprecated, and its interpreter gets
no new operations; ``module.export_module()`` can still be scripted by whoever needs it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grouprl.envs.acting import chosen_action
from grouprl.envs.export import deployed
from grouprl.envs.finite import check_policy
from grouprl.envs.grpo import GRPO
from grouprl.envs.likely_observations import assembled, draw_masks, draw_observations
from grouprl.envs.model_card import model_card
from grouprl.envs.ports import Exported, Port
from grouprl.envs.space_json import space_to_json
from grouprl.errors import TrainingError, UsageError, error_text, shown
from grouprl.extras import how_to_install, require
from grouprl.runs import RunFolder
from grouprl.runs.atomic_folder import atomic_folder
from grouprl.runs.files import user_path, write_json, write_text

Array = npt.NDArray[Any]
Runner = Callable[[Sequence[Array]], tuple[Array, Array]]
"""Inputs ``[m, ...]`` to actions ``[m, ...]`` and parameters ``[m, K]``."""

FORMATS = {"onnx": "policy.onnx", "torch": "policy.pt2"}
TOLERANCE = 1e-5
"""Largest difference of a parameter or an action, relative to its size where that is above 1."""
CHECKED = (1, 255)
"""Batches of this many observations are compared."""
_OUTPUTS = ("action", "parameters")


def export_policy(
    agent: GRPO, out: str | os.PathLike[str], format: str = "onnx", *, run: RunFolder | None = None
) -> Exported:
    """Write the policy of ``agent`` to the new folder ``out``, after it was compared with ``agent.predict``.

    It takes what the environment gives, in a batch of any size, and gives the most likely action, as ``env.step`` wants
    it, and the parameters of the distribution, for whoever wants to sample. A policy that was trained with masks in
    ``info`` has the mask as its last input; a mask in the observation is an input like the others.

    Args:
        agent: its policy is exported as it is now.
        out: must not exist, or be empty.
        format: ``onnx``, or ``torch`` for a ``.pt2`` that ``torch.export.load`` reads.
        run: the run that trained it, whose evaluation the model card repeats.

    Raises:
        UsageError: ``out`` exists, a package is missing, or the network cannot be written down.
        TrainingError: a parameter is not finite; or what was written gives something else than ``predict``.
    """
    if format not in FORMATS:
        raise UsageError(f"format={shown(format)}; known: {', '.join(FORMATS)}")
    if format == "onnx":
        if not hasattr(torch.onnx, "ONNXProgram") or "dynamo" not in signature(torch.onnx.export).parameters:
            raise UsageError(f"an export to ONNX needs torch 2.6 or newer, and this is {torch.__version__}")
        for package in ("onnx", "onnxscript"):
            require(package)
    check_policy(agent.policy)
    inputs, outputs = _inputs(agent), _outputs(agent)
    with atomic_folder(user_path(out), _check_free) as folder:
        file, notes = folder / FORMATS[format], []
        with _quietly(), _refusing(agent):
            program = _program(agent, inputs)
            if format == "torch":
                torch.export.save(program, file)
            else:
                _write_onnx(program, inputs, file)
        runners = {f"torch {torch.__version__}": _torch_runner(file if format == "torch" else program)}
        if format == "onnx" and find_spec("onnxruntime") is None:
            how = how_to_install("export")
            notes.append(f"not tried in ONNX Runtime, which is not installed; to have it compared, run: {how}")
        elif format == "onnx":
            runners = {f"ONNX Runtime {version('onnxruntime')}": _onnx_runner(file, inputs), **runners}
        differences = [_compare(agent, runner, where) for where, runner in runners.items()]
        checked = f"{next(iter(runners))} on {sum(CHECKED)} observations"
        made = Exported(user_path(out), user_path(out) / file.name, inputs, outputs, checked, max(differences), notes)
        write_json(folder / "policy.json", _about(agent, format, made))
        write_text(folder / "README.md", model_card(agent, made, run))
    return made


def _check_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already; delete it, or name another folder with --out")


def _takes_mask(agent: GRPO) -> bool:
    return agent.masks_in_info and agent.observations.mask_place < 0


def _draw(agent: GRPO, n: int) -> list[Array]:
    """All inputs of ``n`` rows."""
    arrays = draw_observations(agent.policy, agent.actions, n)
    return [*arrays, draw_masks(agent.actions, n)] if _takes_mask(agent) else arrays


def _inputs(agent: GRPO) -> list[Port]:
    """What goes in: the arrays of an observation in the order of their space; then the mask, if none of them is it."""
    ports = []
    for name, space in agent.observations.leaves:
        free = "observation" if not name else f"observation/{name}" if name in _OUTPUTS else name
        ports.append(Port(free, tuple(space.shape or ()), str(space.dtype)))
    if _takes_mask(agent):
        ports.append(Port("action_mask", (agent.actions.mask_size,), "bool"))
    return ports


def _outputs(agent: GRPO) -> list[Port]:
    space = agent.action_space
    return [
        Port("action", tuple(space.shape or ()), str(space.dtype)),
        Port("parameters", (agent.policy.distribution.n_params,), "float32"),
    ]


def _program(agent: GRPO, inputs: Sequence[Port]) -> torch.export.ExportedProgram:
    module = deployed(agent.policy, agent.actions, mask=_takes_mask(agent))
    example = tuple(torch.from_numpy(x) for x in _draw(agent, 3))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, example, dynamic_shapes=(tuple({0: batch} for _ in inputs),))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this machine are nobody's business
    return program


def _write_onnx(program: torch.export.ExportedProgram, inputs: Sequence[Port], file: Path) -> None:
    made = torch.onnx.export(
        program, (), dynamo=True, verbose=False, input_names=[one.name for one in inputs], output_names=list(_OUTPUTS)
    )
    assert made is not None
    made.save(str(file))


def _torch_runner(source: Path | torch.export.ExportedProgram) -> Runner:
    module = (torch.export.load(source) if isinstance(source, Path) else source).module()

    def run(arrays: Sequence[Array]) -> tuple[Array, Array]:
        with torch.no_grad():
            actions, parameters = module(*map(torch.from_numpy, arrays))
        return actions.numpy(), parameters.numpy()

    return run


def _onnx_runner(file: Path, inputs: Sequence[Port]) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(arrays: Sequence[Array]) -> tuple[Array, Array]:
        actions, parameters = session.run(
            list(_OUTPUTS), {port.name: array for port, array in zip(inputs, arrays, strict=True)}
        )
        return actions, parameters

    return run


def _compare(agent: GRPO, run: Runner, where: str) -> float:
    """The largest difference between what an exported policy and ``predict`` give. Raises TrainingError if too large.

    Where two discrete actions are as likely as each other to within the tolerance, either is right.
    """
    largest = 0.0
    policy, codec, rng = agent.policy, agent.actions, np.random.default_rng(0)
    for n in CHECKED:
        arrays = _draw(agent, n)
        observations = assembled(agent.observation_space, arrays)
        mask = arrays[-1] if _takes_mask(agent) else agent.observations.mask(observations)
        wanted = policy.infer(policy.prepare(agent.observations.encode(observations)))
        if mask is not None:
            wanted = policy.distribution.apply_mask(wanted, mask)
        chosen = chosen_action(policy, codec, observations, rng, True, mask, False)
        actions, parameters = run(arrays)
        if actions.dtype != chosen.dtype or actions.shape != chosen.shape or parameters.shape != wanted.shape:
            raise TrainingError(
                f"{where} gives actions {actions.dtype} {actions.shape}, and predict {chosen.dtype} {chosen.shape}; "
                "nothing was exported"
            )
        decoded = codec.to_env(policy.distribution.mode(parameters))
        largest = max(largest, _distance(parameters, wanted), _distance(actions, decoded))
    if not largest <= TOLERANCE:
        raise TrainingError(
            f"in {where} the exported policy differs from predict by {largest:.1e}, more than {TOLERANCE:.0e}; nothing "
            "was exported. A network of your own must give the same for the same input, in each call and any batch"
        )
    return largest


def _distance(found: Array, wanted: Array) -> float:
    """The largest difference, relative to the size of a number where that is above 1."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    return float((np.abs(a - b) / np.maximum(1, np.abs(b))).max(initial=0.0))


@contextmanager
def _refusing(agent: GRPO) -> Iterator[None]:
    """Around what torch does with a network of the user's: raises UsageError with the reason if it cannot."""
    try:
        yield
    except Exception as error:  # torch's exporters raise errors of many kinds
        whose = "your network" if agent._network is not None else f"a policy from {agent.observation_space}"
        raise UsageError(
            f"{whose} cannot be exported: {error_text(error)}. torch.export writes down tensor operations; it "
            "needs a forward without branches on values and without calls of NumPy"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporters say on the way what is of no use to a person who exports."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def _about(agent: GRPO, format: str, made: Exported) -> dict[str, Any]:
    """policy.json: what a program that serves the policy needs to know."""
    return {
        "format": format,
        "file": made.file.name,
        "inputs": [one.to_json() for one in made.inputs],
        "outputs": [one.to_json() for one in made.outputs],
        "distribution": type(agent.policy.distribution).__name__,
        "observation_space": space_to_json(agent.observation_space),
        "action_space": space_to_json(agent.action_space),
        "env_id": agent.env_id,
        "checked_in": made.checked,
        "largest_difference": made.difference,
        "grouprl": version("grouprl"),
        "torch": torch.__version__,
    }
