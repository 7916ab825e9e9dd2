"""The page of a run's samples: one HTML file that opens by double click, in the folder it plays from.

Everything on it is read from the run's folder, so it can be written at any time, and again.
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import soundfile
from jinja2 import Environment, PackageLoader, Template

from tortoise_hf.hub.curve import draw_curve, read_log
from tortoise_hf.sample_folder import (
    PAGE,
    RECORDING_DIR,
    SAMPLES_DIR,
    SAMPLES_LIST,
    load_sentences,
    spoken_steps,
    step_name,
)

CURVE = "curve.png"


def write_page(run_dir: Path, running: bool) -> Path:
    """Write the page, and the curve on it.

    Args:
        run_dir: the run's folder.
        running: whether the run goes on; the page then loads itself anew from time to time.

    Returns: the page.
    """
    folder = run_dir / SAMPLES_DIR
    log = read_log(run_dir / "log.jsonl")
    record = _read_json(run_dir / "run.json")
    evaluations = [entry for entry in log if "eval_loss" in entry]
    steps = spoken_steps(folder)
    shown = _shown_step(folder, steps, evaluations)
    sentences, max_seconds = load_sentences(folder)
    staging = folder / f".{CURVE}"
    has_curve = draw_curve(log, staging)
    if has_curve:
        staging.replace(folder / CURVE)
    html = _template().render(
        name=run_dir.resolve().name,
        running=running,
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        step=max((entry["step"] for entry in log), default=0),
        max_steps=record.get("max_steps"),
        facts=_facts(record, _read_json(run_dir / "dataset_report.json"), evaluations, shown),
        curve=CURVE if has_curve else None,
        sentences=[
            _sentence(folder, number, sentence, steps, shown, max_seconds)
            for number, sentence in enumerate(sentences, start=1)
        ],
        shown=shown,
    )
    staging = folder / f".{PAGE}"
    staging.write_text(html, encoding="utf-8")
    staging.replace(folder / PAGE)
    return folder / PAGE


@functools.cache
def _template() -> Template:
    """Read once: a run writes its page at every evaluation."""
    return Environment(loader=PackageLoader("tortoise_hf", "."), autoescape=True).get_template("sample_page.html")


def _shown_step(folder: Path, steps: list[int], evaluations: list[dict[str, Any]]) -> int | None:
    """The step that stands beside the start: what the finished run plays, else the best one spoken, else the last."""
    trained = [step for step in steps if step > 0]
    for entry in json.loads((folder / SAMPLES_LIST).read_text("utf-8")) if (folder / SAMPLES_LIST).is_file() else []:
        for step in trained:
            if entry.get("tuned", "").startswith(step_name(step)):
                return step
    found = [entry for entry in evaluations if entry["step"] in trained]
    if found:
        return min(found, key=lambda entry: entry["eval_loss"])["step"]
    return trained[-1] if trained else None


def _facts(
    record: dict[str, Any], report: dict[str, Any], evaluations: list[dict[str, Any]], shown: int | None
) -> list[tuple[str, str]]:
    """Key figures of the run, as far as they are known."""
    facts = []
    if "config" in record:
        settings = record["config"]
        model, base = settings["model"], str(settings["model"]["base"]).replace("\\", "/").rstrip("/").split("/")[-1]
        facts.append(("started from", f"random weights, sizes of {base}" if model["from_scratch"] else base))
        clips = f"{record['num_train_clips']:,} clips"
        if report.get("minutes") is not None:
            clips += f"; {report['minutes']:.1f} minutes with those kept back"
        facts.append(("trained on", clips))
        facts.append(("clips per step", f"{settings['training']['batch_size']:,}"))
        facts.append(("learning rate", f"{settings['optim']['learning_rate']:g}"))
    found = {entry["step"]: entry for entry in evaluations}
    if evaluations:
        first = evaluations[0]
        line = f"{first['eval_mel_loss']:.3f} at step {first['step']:,}"
        if shown in found and shown != first["step"]:
            line += f", {found[shown]['eval_mel_loss']:.3f} at step {shown:,}"
        facts.append(("eval mel loss", f"{line} (nats per mel code on clips kept back; lower is better)"))
    return facts


def _sentence(
    folder: Path, number: int, sentence: dict[str, Any], steps: list[int], shown: int | None, max_seconds: float
) -> dict[str, Any]:
    if sentence["clip_id"] is None:
        source = "no clip says this"
    else:
        source = f"clip {sentence['clip_id']}, {'trained on' if sentence['trained'] else 'kept back from training'}"
    recording = [("recording", f"{RECORDING_DIR}/{number}"), ("recording as codes", f"{RECORDING_DIR}/{number}-codes")]
    ends = [(f"before: step {step}", step) for step in steps if step == 0]
    ends += [(f"after: step {step:,}", step) for step in steps if step == shown]
    between = [(f"step {step:,}", step) for step in steps if step not in (0, shown)]
    return {
        "text": sentence["text"],
        "source": source,
        "main": _players(folder, recording, None)
        + _players(folder, [(label, f"{step_name(step)}/{number}") for label, step in ends], max_seconds),
        "others": _players(folder, [(label, f"{step_name(step)}/{number}") for label, step in between], max_seconds),
    }


def _players(folder: Path, sounds: list[tuple[str, str]], max_seconds: float | None) -> list[dict[str, Any]]:
    players = []
    for label, stem in sounds:
        path = folder / f"{stem}.wav"
        if not path.is_file():
            continue
        seconds = soundfile.info(path).duration
        cut_off = max_seconds is not None and seconds > max_seconds - 0.1  # two codes
        picture = f"{stem}.png" if (folder / f"{stem}.png").is_file() else None
        players.append(
            {"label": label, "sound": f"{stem}.wav", "picture": picture, "seconds": seconds, "cut_off": cut_off}
        )
    return players


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
