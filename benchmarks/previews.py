"""What it gains to sample many texts together instead of one after the other, as evaluations and samples of a run do.

    python benchmarks/previews.py --texts 32 --codes 100

Both ways take turns on the same random voice of 6 million weights (or of the released size). Codes only: what makes
them heard doesn't depend on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import random_models
import torch
from random_models import SIZES, TEXT

from tortoise_hf.generation import SamplingConfig, generate_codes
from tortoise_hf.voice import Voice


def spread(text: str, count: int) -> list[str]:
    """So many texts of different lengths."""
    words = text.split()
    return [" ".join(words[index % 7 : index % 7 + 4 + index % 20]) for index in range(count)]


def main(argv: list[str] | None = None) -> dict:
    """Measure by turns, print, and give the numbers back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--codes", type=int, default=100, help="of each text (100 codes: 4.6 s)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tortoise_hf_random_") as folder:
        random_models.write_models(Path(folder), args.size)
        voice = Voice.from_pretrained(Path(folder) / "voice", preview=True, device=args.device)
        ids = [voice.chain.text_ids(text) for text in spread(TEXT, args.texts)]
        sampling = SamplingConfig(max_codes=args.codes)
        times: dict[int, list[tuple[float, float]]] = {size: [] for size in args.batch_sizes}
        with voice.chain.shelf.use("gpt") as gpt:
            for _ in range(args.repeats):
                for size, each in times.items():
                    clock, computing = time.perf_counter(), time.process_time()
                    generate_codes(gpt, ids, voice.latents.gpt, 1, sampling, batch_size=size)  # waits for the device
                    each.append((time.perf_counter() - clock, time.process_time() - computing))
    result = {
        "threads": torch.get_num_threads(),
        "million_weights": sum(weight.numel() for weight in gpt.parameters()) / 1e6,
        "seconds": {size: statistics.median(clock for clock, _ in each) for size, each in times.items()},
        "cpu_seconds": {size: statistics.median(used for _, used in each) for size, each in times.items()},
    }
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
