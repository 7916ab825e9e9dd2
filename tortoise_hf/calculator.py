"""The calculator of the Colab guide: list sizes to batch sizes, milestones and cadence.

Kept exactly, so a run of the reference trainer can be repeated; `training.plan: auto` chooses better.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Calculation:
    """What the guide fills into the reference trainer's settings file."""

    train_batch_size: int
    eval_batch_size: int
    steps_per_epoch: int
    """Full steps; the reference trainer drops the clips left over."""
    logging_steps: int
    eval_steps: int
    save_steps: int
    milestones: tuple[int, ...]
    """Optimizer steps, in the reference trainer's count (schedule tortoise_multistep)."""
    warnings: tuple[str, ...]


def calculate(
    num_train_clips: int,
    num_eval_clips: int,
    batch_size: int = 64,
    eval_batch_size: int = 16,
    first_decay_epoch: int = 20,
    fit_batch: bool = True,
) -> Calculation:
    """Settings for lists of so many clips.

    Args:
        num_train_clips: lines of the training list.
        num_eval_clips: lines of the evaluation list.
        batch_size: clips per step asked for.
        eval_batch_size: likewise, for evaluation.
        first_decay_epoch: epoch of the first milestone; the others come at 2, 14/5 and 18/5 of it.
        fit_batch: move the training batch to a size that leaves few clips over; the guide always does.
    """
    warnings = []
    if num_train_clips < 128:
        warnings.append("WARNING: very small dataset! the smallest dataset tested thus far had ~200 samples.")
    if num_eval_clips < 20:
        warnings.append("WARNING: very small validation dataset! val batch size will be scaled down to account")
    if num_train_clips < batch_size:
        warnings.append(
            "WARNING: dataset is smaller than a single batch. This will almost certainly perform poorly. Trying anyway"
        )
    fitted = _fit(num_train_clips, batch_size) if fit_batch else batch_size
    steps_per_epoch = max(1, num_train_clips // fitted)
    epochs = (
        first_decay_epoch,
        2 * first_decay_epoch,
        14 * first_decay_epoch // 5,
        18 * first_decay_epoch // 5,
    )
    logging_steps = min(100, max(20, steps_per_epoch))
    return Calculation(
        train_batch_size=fitted,
        eval_batch_size=max(1, _fit(num_eval_clips, eval_batch_size)),
        steps_per_epoch=steps_per_epoch,
        logging_steps=logging_steps,
        eval_steps=3 * logging_steps,
        save_steps=3 * logging_steps,
        milestones=tuple(epoch * steps_per_epoch for epoch in epochs),
        warnings=tuple(warnings),
    )


def _fit(num_clips: int, batch_size: int) -> int:
    """A batch size near `batch_size` that leaves few of `num_clips` over; it may be larger (70 clips at 64: 70)."""
    if num_clips < batch_size:
        return num_clips
    full, rest = divmod(num_clips, batch_size)
    if 2 * full > batch_size or rest == 0:
        return batch_size
    return num_clips // (full if 2 * rest < batch_size else full + 1)
