"""Bring a voice here from the Hugging Face Hub and check it.

    python scripts/pull.py user/voice my_copy

Every file's hash is compared with what the Hub recorded, and names, sizes and shapes are looked at, before anything is
loaded. Without a second argument the voice stays in the Hub's cache; either folder can be given as --model.base. Where
the voice is an adapter, its base is fetched as well, and the copy is whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import _environment  # noqa: F401

from tortoise_hf.cli import run


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, pull, say where the voice is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("voice", help="owner/name on the Hub")
    parser.add_argument("folder", nargs="?", help="folder to make (the Hub's cache)")
    parser.add_argument("--revision", help="branch, tag or commit (the newest)")
    parser.add_argument("--weights_dir", help="folder with the released files, for an adapter to them")
    args = parser.parse_args(argv)
    run(lambda: pull(args))


def pull(args: argparse.Namespace) -> None:
    """Torch loads only here, so `--help` answers at once."""
    from tortoise_hf.adapter_files import is_adapter, read_adapter_config
    from tortoise_hf.hub.local_copy import copy_voice, fetch_whole
    from tortoise_hf.hub.pull import pull_voice

    folder = pull_voice(args.voice, args.revision)
    if args.folder is not None:
        copy_voice(folder, Path(args.folder), args.weights_dir)
    elif is_adapter(folder):
        fetch_whole(folder, args.weights_dir)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"Pulled {args.voice}: {len(files)} files, {size / 1e6:.1f} MB, all as the Hub recorded them.")
    if is_adapter(folder):
        base = read_adapter_config(folder).base_name
        print(f"It is an adapter to {base}, which is here as well; both together are as they were trained.")
    print(f"It is in {args.folder or folder}")


if __name__ == "__main__":
    main()
