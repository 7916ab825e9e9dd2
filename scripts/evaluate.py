"""Measure how well a voice speaks, and compare voices.

    python scripts/evaluate.py --run runs/my_voice --preview
    python scripts/evaluate.py --voice released --voice exports/my_voice --data my_recordings --texts texts.txt

Texts are spoken (those of the clips a run held out, or --texts), and judged: how much of them a recogniser understands,
whether they sound like the speaker, whether they end and repeat themselves as speech does. Recordings of the speaker,
as they are and by way of their codes, are judged as well: better than the latter no voice can be. The figures, pictures
and sounds go into a new folder; a table is printed. For likeness give recordings of other voices to tell it from:

    python scripts/evaluate.py --run runs/demo --preview --voices corpus --asr pocketsphinx --grammar grammar.jsgf
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _environment  # noqa: F401

from tortoise_hf.cli import loading_packages, run
from tortoise_hf.errors import UserError

if TYPE_CHECKING:
    import torch

    from tortoise_hf.evaluation.recordings import Recordings
    from tortoise_hf.voice import Voice


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, evaluate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    who = parser.add_argument_group("which voices")
    who.add_argument("--run", type=Path, help="folder of a run: its export, the clips it held out, its recordings")
    who.add_argument(
        "--voice", action="append", default=[], help="folder, run, user/name, .pth file; several: compared"
    )
    who.add_argument("--clips", nargs="+", help="recordings to speak like (the voice's own speaker, or of --data)")
    who.add_argument("--latents", nargs="+", help="stored latents to speak with instead")
    who.add_argument("--random", type=int, metavar="SEED", help="a voice nobody has instead")

    what = parser.add_argument_group("what with")
    what.add_argument("--texts", type=Path, help="file with one text per line (transcripts of held-out recordings)")
    what.add_argument("--num_texts", type=int, default=50, help="texts spoken at most (50)")
    what.add_argument("--data", help="recordings of the speaker: folder, archive or user/name with metadata.csv")
    what.add_argument("--speaker", help="whose recordings, where --data or the run has several speakers")
    what.add_argument(
        "--voices", help="recordings of other speakers: a folder for each, or a list with a speaker column"
    )

    how = parser.add_argument_group("how it is measured")
    how.add_argument("--asr", default="transformers:openai/whisper-base.en", metavar="RECOGNISER",
                     help="transformers:MODEL, pocketsphinx or none (%(default)s)")  # fmt: skip
    how.add_argument("--grammar", type=Path, help="JSGF file of all that may be said, for pocketsphinx")
    how.add_argument("--speaker_measure", default="spectral", metavar="MEASURE",
                     help="spectral, a speaker verification model of transformers, or none (%(default)s)")  # fmt: skip
    how.add_argument("--out", type=Path, help="new folder (evaluation, in the run's folder or here)")

    quality = parser.add_argument_group("how it is spoken, as in speak.py")
    quality.add_argument("--preview", action="store_true", help="rough sound, without the large models")
    quality.add_argument("--preset", default="fast", help="single_sample, ultra_fast, very_fast, fast, standard, ...")
    quality.add_argument("--num_samples", type=int, help="rows of codes to choose from")
    quality.add_argument("--steps", type=int, help="diffusion steps")
    quality.add_argument("--sampler", choices=("ancestral", "ddim", "dpm++2m"), help="of the diffusion model")
    quality.add_argument("--temperature", type=float, help="of the codes; 0 for the likeliest")
    quality.add_argument("--max_codes", type=int, help="longest piece, in codes of 46 ms (500)")
    quality.add_argument("--seed", type=int, default=0, help="of draws, and of which recordings are taken (0)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the larger models")
    machine.add_argument("--low_memory", action="store_true", help="one model at a time: slower, below 4 GiB")
    machine.add_argument("--weights_dir", help="folder with the released files")
    args = parser.parse_args(argv)
    if args.run is None and not args.voice:
        parser.error("say what to evaluate: --run or --voice")
    if args.texts is None and args.run is None and args.data is None:
        parser.error("say what to speak: --texts, or recordings with transcripts: --data")
    if args.num_texts < 1:
        parser.error(f"--num_texts must be at least 1, got {args.num_texts}")
    run(lambda: evaluate(args))


def evaluate(args: argparse.Namespace) -> None:
    """Torch loads only here, so `--help` answers at once."""
    with loading_packages():
        from tortoise_hf.evaluation.judge import ENROLLED_CLIPS, UNSEEN_CLIPS, Task, evaluate_voices
        from tortoise_hf.evaluation.recognition import load_recognizer
        from tortoise_hf.evaluation.recordings import voices_in
        from tortoise_hf.evaluation.report import REPORT_FILE
        from tortoise_hf.evaluation.speaker_similarity import load_measure
        from tortoise_hf.presets import choose_preset
        from tortoise_hf.progress import progress_bar
        from tortoise_hf.voice import choose_device

    folder = choose_folder(args)
    options = {name: getattr(args, name) for name in ("num_samples", "steps", "sampler", "temperature", "max_codes")}
    preset, device = choose_preset(args.preset, **options), choose_device(args.device)
    recordings = find_recordings(args)
    texts = choose_texts(args, recordings)
    others = {}
    if args.voices is not None:
        others = voices_in(args.voices, args.speaker or "", ENROLLED_CLIPS + UNSEEN_CLIPS, args.seed)
    recognizer = None if args.asr == "none" else load_recognizer(args.asr, args.grammar, device)
    measured = recordings is not None and args.speaker_measure != "none"
    measure = load_measure(args.speaker_measure, device) if measured else None
    sources = [*([] if args.run is None else [str(args.run)]), *args.voice]
    voices = {name: load_voice(args, source, recordings, device) for name, source in name_voices(sources).items()}

    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"names": name_voices(sources), "num_texts": len(texts)}
    folder.mkdir(parents=True)
    task = Task(
        voices=voices,
        texts=texts,
        recordings=recordings,
        others=others,
        recognizer=recognizer,
        measure=measure,
        preset=preset,
        preview=args.preview,
        seed=args.seed,
    )
    per_text = 1 if args.preview else preset.num_samples + preset.diffusion.steps
    with progress_bar(len(texts) * per_text * len(voices)) as report:
        evaluation = evaluate_voices(task, folder, settings, lambda line: print(line, file=sys.stderr), report)
    evaluation.save(folder)
    print(evaluation.table())
    print(f"\nFigures, pictures and sounds are in {folder} ({REPORT_FILE}).")


def choose_folder(args: argparse.Namespace) -> Path:
    """A folder that isn't there yet: the one asked for, or one with a number."""
    if args.out is not None:
        if args.out.exists():
            raise UserError(f"{args.out} is there already; name another folder with --out, or take it away.")
        return args.out
    place = args.run if args.run is not None else Path()
    names = (place / ("evaluation" if number == 1 else f"evaluation-{number}") for number in range(1, 1_000_000))
    return next(folder for folder in names if not folder.exists())


