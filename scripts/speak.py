"""Say something with a voice.

    python scripts/speak.py --voice exports/my_voice "Hello." --out hello.wav

The voice is a folder, a run, a user/name (or user/name@revision) on the Hub, or a .pth file; the text is the argument,
--file or standard input. --preview makes a rough sound with the voice's own files alone; without it the released models
of the chain are fetched once. --stream writes each sentence as soon as it is done; with --out - the sound goes to
standard output, for a player:

    python scripts/speak.py --voice exports/my_voice --file book.txt --stream --out - | ffplay -nodisp -autoexit -
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _environment  # noqa: F401

from tortoise_hf.cli import loading_packages, run
from tortoise_hf.errors import UserError

if TYPE_CHECKING:
    from tortoise_hf.sound import Speech


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, speak, say where the sound is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="what to say; left out or -: standard input")
    parser.add_argument("--file", type=Path, help="read the text from this file instead")
    parser.add_argument("--voice", default="released", help="folder, run, user/name, .pth file (TorToiSe's own GPT)")
    parser.add_argument("--out", default="speech.wav", help=".wav, .flac, .ogg or .mp3; - for standard output")
    parser.add_argument("--stream", action="store_true", help="write sentence by sentence")
    parser.add_argument("--preview", action="store_true", help="rough sound, without the large models")

    speaker = parser.add_argument_group("who speaks (the voice's own latents)")
    speaker.add_argument("--clips", nargs="+", help="recordings of the speaker, or folders of them")
    speaker.add_argument("--latents", nargs="+", help="latents of scripts/voice.py or tortoise-tts; several: the mean")
    speaker.add_argument("--random", type=int, metavar="SEED", help="a voice nobody has")

    quality = parser.add_argument_group("quality and speed")
    quality.add_argument("--preset", default="fast", help="single_sample, ultra_fast, very_fast, fast, standard, ...")
    quality.add_argument("--num_samples", type=int, help="rows of codes to choose from")
    quality.add_argument(
        "--num_results", type=int, help="write so many of the best ones: speech-1.wav, speech-2.wav, ..."
    )
    quality.add_argument("--steps", type=int, help="diffusion steps")
    quality.add_argument("--sampler", choices=("ancestral", "ddim", "dpm++2m"), help="of the diffusion model")
    quality.add_argument("--temperature", type=float, help="of the codes; 0 for the likeliest")
    quality.add_argument("--max_codes", type=int, help="longest piece, in codes of 46 ms (500)")
    quality.add_argument("--seed", type=int, default=0, help="the same seed says it the same way (0)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the larger models")
    machine.add_argument("--low_memory", action="store_true", help="one model at a time: slower, below 4 GiB")
    machine.add_argument("--weights_dir", help="folder with the released files")
    args = parser.parse_args(argv)
    run(lambda: speak(args))


def speak(args: argparse.Namespace) -> None:
    """Torch loads only here, so `--help` answers at once."""
    with loading_packages():
        import torch

        from tortoise_hf.presets import choose_preset
        from tortoise_hf.progress import progress_bar
        from tortoise_hf.sound import check_kind, write_speeches
        from tortoise_hf.voice import Voice

    if args.out != "-":
        check_kind(Path(args.out))
    streamed = args.stream or args.out == "-"
    if streamed and args.num_results is not None:
        raise UserError("Several results can't be streamed; leave --num_results out, or give a file as --out.")
    text = read_text(args)
    options = {name: getattr(args, name) for name in ("num_samples", "steps", "sampler", "temperature", "max_codes")}
    preset = choose_preset(args.preset, **options)
    voice = Voice.from_pretrained(
        args.voice,
        clips=args.clips,
        latents=args.latents,
        random=args.random,
        weights_dir=args.weights_dir,
        device=args.device,
        dtype=args.dtype and getattr(torch, args.dtype),
        low_memory=args.low_memory,
        preview=args.preview,
    )
    started = time.perf_counter()
    pieces = voice.pieces(text)
    results = args.num_results or 1
    total = len(pieces) * (1 if args.preview else preset.num_samples + results * preset.diffusion.steps)
    with progress_bar(total) as report:
        settings = {"preset": preset, "seed": args.seed, "preview": args.preview, "progress": report}
        if streamed:
            target = sys.stdout.buffer if args.out == "-" else Path(args.out)
            written = {args.out: write_speeches(voice.stream(text, **settings), target)}
        else:
            spoken = voice.speak(text, num_results=args.num_results, **settings)
            speeches = {args.out: spoken} if args.num_results is None else name_results(Path(args.out), spoken)
            for path, speech in speeches.items():
                speech.save(path)
            written = {path: speech.seconds for path, speech in speeches.items()}
    spent = time.perf_counter() - started
    kind = "a preview of " if args.preview else ""
    for path, seconds in written.items():
        print(f"{path}: {kind}{seconds:.1f} s of speech in {spent:.1f} s", file=sys.stderr)


def name_results(path: Path, speeches: Sequence[Speech]) -> dict[Path, Speech]:
    """A file for each of several results, the best first: speech-1.wav, speech-2.wav, ..."""
    return {path.with_stem(f"{path.stem}-{place}"): speech for place, speech in enumerate(speeches, start=1)}


def read_text(args: argparse.Namespace) -> str:
    """What is to be said."""
    if args.file is not None and args.text is not None:
        raise UserError("Give the text as an argument or as --file, not both.")
    if args.file is not None:
        try:
            return args.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{args.file} can't be read as UTF-8 text ({error}).") from error
    if args.text in (None, "-"):
        return sys.stdin.read()
    return args.text


if __name__ == "__main__":
    main()
