"""Fine-tune TorToiSe's GPT on a voice.

    accelerate launch --config_file accelerate_config.yaml scripts/train.py --config configs/my_voice.yaml

or, in one process, `python scripts/train.py --config configs/my_voice.yaml`. Every setting of the file can be given as
a flag as well: `--optim.learning_rate 2e-5`. Running the same command again goes on where the run stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import _environment  # noqa: F401

from tortoise_hf.cli import load_config, loading_packages, run
from tortoise_hf.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, then train, export and say where things are."""
    cfg = load_config(argv, __doc__)
    run(lambda: fine_tune(cfg))


def fine_tune(cfg: Config) -> None:
    """The whole run, step by step. Torch loads only here, so `--help` and a mistyped flag answer at once."""
    with loading_packages():
        from tortoise_hf.callbacks import build_callbacks
        from tortoise_hf.data.loader import build_batches
        from tortoise_hf.hub.checkpoints import fetch_run
        from tortoise_hf.hub.publish import check_before_training, keep_clips, push_at_end
        from tortoise_hf.loop import train
        from tortoise_hf.machine import (
            compile_blocks,
            describe,
            main_process_first,
            set_gradient_checkpointing,
            start_accelerator,
        )
        from tortoise_hf.models.pretrained import load_mel_norms
        from tortoise_hf.optim import build_lr_scheduler, build_optimizer, settle_optimizer
        from tortoise_hf.preparation import load_model, make_plan, prepare_base_and_data
        from tortoise_hf.run import check_run_folder, clip_hashes, finish_run, open_run, start_or_resume, write_report
        from tortoise_hf.samples import open_samples
        from tortoise_hf.summary import closing_lines, opening_lines

    started = time.perf_counter()
    check_run_folder(cfg)
    accelerator = start_accelerator(cfg.training.seed)
    accelerator.print(describe(accelerator))
    check_before_training(cfg, accelerator)

    # The main process unpacks, fetches and prepares; the others then find everything cached.
    with main_process_first(accelerator):
        cfg = fetch_run(cfg, say=accelerator.print)
        files, data = prepare_base_and_data(cfg, accelerator)
    accelerator.print(data.report.summary())

    cfg = settle_optimizer(cfg, accelerator)
    model = load_model(cfg, files)
    plan = make_plan(cfg, accelerator, files, data, model)
    accelerator.print(plan.table())
    cfg = plan.config
    set_gradient_checkpointing(model, cfg.model.gradient_checkpointing)
    batches, eval_batches = build_batches(cfg, accelerator, data.train, data.eval, load_mel_norms(files), model.config)
    clips = clip_hashes(data.train)
    run_folder = open_run(cfg, accelerator, clips, batches.steps_per_epoch, plan.to_dict())
    if accelerator.is_main_process:
        write_report(cfg, data.report)
        if cfg.hub.repo_id is not None:
            keep_clips(run_folder.output_dir, cfg.data)
        print(opening_lines(cfg, run_folder, model))

    samples = open_samples(cfg, accelerator.device, files, data, model.config)
    model.to(accelerator.device)
    optimizer = build_optimizer(model, cfg.optim)
    lr_scheduler = build_lr_scheduler(optimizer, cfg.optim, run_folder.max_steps)
    compile_blocks(accelerator, model.gpt.h)
    model, optimizer = accelerator.prepare(model, optimizer)
    callbacks = build_callbacks(cfg, accelerator, files, samples)

    state = start_or_resume(cfg, run_folder, accelerator, model, optimizer, lr_scheduler, callbacks)
    if run_folder.finished_step is None:
        state = train(cfg, accelerator, model, optimizer, lr_scheduler, batches, eval_batches, callbacks, state)
    if accelerator.is_main_process:
        report = finish_run(cfg, run_folder, files, state, samples)
        print(closing_lines(cfg, run_folder, state, report, time.perf_counter() - started))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process and cfg.hub.repo_id is not None:  # nobody waits for this any more
        print(push_at_end(run_folder.output_dir))


if __name__ == "__main__":
    main()
