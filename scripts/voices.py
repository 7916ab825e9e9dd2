"""Find voices on the Hugging Face Hub.

    python scripts/voices.py search TEXT

lists those whose name holds TEXT (all without it), the most downloaded first. Pull one with scripts/pull.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import _environment  # noqa: F401

from tortoise_hf.cli import run


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, ask the Hub, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("search", help="list voices")
    search.add_argument("text", nargs="?", help="part of the name")
    search.add_argument("--limit", type=int, default=50, help="most voices listed (50)")
    args = parser.parse_args(argv)
    run(lambda: list_voices(args))


def list_voices(args: argparse.Namespace) -> None:
    """Print what the Hub knows of each voice."""
    from tortoise_hf.hub.search import search_voices

    voices = search_voices(args.text, args.limit)
    if not voices:
        print("No voice was found." if args.text is None else f"No voice's name holds {args.text!r}.")
        return
    width = max(len(voice.id) for voice in voices)
    for voice in voices:
        changed = voice.last_modified.date().isoformat() if voice.last_modified else ""
        private = "  private" if voice.private else ""
        print(f"{voice.id:<{width}}  {voice.downloads or 0:>9,} downloads  {changed}{private}")


if __name__ == "__main__":
    main()
