"""Check a dataset, encode it into the cache and show the plan of the run, without training.

    python scripts/prepare.py --config configs/my_voice.yaml

takes the same settings as scripts/train.py. What it encodes, training finds; nothing is encoded twice. Run it on the
machine that will train: the plan goes by a measurement there.
"""

from __future__ import annotations

from collections.abc import Sequence

from tortoise_hf.cli import load_config, run
from tortoise_hf.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, then check, encode and plan."""
    cfg = load_config(argv, __doc__)
    run(lambda: prepare(cfg))


def prepare(cfg: Config) -> None:
    """The first half of a run. Torch loads only here, so `--help` and a mistyped flag answer at once."""
    from pathlib import Path

    from tortoise_hf.machine import describe, main_process_first, start_accelerator
    from tortoise_hf.models.pretrained import load_gpt
    from tortoise_hf.preparation import make_plan, prepare_base_and_data
    from tortoise_hf.run import REPORT_NAME, check_run_folder, write_report

    check_run_folder(cfg)
    accelerator = start_accelerator(cfg.training.seed)
    accelerator.print(describe(accelerator))
    with main_process_first(accelerator):
        files, data = prepare_base_and_data(cfg, accelerator)
    accelerator.print(data.report.summary())
    model = load_gpt(files, cfg.model.from_scratch, cfg.training.seed)
    plan = make_plan(cfg, accelerator, files, data, model)
    if accelerator.is_main_process:
        print(plan.table())
        write_report(cfg, data.report)
        print(f"All rows left out: {Path(cfg.training.output_dir) / REPORT_NAME}. Next: scripts/train.py, likewise.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
