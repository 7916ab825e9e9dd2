"""Store who speaks: recordings of a speaker, or other stored voices, as latents.

    python scripts/voice.py --voice exports/my_voice --clips recordings/ --out exports/my_voice/latents.safetensors

A voice's folder with a latents.safetensors speaks without further arguments. --out with the suffix .pth writes the pair
of tensors that tortoise-tts reads; --latents reads both kinds, and of several voices takes the mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import _environment  # noqa: F401

from tortoise_hf.cli import run


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, listen, write the latents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voice", default="released", help="GPT they are for: folder, run, user/name, .pth file")
    parser.add_argument("--clips", nargs="+", help="recordings of the speaker, or folders of them")
    parser.add_argument("--latents", nargs="+", help="stored latents to read")
    parser.add_argument("--random", type=int, metavar="SEED", help="a voice nobody has")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors, or .pth for tortoise-tts")
    parser.add_argument("--preview", action="store_true", help="only what previews need: no large model is fetched")
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    parser.add_argument("--weights_dir", help="folder with the released files")
    args = parser.parse_args(argv)
    if not (args.clips or args.latents or args.random is not None):
        parser.error("say where the voice comes from: --clips, --latents or --random")
    run(lambda: store(args))


def store(args: argparse.Namespace) -> None:
    """Torch loads only here, so `--help` answers at once."""
    import torch

    from tortoise_hf.voice import Voice

    voice = Voice.from_pretrained(
        args.voice,
        clips=args.clips,
        latents=args.latents,
        random=args.random,
        weights_dir=args.weights_dir,
        device=args.device,
        dtype=torch.float32,
        preview=args.preview,
    )
    voice.save_latents(args.out)
    print(f"{args.out}: latents of the voice, for {args.voice}")


if __name__ == "__main__":
    main()
