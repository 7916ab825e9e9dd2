"""Make the corpus the demo's base learns to speak from: synthetic speakers reading sentences of our own.

    python scripts/make_base_corpus.py --output /tmp/base_corpus

Needs flite and espeak-ng (Debian and Ubuntu: `apt install flite espeak-ng`) and pyworld (`pip install -e
".[corpus]"`). The 180 speakers are voices of flite and espeak-ng with other pitch and formants, each with a spectrum
of its own. flite's slt, the demo voice, is not among them. The same synthesizers and seed give the same samples again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from base_domain import Sentence, draw_sentences
from synthesizers import GAIN_FREQUENCIES, SAMPLE_RATE, Speaker, find_program, speak, write_clip

from tortoise_hf.errors import UserError

GAIN_RANGE = 5.0
"""Each speaker's spectrum is raised or lowered by up to so many dB, see `Speaker.gains`."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Kind:
    """Speakers who have a synthesizer's voice in common and differ in what is drawn from these ranges."""

    name: str
    count: int
    """How many of them."""
    voices: tuple[str, ...]
    """The synthesizer's names; they take turns."""
    shift: Range = (1.0, 1.0)
    """`Speaker.shift`."""
    pitch: Range | None = None
    """`Speaker.pitch`. rms, unlike awb and kal16, keeps its 98 Hz whatever flite is told."""
    mean: Range | None = None
    """flite's pitch in Hz before the shift of all frequencies."""
    stretch: Range = (0.92, 1.1)
    """Duration, against the voice's own, after the shift."""

    def draw(self, generator: np.random.Generator) -> list[Speaker]:
        """The speakers, numbered from 1."""
        return [self._draw_one(number, generator) for number in range(1, self.count + 1)]

    def _draw_one(self, number: int, generator: np.random.Generator) -> Speaker:
        shift = round(generator.uniform(*self.shift), 3)
        options = ["--setf", f"duration_stretch={shift * generator.uniform(*self.stretch):.3f}"]
        if self.mean is not None:
            options += ["--setf", f"int_f0_target_mean={generator.uniform(*self.mean):.0f}"]
        pitch = 1.0 if self.pitch is None else round(generator.uniform(*self.pitch), 2)
        name, voice = f"{self.name}-{number}", self.voices[number % len(self.voices)]
        return Speaker(name, "flite", voice, tuple(options), shift, pitch, _draw_gains(generator))


@dataclass(frozen=True)
class EspeakKind(Kind):
    """The same for espeak-ng, which has a pitch from 0 to 99 and a speed of its own."""

    words_per_minute: Range = (145, 170)

    def _draw_one(self, number: int, generator: np.random.Generator) -> Speaker:
        pitch, speed = (f"{generator.uniform(*limits):.0f}" for limits in (self.pitch, self.words_per_minute))
        name, voice = f"{self.name}-{number}", self.voices[number % len(self.voices)]
        return Speaker(name, "espeak-ng", voice, ("-p", pitch, "-s", speed), gains=_draw_gains(generator))


def _draw_gains(generator: np.random.Generator) -> tuple[float, ...]:
    return tuple(generator.uniform(-GAIN_RANGE, GAIN_RANGE, len(GAIN_FREQUENCIES)).round(1).tolist())


KINDS = (
    Kind("rms-man", 18, ("rms",), shift=(0.88, 1.08)),
    Kind("rms-woman", 40, ("rms",), shift=(1.05, 1.2), pitch=(1.4, 1.75)),
    Kind("awb-man", 14, ("awb",), shift=(0.88, 1.06)),
    Kind("awb-woman", 44, ("awb",), shift=(1.05, 1.22), mean=(135, 175)),
    Kind("kal-man", 12, ("kal16",), shift=(0.9, 1.06), mean=(90, 120)),
    Kind("kal-woman", 24, ("kal16",), shift=(1.05, 1.2), mean=(140, 185)),
    EspeakKind("us-man", 12, ("en-us", "en-us+m3"), pitch=(35, 60)),
    EspeakKind("us-woman", 16, ("en-us+f2", "en-us+f3", "en-us+f4", "en-us+f5", "en-gb+f1"), pitch=(40, 60)),
)
"""More of flite's, whose sound is nearer to the demo voice's, and more women. With few speakers a model learns each by
heart, and what it knows is of no use to a voice it hasn't heard."""


