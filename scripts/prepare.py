"""Check a dataset, encode it into the cache and show the plan of the run, without training.

    python scripts/prepare.py --config configs/my_voice.yaml

takes the same settings as scripts/train.py. What it encodes, training finds; nothing is encoded twice. Run it on the
machine that will train: the plan goes by a measurement there.

    python scripts/prepare.py --config configs/my_voice.yaml --hub.consent "My own voice." --push you/my-recordings

shares the clips that were kept as a dataset on the Hugging Face Hub (private unless --hub.private false), from which
--data.root you/my-recordings trains anywhere. --plan FILE.json also writes the plan for programs, such as the notebook.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import _environment  # noqa: F401

from tortoise_hf.cli import load_config, loading_packages, run
from tortoise_hf.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, then check, encode and plan."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--push", metavar="OWNER/NAME")
    parser.add_argument("--plan", type=Path, metavar="FILE.json")
    own, others = parser.parse_known_args(argv)
    cfg = load_config(others, __doc__)
    run(lambda: prepare(cfg, own.push, own.plan))


def prepare(cfg: Config, push_to: str | None = None, plan_path: Path | None = None) -> None:
    """The first half of a run. Torch loads only here, so `--help` and a mistyped flag answer at once."""
    with loading_packages():
        from tortoise_hf.hub.dataset import push_dataset
        from tortoise_hf.machine import describe, main_process_first, start_accelerator
        from tortoise_hf.optim import settle_optimizer
        from tortoise_hf.preparation import load_model, make_plan, prepare_base_and_data
        from tortoise_hf.run import REPORT_NAME, check_run_folder, write_report

    check_run_folder(cfg)
    accelerator = start_accelerator(cfg.training.seed)
    accelerator.print(describe(accelerator))
    with main_process_first(accelerator):
        files, data = prepare_base_and_data(cfg, accelerator)
    accelerator.print(data.report.summary())
    if push_to is not None and accelerator.is_main_process:
        pushed = push_dataset(cfg, data, push_to)
        print(f"{'Pushed' if pushed.changed else 'Already up to date'}: {pushed.url} (commit {pushed.commit[:8]})")
    cfg = settle_optimizer(cfg, accelerator)
    model = load_model(cfg, files)
    plan = make_plan(cfg, accelerator, files, data, model)
    if accelerator.is_main_process:
        print(plan.table())
        write_report(cfg, data.report)
        if plan_path is not None:
            plan_path.write_text(json.dumps(plan.to_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"Report: {Path(cfg.training.output_dir) / REPORT_NAME}. Next: scripts/train.py with the same arguments.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
