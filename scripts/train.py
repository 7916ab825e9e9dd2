"""Fine-tune TorToiSe's GPT on a voice.

    accelerate launch --config_file accelerate_config.yaml scripts/train.py --config configs/my_voice.yaml

or, in one process, `python scripts/train.py --config configs/my_voice.yaml`. Every setting of the file can be given as
a flag as well: `--optim.learning_rate 2e-5`. Running the same command again goes on where the run stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from tortoise_hf.cli import load_config, run
from tortoise_hf.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, then train, export and say where things are."""
    cfg = load_config(argv, __doc__)
    run(lambda: fine_tune(cfg))


def fine_tune(cfg: Config) -> None:
    """The whole run, step by step. Torch loads only here, so `--help` and a mistyped flag answer at once."""
    import time

    from tortoise_hf.data.prepare import prepare_dataset

    from tortoise_hf.machine import describe, start_accelerator
    from tortoise_hf.models.pretrained import resolve_base

    started = time.perf_counter()
    accelerator = start_accelerator(cfg.training.seed)
    accelerator.print(describe(accelerator))

    # The main process fetches and prepares; the others then find everything cached.
    with accelerator.main_process_first():
        files = resolve_base(cfg.model)
        prepared = prepare_dataset(cfg.data, files, device=accelerator.device)
    accelerator.print(prepared.report.summary())


if __name__ == "__main__":
    main()
