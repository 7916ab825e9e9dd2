"""What speaking costs, stage by stage: time per second of audio, peak memory, time to the first sound, and the floor.

    python benchmarks/speak.py --size small
    python benchmarks/speak.py --size released --preset fast --device cuda
    python benchmarks/speak.py --size released --low_memory --num_samples 4 --steps 2 --codes 500 --pieces 1

The models are random files, read as a voice's files are; every row is `--codes` codes long, 46 ms of sound each.

The floor is what can't be saved. Every code of a batch of rows reads all weights of the GPT once (or, with many rows,
takes two operations per weight and row); a diffusion step is the arithmetic of the network. Both are set against what
the device reached on a large matrix just before: `share_of_the_floor` is the time these would take by the time taken.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import random_models
import torch
from measuring import best_seconds, matrix_rate, wait_for
from random_models import SIZES, TEXT
from torch.utils.flop_counter import FlopCounterMode

from tortoise_hf.audio import HOP_LENGTH, SAMPLE_RATE, SAMPLE_RATE_24K
from tortoise_hf.models.dvae import FRAMES_PER_CODE
from tortoise_hf.presets import Preset, choose_preset
from tortoise_hf.speech import Chain, rows_at_once
from tortoise_hf.voice import Voice

STAGES = ("sample", "rank", "latents", "mel", "waveform")


def timed_stages(chain: Chain, device: torch.device) -> dict[str, float]:
    """Wrap each stage of a chain; the dict fills up with seconds as it is used."""
    seconds: dict[str, float] = defaultdict(float)

    def wrap(name: str):
        stage = getattr(chain, name)

        def timed(*args, **kwargs):
            started = time.perf_counter()
            result = stage(*args, **kwargs)
            wait_for(device)
            seconds[name] += time.perf_counter() - started
            return result

        setattr(chain, name, timed)

    for name in STAGES:
        wrap(name)
    return seconds


@torch.inference_mode()
def device_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches: bytes read per second by a matrix times a vector, operations of square matrices."""
    tall = torch.randn(64 * 1024, 1024, device=device, dtype=dtype)
    vector = torch.randn(1024, device=device, dtype=dtype)
    return {
        "bytes_per_second": tall.numel() * tall.element_size() / best_seconds(lambda: tall @ vector, device),
        "operations_per_second": matrix_rate(device, dtype),
    }


@torch.inference_mode()
def floor(chain: Chain, preset: Preset, num_frames: int, num_pieces: int, limits: dict[str, float]) -> dict[str, float]:
    """What can't be saved, and the seconds it takes at the device's limits."""
    codes = preset.sampling.max_codes
    with chain.shelf.use("gpt") as gpt:
        weights = [p for part in (gpt.gpt, gpt.mel_head) for p in part.parameters()]
        most = rows_at_once(chain.gpt_config, 3 + 100 + codes, gpt.dtype, chain.shelf)
    read = sum(weight.numel() * weight.element_size() for weight in weights)
    operations = 2 * sum(weight.numel() for weight in weights)  # per row and code
    batches, rest = divmod(preset.num_samples, most)
    sampling = 0.0
    for rows in [most] * batches + [rest] * bool(rest):
        per_code = max(read / limits["bytes_per_second"], rows * operations / limits["operations_per_second"])
        sampling += num_pieces * codes * per_code
    branches = 2 if preset.diffusion.guidance else 1
    with chain.shelf.use("diffusion") as diffusion, FlopCounterMode(display=False) as counter:
        shapes = ((branches, 100, num_frames), (branches, diffusion.config.hidden_size, num_frames))
        mel, conditioning = (torch.zeros(shape, device=diffusion.device, dtype=diffusion.dtype) for shape in shapes)
        diffusion(mel, torch.zeros(branches, device=diffusion.device), conditioning)
    per_piece = counter.get_total_flops() * preset.diffusion.steps
    return {
        "bytes_of_weights_read_per_code": read,
        "diffusion_operations_per_audio_second": per_piece / (num_frames * HOP_LENGTH / SAMPLE_RATE_24K),
        "sample_seconds": sampling,
        "mel_seconds": num_pieces * per_piece / limits["operations_per_second"],
    }


def peak_memory(device: torch.device) -> dict[str, float]:
    """GiB: of the process since its start, and of the device."""
    scale = 2**30 if sys.platform == "darwin" else 2**20
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peaks


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Speak with the models in a folder and write down what it took."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    numbers = {"num_samples": args.num_samples, "steps": args.steps, "sampler": args.sampler}
    preset = choose_preset(args.preset, max_codes=args.codes, **numbers)
    started = time.perf_counter()
    voice = Voice.from_pretrained(
        folder / "voice", weights_dir=folder / "chain", device=device, dtype=dtype, low_memory=args.low_memory
    )
    voice.speak("Hello.", preset=choose_preset("single_sample", num_samples=2, steps=2, max_codes=8))
    loading = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stages = timed_stages(voice.chain, device)
    started, first, audio = time.perf_counter(), 0.0, 0.0
    for speech in voice.stream("\n\n".join([TEXT] * args.pieces), preset=preset):
        first = first or time.perf_counter() - started
        audio += speech.seconds
    total = time.perf_counter() - started
    peaks = peak_memory(device)
    limits = device_limits(device, dtype)
    num_frames = args.codes * FRAMES_PER_CODE * SAMPLE_RATE_24K // SAMPLE_RATE
    least = floor(voice.chain, preset, num_frames, args.pieces, limits)
    return {
        "settings": {**{key: str(value) for key, value in vars(args).items()}, "threads": torch.get_num_threads()},
        "audio_seconds": audio,
        "total_seconds": total,
        "real_time_factor": total / audio,
        "first_sound_seconds": first,
        "loading_and_warm_up_seconds": loading,
        "stage_seconds_per_audio_second": {name: stages[name] / audio for name in STAGES},
        "peak_gib": peaks,
        "device_limits": limits,
        "floor": least,
        "share_of_the_floor": {name: least[f"{name}_seconds"] / stages[name] for name in ("sample", "mel")},
    }


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, and give the numbers back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--models", type=Path, help="folder of random_models.py; left out: one is made and deleted")
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
    with ExitStack() as stack:
        folder = args.models
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tortoise_hf_random_")))
            random_models.write_in_another_process(folder, args.size)
        result = measure(args, folder)
    print(json.dumps(result, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
