"""What a finished run leaves: its model, the summary, the curve, and the page of transcripts."""

from __future__ import annotations

from typing import Any

from grouprl.doctor.report import write_report
from grouprl.errors import UsageError
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.train.evaluation import HeldOut
from grouprl.lm.train.trainer import GRPOTrainer
from grouprl.machine.memory import peak_memory_gb
from grouprl.runs import RunFolder
from grouprl.runs.transcripts import write_html


def leave_results(
    folder: RunFolder, recipe: Recipe, trainer: GRPOTrainer, after: HeldOut
) -> tuple[dict[str, Any], list[str]]:
    """Write them beside the model, and return the summary, and notes on what could not be made.

    Args:
        after: greedy performance at the end.

    Raises UsageError if the folder cannot be written, TrainingError if the disk is full.
    """
    from grouprl.runs.plots import plot_run

    counters, notes = trainer.book.counters, []
    try:
        title = f"{recipe.subject}: {folder.path.name}"
        write_html(folder.transcripts_path, folder.transcripts_page, title, curve=counters.curve)
    except UsageError as error:
        notes.append(f"no page of transcripts: {error}")
    try:
        plot_run(folder, y="reward")
    except UsageError as error:
        notes.append(f"no curve: {error}")
    before = counters.before or HeldOut(float("nan"), float("nan"))
    summary = {
        "task": recipe.subject, "model": recipe.model, "seed": trainer.args.seed,
        "total_steps": trainer.state.global_step, "train_seconds": counters.train_seconds,
        "tokens_per_second": counters.sampled_tokens / counters.train_seconds,
        "peak_memory_gb": peak_memory_gb(trainer.policy.device), "packed": trainer.policy.packed,
        "accuracy_before": before.accuracy, "accuracy_after": after.accuracy,
        "reward_before": before.reward, "reward_after": after.reward,
    }  # fmt: skip
    folder.write_summary(summary)
    write_report(folder.path, GRPOConfig().to_dict())
    return summary, notes
