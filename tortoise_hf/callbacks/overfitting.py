"""Says when a run begins to learn its clips by heart."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

RISES = 2
"""Rises of the eval loss in a row that call for a warning; a single one is often chance."""


class OverfittingCallback(TrainerCallback):
    """Warn once when the eval loss rises while the training loss falls.

    Reads the run's log and keeps nothing, so a resumed run neither repeats nor forgets a warning.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the evaluation that was just logged and those before it."""
        if state.is_world_process_zero and begins_to_overfit(state.log_history):
            best = min((entry for entry in state.log_history if "eval_loss" in entry), key=lambda e: e["eval_loss"])
            print(
                f"Warning: up to step {state.global_step} the training loss fell and the eval loss rose {RISES} times "
                f"in a row: the clips are being learnt by heart. The eval loss was lowest at step {best['step']} "
                f"({best['eval_loss']:.3f}); that checkpoint is kept.",
                flush=True,
            )


def begins_to_overfit(log_history: list[dict[str, float]]) -> bool:
    """Whether the last evaluation is exactly the `RISES`-th rise in a row while the training loss fell meanwhile.

    Args:
        log_history: of the run's state; entries with `loss` come from training, with `eval_loss` from evaluations.
    """
    evaluations = [entry for entry in log_history if "eval_loss" in entry]
    losses = [entry["eval_loss"] for entry in evaluations]
    rises = 0
    while rises + 1 < len(losses) and losses[-1 - rises] > losses[-2 - rises]:
        rises += 1
    if rises != RISES:
        return False
    lowest = evaluations[-1 - RISES]["step"]
    earlier = [entry["step"] for entry in evaluations if entry["step"] < lowest]
    before = _mean_loss(log_history, after=earlier[-1] if earlier else -1, until=lowest)
    since = _mean_loss(log_history, after=lowest, until=evaluations[-1]["step"])
    return before is not None and since is not None and since < before


def _mean_loss(log_history: list[dict[str, float]], after: int, until: int) -> float | None:
    values = [entry["loss"] for entry in log_history if "loss" in entry and after < entry["step"] <= until]
    return sum(values) / len(values) if values else None