def find_recordings(args: argparse.Namespace) -> Recordings | None:
    """Of the speaker: --data's, or those of the run."""
    from tortoise_hf.evaluation.recordings import recordings_in, recordings_of_run

    if args.data is not None:
        return recordings_in(args.data, args.num_texts, args.speaker, args.seed)
    return None if args.run is None else recordings_of_run(args.run, args.speaker, args.seed)


def choose_texts(args: argparse.Namespace, recordings: Recordings | None) -> list[str]:
    """What is spoken: the first lines of --texts, else the transcripts of held-out recordings."""
    from tortoise_hf.evaluation.recordings import read_texts

    texts = read_texts(args.texts) if args.texts is not None else [clip.text for clip in recordings.held_out]
    return texts[: args.num_texts]


def name_voices(sources: Sequence[str]) -> dict[str, str]:
    """Short names, all different, that folders can have, to the voices as they were given."""
    named: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        path = path.resolve() if path.exists() else path
        short = path.parent.name if path.name == "export" else path.name
        short = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in short)
        name, number = short, 2
        while name in named or name in ("recordings", "resynthesised"):
            name, number = f"{short}-{number}", number + 1
        named[name] = source
    return named


def load_voice(args: argparse.Namespace, source: str, recordings: Recordings | None, device: torch.device) -> Voice:
    """A voice with the speaker asked for, its own, or the one in the recordings."""
    import torch

    from tortoise_hf.evaluation.recognition import first_sentence
    from tortoise_hf.voice import Voice

    settings = {
        "weights_dir": args.weights_dir,
        "device": device,
        "dtype": args.dtype and getattr(torch, args.dtype),
        "low_memory": args.low_memory,
        "preview": args.preview,
    }
    if args.clips or args.latents or args.random is not None:
        return Voice.from_pretrained(source, clips=args.clips, latents=args.latents, random=args.random, **settings)
    if args.speaker is not None and recordings is not None:
        return Voice.from_pretrained(source, clips=recordings.reference_clips(), **settings)
    try:
        return Voice.from_pretrained(source, **settings)
    except UserError as error:
        if recordings is None:
            raise
        voice = Voice.from_pretrained(source, clips=recordings.reference_clips(), **settings)
        print(f"{first_sentence(error)}. Recordings from {recordings.source} are taken instead.", file=sys.stderr)
        return voice


if __name__ == "__main__":
    main()
