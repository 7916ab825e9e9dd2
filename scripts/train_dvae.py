"""Train a DVAE, the model that turns mel spectrograms into codes and back, from scratch.

    python scripts/train_dvae.py --config configs/small_dvae.yaml --data.root FOLDER --training.output_dir FOLDER

or, in several processes, `accelerate launch --config_file accelerate_config.yaml scripts/train_dvae.py ...`. A GPT
needs the DVAE it was trained with, so only a base made from scratch can take another one than TorToiSe's. The output
folder then holds dvae/ and mel_norms.safetensors, as a base does, metrics.json, and samples/ to listen to. Running the
same command again goes on where the run stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import _environment  # noqa: F401

from tortoise_hf.cli import load_config, loading_packages, run
from tortoise_hf.dvae_config import DVAERunConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, then train and say what came out."""
    cfg = load_config(argv, __doc__, DVAERunConfig)
    run(lambda: train_dvae(cfg))


def train_dvae(cfg: DVAERunConfig) -> None:
    """The whole run. Torch loads only here, so `--help` and a mistyped flag answer at once."""
    with loading_packages():
        from tortoise_hf.data.mels import prepare_mels
        from tortoise_hf.dvae_run import choose_mel_norms, finish_dvae_run, is_finished, open_dvae_run
        from tortoise_hf.dvae_training import DVAETrainer
        from tortoise_hf.machine import describe, main_process_first, start_accelerator
        from tortoise_hf.run import check_run_folder

    check_run_folder(cfg)
    if is_finished(cfg):
        print(f"{cfg.output_dir} holds a finished DVAE; name another training.output_dir to train one more.")
        return
    accelerator = start_accelerator(cfg.training.seed)
    accelerator.print(describe(accelerator))
    with main_process_first(accelerator):
        data = prepare_mels(cfg.data, show_progress=accelerator.is_main_process)
    accelerator.print(data.report.summary())

    mel_norms = choose_mel_norms(cfg, data.train)
    checkpoint = open_dvae_run(cfg, accelerator, data.train, mel_norms, data.report)
    trainer = DVAETrainer(cfg, accelerator, data.train, data.eval, mel_norms)
    trainer.resume(checkpoint)
    state = trainer.train()
    if accelerator.is_main_process:
        metrics = finish_dvae_run(cfg, state, mel_norms, data.eval, data.train)
        figures = {name: metrics[name] for name in ("l1", "explained", "perplexity", "codes_used", "bytes")}
        print(f"{cfg.output_dir}/dvae is the DVAE of step {metrics['step']}; figures of {metrics['clips']} clips:")
        print(", ".join(f"{name} {value:,}" for name, value in figures.items()))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
