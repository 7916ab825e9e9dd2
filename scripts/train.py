"""Fine-tune TorToiSe's GPT on a voice.

    accelerate launch --config_file accelerate_config.yaml scripts/train.py --config configs/my_voice.yaml

or, in one process, `python scripts/train.py --config configs/my_voice.yaml`. Every setting of the file can be given as a
flag as well: `--optim.learning_rate 2e-5`. Running the same command again goes on where the run stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from tortoise_hf.cli import load_config, run


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, then train, export and say where things are."""
    cfg = load_config(argv, __doc__)

    def fine_tune() -> None:
        from tortoise_hf.finetune import fine_tune  # torch and transformers load only now, so --help is quick

        fine_tune(cfg)

    run(fine_tune)


if __name__ == "__main__":
    main()
