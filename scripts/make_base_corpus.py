"""Make the corpus the demo's base learns to speak from: synthetic speakers reading sentences of our own.

    python scripts/make_base_corpus.py --output /tmp/base_corpus

Needs flite and espeak-ng (Debian and Ubuntu: `apt install flite espeak-ng`). Some of the speakers are flite's and
espeak-ng's voices as they are, others the same voices with other pitch and formants. flite's slt, the demo voice, is
not among them. The same synthesizers and seed give the same samples again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from base_domain import Sentence, draw_sentences
from synthesizers import SAMPLE_RATE, Speaker, find_program, speak, write_clip

from tortoise_hf.errors import UserError


def _flite(name: str, voice: str, shift: float = 1.0, pitch: int | None = None, stretch: float = 1.0) -> Speaker:
    """`pitch` is the mean in Hz before, `stretch` the duration after, the shift of all frequencies.

    rms, unlike awb and kal16, keeps its own pitch whatever flite is told.
    """
    options = ["--setf", f"duration_stretch={shift * stretch:.3f}"]
    if pitch is not None:
        options += ["--setf", f"int_f0_target_mean={pitch}"]
    return Speaker(name, "flite", voice, tuple(options), shift)


def _espeak(name: str, voice: str, pitch: int, words_per_minute: int) -> Speaker:
    return Speaker(name, "espeak-ng", voice, ("-p", str(pitch), "-s", str(words_per_minute)))


SPEAKERS = [
    _flite("rms", "rms"),
    _flite("rms-low", "rms", shift=0.9),
    _flite("rms-high", "rms", shift=1.2),
    _flite("awb", "awb"),
    _flite("awb-low", "awb", shift=0.9, stretch=1.1),
    _flite("awb-alto", "awb", shift=1.08, pitch=155, stretch=1.1),
    _flite("awb-woman", "awb", shift=1.15, pitch=160, stretch=1.05),
    _flite("awb-girl", "awb", shift=1.22, pitch=175),
    _flite("kal", "kal16"),
    _flite("kal-woman", "kal16", shift=1.18, pitch=150),
    _flite("kal-girl", "kal16", shift=1.12, pitch=185, stretch=1.05),
    _espeak("us-man", "en-us", pitch=45, words_per_minute=160),
    _espeak("us-woman", "en-us+f2", pitch=50, words_per_minute=155),
    _espeak("us-girl", "en-us+f5", pitch=60, words_per_minute=165),
    _espeak("us-alto", "en-us+f4", pitch=40, words_per_minute=150),
    _espeak("gb-woman", "en-gb+f1", pitch=55, words_per_minute=160),
]
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
    parser.add_argument("--hours", type=float, default=4.2, help="how much to speak (default: %(default)s)")
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
