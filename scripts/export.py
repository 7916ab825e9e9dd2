"""Write a run's weights as one folder that TorToiSe's programs, transformers and this package load.

    python scripts/export.py runs/my_voice exports/my_voice

The first argument is a run (its best checkpoint is taken) or one of its checkpoint-STEP folders. The folder holds
STEP_gpt.pth in the published layout, model.safetensors + config.json, tokenizer and mel norms; a self-test reads both
weight files back before the folder appears.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import _environment  # noqa: F401

from tortoise_hf.cli import run


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, export, print what the self-test found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_or_checkpoint", help="folder of a run, or checkpoint-STEP inside it")
    parser.add_argument("out", help="folder to make")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of STEP_gpt.pth (float32)"
    )
    parser.add_argument(
        "--no-attention-buffers",
        action="store_true",
        help="leave the old causal-mask buffers out of STEP_gpt.pth: for strict loaders with transformers from 4.30",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--weights_dir", help="folder with the released files, if not where the run had it")
    args = parser.parse_args(argv)
    run(lambda: export(args))


def export(args: argparse.Namespace) -> None:
    """Torch loads only here, so `--help` answers at once."""
    from tortoise_hf.export_run import export_run

    report = export_run(
        args.run_or_checkpoint,
        args.out,
        dtype=args.dtype,
        attention_buffers=not args.no_attention_buffers,
        overwrite=args.overwrite,
        weights_dir=args.weights_dir,
    )
    print(report.summary())


if __name__ == "__main__":
    main()
