"""Make the corpus the demo's base learns to speak from: synthetic speakers reading sentences of our own.

    python scripts/make_base_corpus.py --output /tmp/base_corpus

Needs flite and espeak-ng (Debian and Ubuntu: `apt install flite espeak-ng`) and pyworld (`pip install -e
".[corpus]"`). The speakers are voices of flite and espeak-ng, most with other pitch and formants, each with a spectrum
of its own. flite's slt, the demo voice, is not among them. The same synthesizers and seed give the same samples again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from base_domain import Sentence, draw_sentences
from synthesizers import GAIN_FREQUENCIES, SAMPLE_RATE, Speaker, find_program, speak, write_clip

from tortoise_hf.errors import UserError

GAIN_RANGE = 4.0
"""Each speaker's spectrum is raised or lowered by up to so many dB, see `Speaker.gains`."""


def _flite(
    name: str, voice: str, shift: float = 1.0, mean: int | None = None, stretch: float = 1.0, pitch: float = 1.0
) -> Speaker:
    """`mean` is flite's pitch in Hz before the shift of all frequencies, `stretch` the duration after it.

    rms, unlike awb and kal16, keeps its 98 Hz whatever flite is told, so it takes `pitch`, a factor.
    """
    options = ["--setf", f"duration_stretch={shift * stretch:.3f}"]
    if mean is not None:
        options += ["--setf", f"int_f0_target_mean={mean}"]
    return Speaker(name, "flite", voice, tuple(options), shift, pitch)


def _espeak(name: str, voice: str, pitch: int, words_per_minute: int) -> Speaker:
    return Speaker(name, "espeak-ng", voice, ("-p", str(pitch), "-s", str(words_per_minute)))


def _with_gains(speakers: list[Speaker]) -> list[Speaker]:
    """Give each its own spectrum, always the same."""
    generator = np.random.default_rng(0)
    gains = generator.uniform(-GAIN_RANGE, GAIN_RANGE, (len(speakers), len(GAIN_FREQUENCIES))).round(1)
    return [replace(speaker, gains=tuple(row.tolist())) for speaker, row in zip(speakers, gains, strict=True)]


SPEAKERS = _with_gains(
    [
        _flite("rms", "rms"),
        _flite("rms-low", "rms", shift=0.9),
        _flite("rms-high", "rms", shift=1.1),
        _flite("rms-alto", "rms", shift=1.06, pitch=1.5, stretch=1.05),
        _flite("rms-woman", "rms", shift=1.12, pitch=1.6),
        _flite("rms-lady", "rms", shift=1.15, pitch=1.5, stretch=0.95),
        _flite("rms-girl", "rms", shift=1.2, pitch=1.75),
        _flite("awb", "awb"),
        _flite("awb-low", "awb", shift=0.9, stretch=1.1),
        _flite("awb-alto", "awb", shift=1.08, mean=155, stretch=1.1),
        _flite("awb-woman", "awb", shift=1.15, mean=160, stretch=1.05),
        _flite("awb-girl", "awb", shift=1.22, mean=175),
        _flite("kal", "kal16"),
        _flite("kal-low", "kal16", shift=0.93, mean=100),
        _flite("kal-alto", "kal16", shift=1.08, mean=150, stretch=1.05),
        _flite("kal-woman", "kal16", shift=1.18, mean=150),
        _flite("kal-girl", "kal16", shift=1.12, mean=185, stretch=1.05),
        _espeak("us-man", "en-us", pitch=45, words_per_minute=160),
        _espeak("us-woman", "en-us+f2", pitch=50, words_per_minute=155),
        _espeak("us-girl", "en-us+f5", pitch=60, words_per_minute=165),
        _espeak("us-alto", "en-us+f4", pitch=40, words_per_minute=150),
        _espeak("us-lady", "en-us+f3", pitch=50, words_per_minute=160),
        _espeak("us-boy", "en-us+m3", pitch=60, words_per_minute=155),
        _espeak("gb-woman", "en-gb+f1", pitch=55, words_per_minute=160),
    ]
)
"""They read equally many sentences, each other ones. More of flite's, whose sound is nearer to the demo voice's."""


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
        processes: synthesizers that run at a time.

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
    tasks = enumerate(zip(itertools.cycle(SPEAKERS), draw_sentences(seed).corpus, strict=False))
    # The synthesizers are programs of their own, so threads are enough to run several.
    with ThreadPool(processes) as pool:
        while True:
            batch = list(itertools.islice(tasks, 64))
            clips = pool.map(lambda task: speak(task[1][1].spoken, task[1][0]), batch, chunksize=1)
            for (index, (speaker, sentence)), clip in zip(batch, clips, strict=True):
                lines.append(_write(wavs, index, speaker, sentence, clip))
                num_samples[speaker.name] += len(clip)
                if num_samples.total() >= hours * 3600 * SAMPLE_RATE:
                    (output / "metadata.csv").write_text("".join(lines), encoding="utf-8", newline="\n")
                    return num_samples


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
    parser.add_argument("--processes", type=int, default=2, help="synthesizers at a time (default: %(default)s)")
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
