"""Where a run keeps what it spoke on the way, and how to find it again; `samples.py` writes it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLES_DIR = "samples"
SENTENCES = "sentences.json"
"""What is said: texts, whose clips they are, and the seconds after which a preview is cut off."""
RECORDING_DIR = "recording"
SAMPLES_LIST = "samples.json"
"""What a voice's card plays: a list of {"text", "tuned", "base"}, the latter two names of recordings beside it, and
"preview": true where they were made without the chain's large models. Where it is there, they are published."""
PAGE = "index.html"


@dataclass(frozen=True)
class SpokenSample:
    """A sentence as it was spoken once."""

    number: int
    """Of the sentence, from 1."""
    text: str
    step: int | None
    """Optimizer steps behind the weights that spoke; None for the recording of a clip that says the sentence."""
    path: Path
    """WAV file of 22,050 Hz."""


def step_name(step: int) -> str:
    """Folder of a step's samples."""
    return f"step-{step:06d}"


def spoken_steps(folder: Path) -> list[int]:
    """Steps with samples in a run's folder of them, ascending."""
    found = (re.fullmatch(r"step-(\d{6,})", path.name) for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def load_sentences(folder: Path) -> tuple[list[dict[str, Any]], float]:
    """What is said in a run's folder of samples (text, clip_id, trained), and the most seconds a preview takes."""
    path = folder / SENTENCES
    if not path.is_file():
        return [], 0.0
    said = json.loads(path.read_text(encoding="utf-8"))
    return said["sentences"], said["max_seconds"]


def load_samples(run_dir: str | Path) -> list[SpokenSample]:
    """Everything a run has spoken so far, sentence by sentence: the recording, where there is one, then each step.

    Args:
        run_dir: the run's folder; it may still be training.
    """
    folder = Path(run_dir) / SAMPLES_DIR
    places = [(None, RECORDING_DIR), *((step, step_name(step)) for step in spoken_steps(folder))]
    samples = [
        SpokenSample(number, sentence["text"], step, folder / place / f"{number}.wav")
        for number, sentence in enumerate(load_sentences(folder)[0], start=1)
        for step, place in places
    ]
    return [sample for sample in samples if sample.path.is_file()]


def listening_lines(run_dir: str | Path) -> list[str]:
    """Where to listen to a finished run: a sentence before and after, and the page. Empty if it kept no samples."""
    folder = Path(run_dir) / SAMPLES_DIR
    if not (folder / SAMPLES_LIST).is_file():
        return []
    entries = json.loads((folder / SAMPLES_LIST).read_text(encoding="utf-8"))
    entry = next((one for one in entries if "base" in one), entries[0])
    lines = [f"Listen to {entry['text']!r}{', as rough previews' if entry.get('preview') else ''}:"]
    roles = {"before": "base", "after": "tuned"}
    lines += [f"  {name:<6}  {folder / entry[role]}" for name, role in roles.items() if role in entry]
    return [*lines, f"  page    {folder / PAGE}  (open it in a browser: all samples, with recordings and pictures)"]
