"""Make the small data set the demo trains on: a synthetic voice reading our own sentences, in LJSpeech's layout.

    python scripts/make_demo_voice.py --output /tmp/demo_voice

Needs flite (Debian and Ubuntu: `apt install flite`). The clips made this way are in examples/demo_voice already; with
the same flite the script gives the same samples again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from tortoise_hf.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
SENTENCES = Path(__file__).with_name("demo_sentences.txt")

VOICE = "slt"
"""flite's US English voice, made by Carnegie Mellon University from its CMU ARCTIC recordings."""
SAMPLE_RATE = 22_050
"""Hz, LJSpeech's rate. flite speaks at 16 000 Hz, so nothing is heard above 8 000 Hz."""
VOLUME = 0.7
"""Factor on flite's samples: its loudest come within 1 dB of full scale, and quieter ones take less space."""
QUANTUM = 16
"""Samples are multiples of this (12 of 16 bits), which makes the FLAC files a third smaller. The rounding noise is
78 dB below full scale, and digital silence stays silent."""


@dataclass(frozen=True)
class Sentence:
    """One clip's texts: as printed, and with numbers and abbreviations written out, which is what is spoken."""

    clip_id: str
    transcript: str
    normalized: str


def read_sentences(path: Path) -> list[Sentence]:
    """Read `transcript|normalised transcript` lines; the second is left out where it equals the first.

    Raises:
        UserError: if two lines are spoken alike or a line has too many fields.
    """
    sentences: list[Sentence] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        transcript, *rest = line.split("|")
        normalized = rest[0] if rest else transcript
        if len(rest) > 1 or not normalized.strip():
            raise UserError(f"{path} line {number}: expected `transcript|normalised transcript`, found {line!r}.")
        if normalized in first_line:
            raise UserError(
                f"{path} line {number} is spoken like line {first_line[normalized]}; make one of them differ."
            )
        first_line[normalized] = number
        sentences.append(Sentence(f"demo-{number:03}", transcript, normalized))
    return sentences


def find_flite() -> str:
    """Path of the flite program.

    Raises:
        UserError: if flite is not installed.
    """
    flite = shutil.which("flite")
    if flite is None:
        raise UserError(
            "flite, the program that speaks the sentences, was not found on PATH; install it (`apt install flite`), or "
            "use the clips that are in examples/demo_voice already."
        )
    return flite


def speak(text: str, flite: str) -> np.ndarray:
    """Speak one sentence.

    Returns:
        (S,) int16 at `SAMPLE_RATE`.

    Raises:
        UserError: if flite fails or the result would clip.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        result = subprocess.run([flite, "-voice", VOICE, "-t", text, "-o", str(path)], capture_output=True, text=True)
        if result.returncode != 0 or not path.exists():
            reason = result.stderr.strip() or f"exit status {result.returncode}"
            raise UserError(
                f"flite could not speak {text!r} with the voice {VOICE} ({reason}); `flite -lv` lists its voices."
            )
        samples, spoken_rate = soundfile.read(path, dtype="float64")
    # In float64 the rounding below does not depend on the order of additions, so other machines give the same samples.
    samples = torchaudio.functional.resample(torch.from_numpy(samples), spoken_rate, SAMPLE_RATE).numpy()
    quantized = np.round(VOLUME * samples * 32768 / QUANTUM) * QUANTUM
    if np.abs(quantized).max() >= 32767:
        raise UserError(
            f"The clip of {text!r} would be clipped: its peak is {VOLUME * np.abs(samples).max():.2f} of full scale."
        )
    return quantized.astype(np.int16)


def make_demo_voice(sentences: list[Sentence], output: Path, overwrite: bool = False) -> float:
    """Write metadata.csv and wavs/*.flac.

    Args:
        sentences: what to say.
        output: the folder; made if it does not exist.
        overwrite: replace clips and metadata of a folder that holds something; other files in it stay.

    Returns:
        Seconds spoken.

    Raises:
        UserError: if flite is missing or fails, or `output` holds something and may not be overwritten.
    """
    flite = find_flite()
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise UserError(f"{output} is not empty; name another folder, or add --overwrite to replace its clips.")
    wavs = output / "wavs"
    wavs.mkdir(parents=True, exist_ok=True)
    for stale in wavs.glob("demo-*.flac"):
        stale.unlink()
    num_samples = 0
    for sentence in sentences:
        samples = speak(sentence.normalized, flite)
        num_samples += len(samples)
        soundfile.write(wavs / f"{sentence.clip_id}.flac", samples, SAMPLE_RATE, "PCM_16", compression_level=1.0)
    lines = [f"{sentence.clip_id}|{sentence.transcript}|{sentence.normalized}\n" for sentence in sentences]
    (output / "metadata.csv").write_text("".join(lines), encoding="utf-8", newline="\n")
    return num_samples / SAMPLE_RATE


def main(argv: list[str] | None = None) -> None:
    """Read the command line, speak the sentences, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "examples" / "demo_voice", help="folder to write")
    parser.add_argument("--sentences", type=Path, default=SENTENCES, help="text file, `transcript|normalised` a line")
    parser.add_argument("--overwrite", action="store_true", help="replace the clips of a folder that is not empty")
    args = parser.parse_args(argv)

    sentences = read_sentences(args.sentences)
    seconds = make_demo_voice(sentences, args.output, args.overwrite)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {len(sentences)} clips, {seconds / 60:.1f} minutes, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
