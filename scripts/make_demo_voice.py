"""Make the small data set the demo trains on: a synthetic voice reading our own sentences, in LJSpeech's layout.

    python scripts/make_demo_voice.py --output /tmp/demo_voice

Beside it come texts that the voice did not read, and the grammar of all of them. Needs flite (Debian and Ubuntu: `apt
install flite`). The files made this way are in examples/demo_voice already; with the same flite the script gives the
same samples again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from base_domain import Sentence, Sentences, draw_sentences, grammar
from synthesizers import SAMPLE_RATE, Speaker, find_program, speak, write_clip

from tortoise_hf.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]

SLT = Speaker("slt", "flite", "slt")
"""flite's US English voice, made by Carnegie Mellon University from its CMU ARCTIC recordings."""


def make_demo_voice(sentences: Sentences, output: Path, overwrite: bool = False) -> float:
    """Write metadata.csv, wavs/*.flac, unseen.txt and grammar.jsgf.

    Args:
        sentences: what to say, and what not to.
        output: the folder; made if it does not exist.
        overwrite: replace clips and texts of a folder that holds something; other files in it stay.

    Returns:
        Seconds spoken.

    Raises:
        UserError: if flite is missing or fails, or `output` holds something and may not be overwritten.
    """
    find_program(SLT.program)
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise UserError(f"{output} is not empty; name another folder, or add --overwrite to replace its clips.")
    wavs = output / "wavs"
    wavs.mkdir(parents=True, exist_ok=True)
    for stale in wavs.glob("demo-*.flac"):
        stale.unlink()
    num_samples = 0
    metadata = []
    for number, sentence in enumerate(sentences.demo, start=1):
        clip_id = f"demo-{number:03}"
        samples = speak(sentence.spoken, SLT)
        num_samples += len(samples)
        write_clip(wavs / f"{clip_id}.flac", samples)
        metadata.append(f"{clip_id}|{_texts(sentence)}")
    _write_lines(output / "metadata.csv", metadata)
    _write_lines(output / "unseen.txt", map(_texts, sentences.unseen))
    (output / "grammar.jsgf").write_text(grammar(), encoding="utf-8", newline="\n")
    return num_samples / SAMPLE_RATE


def _texts(sentence: Sentence) -> str:
    return f"{sentence.printed}|{sentence.spoken}"


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> None:
    """Read the command line, speak the sentences, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "examples" / "demo_voice", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the clips of a folder that is not empty")
    args = parser.parse_args(argv)

    sentences = draw_sentences()
    seconds = make_demo_voice(sentences, args.output, args.overwrite)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {len(sentences.demo)} clips, {seconds / 60:.1f} minutes, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
