"""README.md of an exported policy: what it is, what it is worth, and how a program without grouprl uses it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from grouprl.envs.config import GRPOConfig
from grouprl.envs.env_kwargs import to_json
from grouprl.envs.ports import Exported, Port
from grouprl.printing import in_markdown
from grouprl.redaction import redact, without_secrets
from grouprl.runs import RunFolder

if TYPE_CHECKING:
    from grouprl.envs.grpo import GRPO


def model_card(agent: GRPO, made: Exported, run: RunFolder | None) -> str:
    """The text of README.md, with the metadata that the Hugging Face Hub reads at its beginning. It holds no secrets.

    Args:
        agent: what was exported. made: what came of it.
        run: has the evaluation; without a run, or before its end, the card says that there is none.
    """
    import yaml

    result = run.read_summary().get("eval") if run is not None else None
    result = result if isinstance(result, dict) and "mean_return" in result else None
    name = in_markdown(agent.env_id or "an environment of its own")
    front = yaml.safe_dump(_metadata(name, result), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n\n# A policy for {name}\n",
        f"Trained with [GRPO](https://arxiv.org/abs/2402.03300) in grouprl {version('grouprl')}, without a critic, for "
        f"{agent.num_timesteps:,} environment steps. It acts greedily. It includes the normalisation of observations, "
        "masks and the decoding of actions. So it takes what the environment gives, and gives what `env.step` takes.\n",
        "## Load it\n",
        f"```python\n{_code(made)}```\n",
        "## Inputs and outputs\n",
        _table(("", "name", "shape", "type"), [*_rows("input", made.inputs), *_rows("output", made.outputs)]),
        _notes(agent, made),
        "## Evaluation\n",
        _evaluation(result),
        f"Compared with the agent in {made.checked}: the largest difference is {made.difference:.1e}.\n",
        "## Environment\n",
        _table(
            ("", ""),
            [
                ("environment", f"`{name}`"),
                ("arguments", f"`{_plain({} if agent.env_lost else to_json(agent.env_kwargs))}`"),
                ("observations", f"`{_line(agent.observation_space)}`"),
                ("actions", f"`{_line(agent.action_space)}`"),
            ],
        ),
        "## Settings\n",
        _settings(agent),
        "## Versions\n",
        _table(("", ""), _versions(made)),
    ]
    return redact("\n".join(parts))


def _metadata(name: str, result: Mapping[str, Any] | None) -> dict[str, Any]:
    about: dict[str, Any] = {
        "library_name": "grouprl",
        "tags": ["reinforcement-learning", "deep-reinforcement-learning", "grpo", name],
    }
    if result is not None:
        measured = {
            "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
            "dataset": {"name": name, "type": name},
            "metrics": [
                {
                    "type": "mean_reward",
                    "name": "mean_reward",
                    "value": f"{result['mean_return']:.2f} +/- {result['std_return']:.2f}",
                    "verified": False,
                }
            ],
        }
        about["model-index"] = [{"name": "GRPO", "results": [measured]}]
    return about


def _code(made: Exported) -> str:
    """Lines that load the policy and act on zeros, where the first observation of an environment would be."""
    zeros = [
        f"np.{'ones' if one.name == 'action_mask' else 'zeros'}({(1, *one.shape)}, {one.dtype!r})"
        for one in made.inputs
    ]
    if made.file.suffix == ".onnx":
        fed = "".join(f"    {one.name!r}: {text},\n" for one, text in zip(made.inputs, zeros, strict=True))
        return (
            "import numpy as np\nimport onnxruntime\n\n"
            f"policy = onnxruntime.InferenceSession({made.file.name!r})\n"
            f"given = {{  # a batch of one; more rows are more observations\n{fed}}}\n"
            "action, parameters = policy.run(['action', 'parameters'], given)\n"
            "print(action[0])  # for env.step\n"
        )
    given = "".join(f"    torch.from_numpy({text}),\n" for text in zeros)
    return (
        "import numpy as np\nimport torch\n\n"
        f"policy = torch.export.load({made.file.name!r}).module()\n"
        f"given = [  # a batch of one; more rows are more observations\n{given}]\n"
        "action, parameters = policy(*given)\n"
        "print(action[0].numpy())  # for env.step\n"
    )


def _rows(kind: str, ports: Sequence[Port]) -> list[tuple[str, ...]]:
    return [
        (kind, f"`{one.name}`", f"`[{', '.join(['batch', *map(str, one.shape)])}]`", f"`{one.dtype}`") for one in ports
    ]


def _notes(agent: GRPO, made: Exported) -> str:
    about = {
        "Categorical": "logits of the actions",
        "MultiCategorical": "logits of all components, side by side",
        "IndependentBernoulli": "logits, one for each switch",
        "DiagonalGaussian": "means and logarithms of standard deviations, before they are scaled to the bounds",
    }
    kind = type(agent.policy.distribution).__name__
    notes = [f"`parameters` are those of the distribution to sample from ({kind}): {about[kind]}."]
    if any(one.name == "action_mask" for one in made.inputs):
        notes.append("In `action_mask` 1 allows an action and 0 forbids it.")
    if made.file.suffix == ".pt2":
        notes.append("Torch promises to read a `.pt2` with the version that wrote it, and with later ones as a rule.")
    notes.append("Inputs are not checked: NaN or a number outside of its space gives an action that means nothing.")
    return " ".join(notes) + "\n"


def _evaluation(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "There is none in this run. `grouprl evaluate` measures the return of complete episodes.\n"
    return (
        f"Mean return {result['mean_return']:.2f} ± {result['std_return']:.2f} (standard deviation over episodes), "
        f"smallest {result['min']:.2f}, largest {result['max']:.2f}, in {result['episodes']:.0f} complete greedy "
        "episodes from starts that were not trained on.\n"
    )


def _settings(agent: GRPO) -> str:
    defaults, settings = GRPOConfig().model_dump(mode="json"), agent.config.model_dump(mode="json")
    changed = {name: value for name, value in without_secrets(settings).items() if value != defaults[name]}
    if not changed:
        return "All settings are at their defaults.\n"
    rows = [(f"`{name}`", f"`{_plain(value)}`", f"`{_plain(defaults[name])}`") for name, value in changed.items()]
    return _table(("setting", "value", "default"), rows)


def _versions(made: Exported) -> list[tuple[str, str]]:
    packages = ("grouprl", "torch", "numpy", "gymnasium", *(("onnx",) if made.file.suffix == ".onnx" else ()))
    return [("Python", platform.python_version()), *((name, version(name)) for name in packages)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *[[in_markdown(cell).replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _line(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 400 else text[:397] + "..."
