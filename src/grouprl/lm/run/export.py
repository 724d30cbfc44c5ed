"""A run's language model for other programs: it is in their format already, or its adapters are merged into it."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import torch

from grouprl.errors import TrainingError, UsageError, shown
from grouprl.lm.models.save import save_model
from grouprl.lm.run import recipe as recipes
from grouprl.lm.run.data import load_task_data
from grouprl.lm.run.models import hide_file_bars, load_trained, trained_model
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.run.saved import settings_for_use
from grouprl.printing import in_markdown
from grouprl.redaction import redact
from grouprl.runs import RunFolder
from grouprl.runs.files import user_path, write_text

TOLERANCE = 1e-2
"""Largest difference of a log-probability after merging, in nats: the weights of a merged model are rounded once."""


def export(run: str | os.PathLike[str], out: str | os.PathLike[str] | None, format: str | None) -> list[str]:
    """Write the model of a run with adapters as an ordinary one; say where that of another run is.

    Args:
        run: the run folder. out: a new folder; default: ``export-merged`` in the run folder.
        format: None, or ``merged``.

    Returns:
        What came of it, for a person to read.

    Raises:
        UsageError: there is no such run, it left no model yet, ``out`` exists, or another format is asked for.
        TrainingError: the merged model gives other probabilities than the model with adapters.
    """
    folder = RunFolder.open(run)
    place = trained_model(folder)
    if format not in (None, "merged"):
        raise UsageError(
            f"--format {shown(format)} is for environments; {place} is a Hugging Face folder, from which other tools "
            "convert, such as optimum-cli for ONNX and llama.cpp for GGUF"
        )
    recipe = recipes.load(folder.path).with_secrets()
    if recipe.lora is None:
        if out is not None:
            raise UsageError(f"there is nothing to write to {out}: {place} is a Hugging Face folder; copy it")
        return [f"{place} is a Hugging Face folder already: transformers, TRL, vLLM and others load it as it is"]
    target = folder.export_path("merged") if out is None else user_path(out)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} exists already; delete it, or name another folder with --out")
    hide_file_bars()
    config = settings_for_use(folder).with_secrets()
    task = load_task_data(recipe.changed({} if recipe.task.endswith(".jsonl") else {"n_train": 1, "n_eval": 1})).task
    model, tokenizer = load_trained(folder, recipe, config, task)
    before = _log_probs(model)
    merged = model.merge_and_unload()
    difference = float((_log_probs(merged) - before).abs().max())
    if not difference <= TOLERANCE:
        raise TrainingError(
            f"the merged model's log-probabilities differ by {difference:.1e} from those of the model with adapters; "
            f"nothing was written. Load {place} with PEFT instead"
        )
    save_model(merged, tokenizer, target, lambda made: write_text(made / "README.md", _card(recipe, folder)))
    return [
        f"log-probabilities of the merged model differ by {difference:.1e} at most",
        f"wrote {target}, a Hugging Face folder; {place} keeps the adapters alone",
    ]


@torch.no_grad()
def _log_probs(model: Any) -> torch.Tensor:
    """``[1, 32, V]`` of some tokens, the same in each call."""
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(size, (1, 32), generator=torch.Generator().manual_seed(0)).to(model.device)
    out: torch.Tensor = model.eval()(input_ids=ids).logits.float().log_softmax(-1)
    return out


def _card(recipe: Recipe, folder: RunFolder) -> str:
    summary = folder.read_summary()
    measured = {name: summary[name] for name in ("accuracy_before", "accuracy_after") if name in summary}
    lines = [
        "---\nlibrary_name: transformers\ntags: [grpo, grouprl]\n---\n",
        f"# {in_markdown(recipe.model)}, trained on {in_markdown(recipe.subject)}\n",
        f"Trained with GRPO in grouprl {version('grouprl')}, with adapters that are merged into these weights.\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n```\n',
        *(f"- {name.replace('_', ' ')}: {in_markdown(value)}" for name, value in measured.items()),
        f"- torch {torch.__version__}, transformers {version('transformers')}",
    ]
    return redact("\n".join(lines) + "\n")
