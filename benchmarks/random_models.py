"""TorToiSe's models with random weights, written as files: what the benchmarks speak with.

    python benchmarks/random_models.py FOLDER --size released

Rows of codes never end by themselves, so that their length is what a benchmark asks for. Time and memory don't depend
on what the weights are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, UnivNetConfig, UnivNetModel
from transformers.utils import logging

from tortoise_hf.latents import VoiceLatents, save_latents
from tortoise_hf.models.clvp import CLVP, CLVPConfig
from tortoise_hf.models.diffusion import DiffusionConfig, DiffusionDecoder
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.text import train_tokenizer

TEXT = (
    "The kettle is on, so sit down and tell me about your day. Please close the gate behind you, or the sheep will "
    "wander onto the road. We painted the kitchen a pale yellow, and now it looks twice as big. "
)
SIZES = ("small", "released")
"""The released sizes, and a GPT of 6 million weights with a chain that fits it."""


def builders(size: str) -> dict[str, Callable[[], PreTrainedModel]]:
    """How to build each model of a size."""
    if size == "released":
        gpt, clvp, diffusion, dvae = GPTConfig(), CLVPConfig(), DiffusionConfig(), DVAEConfig()
    else:
        gpt = GPTConfig(hidden_size=192, num_heads=3, num_layers=6, num_conditioning_layers=2)
        clvp = CLVPConfig(hidden_size=96, num_layers=4, num_heads=2)
        diffusion = DiffusionConfig(hidden_size=128, num_heads=2, num_layers=6, latent_size=192)
        dvae = DVAEConfig(hidden_size=64, codebook_dim=64)
    return {
        "gpt": lambda: endless(TortoiseGPT(gpt)),
        "clvp": lambda: CLVP(clvp),
        "diffusion": lambda: restrained(DiffusionDecoder(diffusion)),
        "vocoder": lambda: UnivNetModel(UnivNetConfig()),
        "dvae": lambda: DVAE(dvae),
    }


@torch.no_grad()
def endless(gpt: TortoiseGPT) -> TortoiseGPT:
    """Never to draw STOP."""
    gpt.mel_head.bias[gpt.config.stop_mel_id] = -1e4
    return gpt


@torch.no_grad()
def restrained(diffusion: DiffusionDecoder) -> DiffusionDecoder:
    """Outputs small enough that the samplers' clamp doesn't hide what they do."""
    for parameter in diffusion.out[2].parameters():
        parameter *= 0.005
    return diffusion


def write_models(folder: Path, size: str) -> None:
    """A voice's folder (`voice`) with its speaker, and the folder of the chain that fits it (`chain`)."""
    logging.disable_progress_bar()
    models = builders(size)
    voice, chain = folder / "voice", folder / "chain"
    for name, build in models.items():
        torch.manual_seed(0)
        build().save_pretrained({"gpt": voice, "dvae": voice / "dvae"}.get(name, chain / name))
    train_tokenizer([TEXT], 255).save(voice / "tokenizer.json")
    save_file({"mel_norms": torch.full((80,), -4.0)}, voice / "mel_norms.safetensors")
    gpt, diffusion = (GPTConfig.from_pretrained(voice), DiffusionConfig.from_pretrained(chain / "diffusion"))
    torch.manual_seed(0)
    speaker = VoiceLatents(torch.randn(1, gpt.hidden_size), torch.randn(1, 2 * diffusion.hidden_size))
    save_latents(speaker, voice / "latents.safetensors")


def write_in_another_process(folder: Path, size: str) -> None:
    """Write models without their ever having been in this process's memory, which is to be measured."""
    subprocess.run([sys.executable, __file__, str(folder), "--size", size], check=True)


def main(argv: list[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    args = parser.parse_args(argv)
    write_models(args.folder, args.size)


if __name__ == "__main__":
    main()
