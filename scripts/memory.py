"""Say what a recipe takes of a GPU's memory, where there is no such GPU.

    python scripts/memory.py --config configs/t4.yaml --mixed_precision fp16

The figures are computed, for clips of the greatest length the recipe lets through, not measured; `scripts/prepare.py`
measures on the machine it runs on. What the recipe leaves to the plan (micro-batch, gradient checkpointing) is shown in
all variants. Nothing is fetched or written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tortoise_hf.cli import load_config, run
from tortoise_hf.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, then count and print."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="fp16")
    own, others = parser.parse_known_args(argv)
    cfg = load_config(others, __doc__)
    run(lambda: show(cfg, own.mixed_precision))


def show(cfg: Config, mixed_precision: str) -> None:
    """A line for each variant. Torch loads only here, so `--help` and a mistyped flag answer at once."""
    from tortoise_hf.memory import memory_table

    print(memory_table(cfg, mixed_precision))


if __name__ == "__main__":
    main()