def draw_speakers(seed: int = 0) -> list[Speaker]:
    """The corpus' speakers, of all kinds mixed, always the same for a seed."""
    generator = np.random.default_rng(seed)
    speakers = [speaker for kind in KINDS for speaker in kind.draw(generator)]
    return [speakers[index] for index in generator.permutation(len(speakers))]


SPEAKERS = draw_speakers()
"""They read equally many sentences, each other ones."""


def make_base_corpus(
    output: Path, hours: float, seed: int = 0, overwrite: bool = False, processes: int = 2
) -> Counter[str]:
    """Write metadata.csv and wavs/*.flac; metadata.csv comes last, so a folder that has one is complete.

    Half of the transcripts are as printed and half written out, so that a model learns to read both.

    Args:
        output: the folder; made if it does not exist.
        hours: how much to speak; the last clip may go beyond.
        seed: of the sentences.
        overwrite: replace the corpus of a folder that holds something; other files in it stay.
        processes: how many speak at a time.

    Returns:
        Samples per speaker.

    Raises:
        UserError: if a synthesizer is missing or fails, or `output` holds something and may not be overwritten.
    """
    for program in ("flite", "espeak-ng"):
        find_program(program)
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise UserError(f"{output} is not empty; name another folder, or add --overwrite to make its corpus anew.")
    wavs = output / "wavs"
    (output / "metadata.csv").unlink(missing_ok=True)
    for stale in wavs.glob("base-*.flac"):
        stale.unlink()
    wavs.mkdir(parents=True, exist_ok=True)

    lines = ["audio_file|text|speaker\n"]
    num_samples: Counter[str] = Counter()
    tasks = zip(itertools.cycle(SPEAKERS), draw_sentences(seed).corpus, strict=False)
    with closing(_speak_all(tasks, processes)) as clips:
        for index, (speaker, sentence, clip) in enumerate(clips):
            lines.append(_write(wavs, index, speaker, sentence, clip))
            num_samples[speaker.name] += len(clip)
            if num_samples.total() >= hours * 3600 * SAMPLE_RATE:
                break
    (output / "metadata.csv").write_text("".join(lines), encoding="utf-8", newline="\n")
    return num_samples


def _speak_all(
    tasks: Iterator[tuple[Speaker, Sentence]], processes: int
) -> Iterator[tuple[Speaker, Sentence, np.ndarray]]:
    """Speak for as long as somebody listens; clips come in the order of their sentences."""
    if processes == 1:
        yield from ((speaker, sentence, speak(sentence.spoken, speaker)) for speaker, sentence in tasks)
        return
    # Not threads: changing a voice's pitch keeps Python's lock.
    with get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        while True:
            batch = list(itertools.islice(tasks, 32 * processes))
            clips = pool.starmap(speak, [(sentence.spoken, speaker) for speaker, sentence in batch], chunksize=1)
            yield from ((*task, clip) for task, clip in zip(batch, clips, strict=True))


def _write(wavs: Path, index: int, speaker: Speaker, sentence: Sentence, clip: np.ndarray) -> str:
    """Write a clip; returns its line of metadata.csv."""
    name = f"base-{index + 1:05}.flac"
    write_clip(wavs / name, clip)
    # By rounds of speakers, so that everyone reads both forms.
    text = sentence.printed if index // len(SPEAKERS) % 2 else sentence.spoken
    return f"wavs/{name}|{text}|{speaker.name}\n"


def main(argv: list[str] | None = None) -> None:
    """Read the command line, speak, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--hours", type=float, default=10.0, help="how much to speak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sentences (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the corpus of a folder that is not empty")
    parser.add_argument("--processes", type=int, default=2, help="how many speak at a time (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.hours > 0:
        parser.error(f"--hours must be above 0, got {args.hours}")

    started = time.monotonic()
    torch.set_num_threads(1)
    num_samples = make_base_corpus(args.output, args.hours, args.seed, args.overwrite, args.processes)
    clips = list((args.output / "wavs").glob("base-*.flac"))
    size = sum(path.stat().st_size for path in clips)
    print(
        f"{args.output}: {len(clips)} clips of {len(num_samples)} speakers, "
        f"{num_samples.total() / SAMPLE_RATE / 3600:.2f} hours, {size / 1e6:.0f} MB, "
        f"made in {(time.monotonic() - started) / 60:.1f} minutes"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
