"""Push a run's voice to the Hugging Face Hub, or push what a run could not.

    python scripts/push.py runs/my_voice --repo_id you/my-voice --consent "My own voice."

What the run's settings say under `hub` need not be repeated. Log in first: hf auth login. The repository gets weights,
card, curve and reference clips in one commit; it is private unless --public is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import _environment  # noqa: F401

from tortoise_hf.cli import run


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, push, say where the voice is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--repo_id", help="owner/name on the Hub (as in the run's settings)")
    parser.add_argument("--consent", help="whose voice it is and that they agree, for the card")
    parser.add_argument("--revision", help="branch (main)")
    parser.add_argument("--license", help="licence for the card (apache-2.0)")
    parser.add_argument(
        "--adapter_only",
        action=argparse.BooleanOptionalAction,
        help="push a LoRA run's adapter without whole weights (as in the run's settings)",
    )
    parser.add_argument("--public", action="store_true", help="make a new repository that everybody can read")
    args = parser.parse_args(argv)
    run(lambda: push(args))


def push(args: argparse.Namespace) -> None:
    """Torch loads only here, so `--help` answers at once."""
    from tortoise_hf.hub.publish import push_run

    changes = {name: getattr(args, name) for name in ("repo_id", "consent", "revision", "license", "adapter_only")}
    pushed = push_run(args.run, changes | {"private": False if args.public else None})
    print(f"{'Pushed' if pushed.changed else 'Already up to date'}: {pushed.url} (commit {pushed.commit})")
    print(f"Pull it anywhere: python scripts/pull.py {pushed.repo_id}")


if __name__ == "__main__":
    main()
