"""The last lines of a run: what was reached, where it lies, what to do next."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState

from tortoise_hf.callbacks.run_log import LOG_NAME
from tortoise_hf.config import Config


def evaluations(state: TrainerState) -> list[dict[str, float]]:
    """Log entries of the evaluations, in order; the first is the one before the first step."""
    return [entry for entry in state.log_history if "eval_loss" in entry]


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 5 s` or `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def closing_lines(cfg: Config, state: TrainerState, export_dir: Path, seconds: float, was_finished: bool) -> str:
    """Text for the user when a run is over.

    Args:
        cfg: the experiment.
        state: at the end.
        export_dir: folder of the exported model.
        seconds: how long this call took, preparing included.
        was_finished: the run was complete before this call.
    """
    output_dir = Path(cfg.training.output_dir)
    head = (
        f"This run was complete at step {state.global_step} already; nothing was trained."
        if was_finished
        else f"Done: step {state.global_step} of {state.max_steps}, {format_seconds(seconds)}."
    )
    lines = ["", head]
    found = evaluations(state)
    if found:
        first, last = found[0], found[-1]
        change = 100 * (1 - last["eval_mel_loss"] / first["eval_mel_loss"])
        lines.append(
            f"Eval mel loss: {first['eval_mel_loss']:.3f} at step {first['step']}, {last['eval_mel_loss']:.3f} at step "
            f"{last['step']} ({change:.0f} % lower), {len(found)} evaluations."
        )
    else:
        lines.append("No evaluation clips, so the last step counts as the best.")
    rows = [
        ("exported model", export_dir, "load it with TortoiseGPT.from_pretrained"),
        ("last checkpoint", output_dir / f"checkpoint-{state.global_step}", "the same command goes on from here"),
        ("log", output_dir / LOG_NAME, "one JSON line per entry"),
        ("dataset report", output_dir / "dataset_report.json", "which clips were left out and why"),
    ]
    if state.best_model_checkpoint:
        note = f"eval loss {state.best_metric:.3f}"
        rows.insert(1, ("best checkpoint", output_dir / state.best_model_checkpoint, note))
    width = max(len(str(path)) for _, path, _ in rows)
    lines += [f"  {name:<16} {path!s:<{width}}  {note}" for name, path, note in rows]
    lines.append("Next:")
    lines.append(f"  train on: the same command with --training.max_steps {2 * state.max_steps}")
    lines.append("  your own recordings: copy configs/my_voice.yaml, name your folder in it, and give it as --config")
    return "\n".join(lines)
