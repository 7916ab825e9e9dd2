"""What speaking costs, stage by stage: seconds per second of audio, peak memory, time to the first sound.

    python benchmarks/speak.py --size small
    python benchmarks/speak.py --size released --preset fast --device cuda

The weights are random, so what is said is noise, and rows never end by themselves: each is `--codes` codes long, 46 ms
of sound each. Time and memory don't depend on what the weights are.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import UnivNetConfig, UnivNetModel

from tortoise_hf.audio import HOP_LENGTH, SAMPLE_RATE, SAMPLE_RATE_24K
from tortoise_hf.latents import VoiceLatents
from tortoise_hf.models.clvp import CLVP, CLVPConfig
from tortoise_hf.models.diffusion import DiffusionConfig, DiffusionDecoder
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.speech import Chain, ModelShelf, Preset, choose_preset
from tortoise_hf.text import train_tokenizer
from tortoise_hf.voice import Voice

TEXT = (
    "The kettle is on, so sit down and tell me about your day. Please close the gate behind you, or the sheep will "
    "wander onto the road. We painted the kitchen a pale yellow, and now it looks twice as big. "
)
STAGES = ("sample", "rank", "latents", "mel", "waveform")


def random_voice(size: str, device: torch.device, dtype: torch.dtype, low_memory: bool) -> Voice:
    """A voice of random weights, at the released sizes or an eighth of their width."""
    small = size == "small"
    width = 128 if small else 1024
    configs = {
        "gpt": (TortoiseGPT, GPTConfig(hidden_size=width, num_heads=width // 64, num_layers=8 if small else 30)),
        "clvp": (CLVP, CLVPConfig(**({"hidden_size": 96, "num_layers": 4, "num_heads": 2} if small else {}))),
        "diffusion": (DiffusionDecoder, DiffusionConfig(hidden_size=width, num_heads=width // 64, latent_size=width)),
        "vocoder": (UnivNetModel, UnivNetConfig()),
    }

    def loader(name: str):
        def load() -> torch.nn.Module:
            model_class, config = configs[name]
            torch.manual_seed(0)
            model = model_class(config)
            if name == "gpt":
                with torch.no_grad():
                    model.mel_head.bias[config.stop_mel_id] = -1e4
            return model

        return load

    shelf = ModelShelf({name: loader(name) for name in configs}, device, dtype, low_memory)
    tokenizer = train_tokenizer([TEXT], 255)
    chain = Chain(shelf, configs["gpt"][1], tokenizer, -torch.ones(80), latent_size=width)
    return Voice(chain, VoiceLatents(torch.randn(1, width), torch.randn(1, 2 * width)))


def timed_stages(chain: Chain, device: torch.device) -> dict[str, float]:
    """Wrap each stage of a chain; the dict fills up with seconds as it is used."""
    seconds: dict[str, float] = defaultdict(float)

    def wrap(name: str):
        stage = getattr(chain, name)

        def timed(*args, **kwargs):
            started = time.perf_counter()
            result = stage(*args, **kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name] += time.perf_counter() - started
            return result

        setattr(chain, name, timed)

    for name in STAGES:
        wrap(name)
    return seconds


@torch.inference_mode()
def floor(chain: Chain, preset: Preset, num_frames: int) -> dict[str, float]:
    """What can't be saved: weights read for every code of a batch of rows, arithmetic of the diffusion model."""
    with chain.shelf.use("gpt") as gpt:
        read = sum(p.numel() * p.element_size() for part in (gpt.gpt, gpt.mel_head) for p in part.parameters())
    rows = 2 if preset.diffusion.guidance else 1
    with chain.shelf.use("diffusion") as diffusion, FlopCounterMode(display=False) as counter:
        shapes = ((rows, 100, num_frames), (rows, diffusion.config.hidden_size, num_frames))
        mel, conditioning = (torch.zeros(shape, device=diffusion.device, dtype=diffusion.dtype) for shape in shapes)
        diffusion(mel, torch.zeros(rows, device=diffusion.device), conditioning)
    per_piece = counter.get_total_flops() * preset.diffusion.steps
    audio_seconds = num_frames * HOP_LENGTH / SAMPLE_RATE_24K
    return {
        "gib_of_weights_read_per_code": read / 2**30,
        "diffusion_tflop_per_audio_second": per_piece / audio_seconds / 1e12,
    }


def peak_memory(device: torch.device) -> dict[str, float]:
    """GiB: of the process since its start, and of the device."""
    scale = 2**30 if sys.platform == "darwin" else 2**20
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peaks


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, and give the numbers back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "released"), default="small")
    parser.add_argument("--preset", default="single_sample")
    parser.add_argument("--num_samples", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler")
    parser.add_argument("--codes", type=int, default=100, help="length of every row (100 codes: 4.6 s)")
    parser.add_argument("--pieces", type=int, default=2, help="pieces of text of about 170 characters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--low_memory", action="store_true")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args(argv)
    logging.getLogger("tortoise_hf.speech").setLevel(logging.ERROR)  # every row is cut off, on purpose

    device = torch.device(args.device)
    voice = random_voice(args.size, device, getattr(torch, args.dtype), args.low_memory)
    numbers = {"num_samples": args.num_samples, "steps": args.steps, "sampler": args.sampler}
    preset = choose_preset(args.preset, max_codes=args.codes, **numbers)
    text = "\n\n".join([TEXT] * args.pieces)

    warm_up = choose_preset("single_sample", num_samples=2, steps=2, max_codes=8)
    started = time.perf_counter()
    voice.speak("Hello.", preset=warm_up)
    loading = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stages = timed_stages(voice.chain, device)
    started, first, audio = time.perf_counter(), 0.0, 0.0
    for speech in voice.stream(text, preset=preset):
        first = first or time.perf_counter() - started
        audio += speech.seconds
    total = time.perf_counter() - started

    result = {
        "settings": {**{key: str(value) for key, value in vars(args).items()}, "threads": torch.get_num_threads()},
        "audio_seconds": audio,
        "total_seconds": total,
        "real_time_factor": total / audio,
        "first_sound_seconds": first,
        "loading_and_warm_up_seconds": loading,
        "stage_seconds_per_audio_second": {name: stages[name] / audio for name in STAGES},
        "peak_gib": peak_memory(device),
        "floor": floor(voice.chain, preset, args.codes * 4 * SAMPLE_RATE_24K // SAMPLE_RATE),
    }
    print(json.dumps(result, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
