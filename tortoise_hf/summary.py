"""What a run says before its first step and after its last."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState

from tortoise_hf.callbacks.run_log import LOG_NAME
from tortoise_hf.config import Config
from tortoise_hf.export import ExportReport
from tortoise_hf.latents import CLIPS_FOLDER
from tortoise_hf.models.checkpoint_formats import fits_tortoise
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.run import EXPORT_DIR, REPORT_NAME, Run
from tortoise_hf.sample_folder import listening_lines
from tortoise_hf.units import format_seconds

LEVEL = 0.005
"""Relative change of the eval loss that counts as none."""


def opening_lines(cfg: Config, run: Run, model: TortoiseGPT) -> str:
    """Size of the model and where the run begins; the plan has said the rest."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"Model: {parameters:,} trained parameters, {_start(cfg)}.",
    ]
    if run.finished_step is not None:
        lines.append(f"{run.output_dir} is complete.")
    elif run.checkpoint is not None:
        lines.append(f"Going on from {run.checkpoint.path}.")
    return "\n".join(lines)


def _start(cfg: Config) -> str:
    if cfg.lora.rank > 0:
        return f"an adapter of rank {cfg.lora.rank} on the frozen weights of {cfg.model.base}"
    return "random weights" if cfg.model.from_scratch else f"weights of {cfg.model.base}"


def closing_lines(cfg: Config, run: Run, state: TrainerState, report: ExportReport | None, seconds: float) -> str:
    """What was reached, where it lies, what to do next.

    Args:
        cfg: the experiment.
        run: its folder.
        state: at the end.
        report: of the export; None if it was made by an earlier call.
        seconds: how long this call took, preparing included.
    """
    if run.finished_step is not None:
        head = f"This run was complete at step {state.global_step}; nothing was trained."
    else:
        head = f"Done: {state.global_step} of {run.max_steps} steps; {format_seconds(seconds)} with all preparations."
    lines = ["", head]
    found = [entry for entry in state.log_history if "eval_loss" in entry]
    if found:
        first, last = found[0], found[-1]
        change = 100 * (1 - last["eval_mel_loss"] / first["eval_mel_loss"])
        lines.append(
            f"Eval mel loss: {first['eval_mel_loss']:.3f} at step {first['step']}, {last['eval_mel_loss']:.3f} at step "
            f"{last['step']} ({change:.0f} % lower), {len(found)} evaluations."
        )
        best = next((entry for entry in found if entry["step"] == state.best_global_step), last)
        if best is not last:
            lines.append(f"Lowest at step {best['step']}, with {best['eval_mel_loss']:.3f}: that step is exported.")
    if report is not None:
        lines.append(report.summary())
    lines += _places(run, state)
    lines += listening_lines(run.output_dir)
    lines.append("Next:")
    lines += [f"  {line}" for line in advise(found, state.global_step, run.max_steps, cfg.optim.learning_rate)]
    # A model of its own size fits none of the released models behind it, so only the preview can be heard.
    preview = "" if fits_tortoise(GPTConfig.from_pretrained(run.output_dir / EXPORT_DIR)) else " --preview"
    clips = "" if (run.output_dir / CLIPS_FOLDER).is_dir() else " --clips RECORDINGS_OF_THE_SPEAKER"
    lines.append(
        f'  hear it: python scripts/speak.py "Good morning." --voice {run.output_dir / EXPORT_DIR}{clips}{preview}'
    )
    if cfg.model.from_scratch:
        lines.append(
            "  your own voice: copy configs/my_voice.yaml, name your recordings in it, and give it as --config"
        )
    return "\n".join(lines)


def advise(evaluations: list[dict[str, float]], last_step: int, max_steps: int, learning_rate: float) -> list[str]:
    """What the curve of the eval loss says to do next, a sentence or two.

    Args:
        evaluations: log entries with `eval_loss`, oldest first; the one of step 0 is the base line.
        last_step: where the run ended.
        max_steps: where it was to end.
        learning_rate: its highest.
    """
    longer = f"train longer: the same command with --training.max_steps {2 * max_steps}"
    trained = [entry for entry in evaluations if entry["step"] > 0]
    if not trained:
        return [
            "nothing was evaluated, so only listening tells; hold clips back with --data.eval_fraction 0.05",
            longer,
        ]
    best, last = min(trained, key=lambda entry: entry["eval_loss"]), trained[-1]
    baseline = next((entry["eval_loss"] for entry in evaluations if entry["step"] == 0), None)
    if baseline is not None and best["eval_loss"] >= baseline:
        return [
            f"the eval loss never fell below that of the untrained start ({baseline:.3f}): try a tenth of the rate, "
            f"--optim.learning_rate {learning_rate / 10:g}, in another --training.output_dir"
        ]
    if last["eval_loss"] > best["eval_loss"] * (1 + LEVEL):
        return [
            f"the eval loss was lowest at step {best['step']} of {last_step} and rose after it: more steps won't "
            "help, and the export is from there",
            f"more recordings help most; half the rate may, too: --optim.learning_rate {learning_rate / 2:g} in "
            "another --training.output_dir",
        ]
    earlier = [entry for entry in evaluations if entry["step"] < last["step"]]
    if not earlier or last["eval_loss"] < earlier[-1]["eval_loss"] * (1 - LEVEL):
        return [f"the eval loss was still falling at step {last['step']}; {longer}"]
    return [
        f"the eval loss has levelled off since step {best['step'] if best is not last else earlier[-1]['step']}, as it "
        "does when the learning rate runs out: more recordings help most",
        f"or {longer}",
    ]


def _places(run: Run, state: TrainerState) -> list[str]:
    export = run.output_dir / EXPORT_DIR
    programs = " and TorToiSe's programs" if fits_tortoise(GPTConfig.from_pretrained(export)) else ""
    rows: list[tuple[str, Path, str]] = [("exported model", export, f"for TortoiseGPT.from_pretrained{programs}")]
    if state.best_model_checkpoint:
        note = f"eval loss {state.best_metric:.3f}"
        rows.append(("best checkpoint", run.output_dir / state.best_model_checkpoint, note))
    rows += [
        ("last checkpoint", run.output_dir / f"checkpoint-{state.global_step}", "a longer run goes on from here"),
        ("log", run.output_dir / LOG_NAME, "one JSON line per entry"),
        ("dataset report", run.output_dir / REPORT_NAME, "clips used and left out, with reasons"),
    ]
    width = max(len(str(path)) for _, path, _ in rows)
    return [f"  {name:<15}  {path!s:<{width}}  {note}" for name, path, note in rows]
