"""What preparing recordings costs: seconds of audio per second by stage, in whole, and again when nothing has changed.

    OMP_NUM_THREADS=1 python benchmarks/prepare.py --size released --clips 64 --num_proc 1 2
    python benchmarks/prepare.py --size released --clips 2048 --batches 1 16 --device cuda
    python benchmarks/prepare.py --size tiny --clips 13100 --seconds 0.7 --batches 1   # the second time, for many clips

The recordings are noise with LJSpeech's lengths, or all as long as `--seconds` tells. Stages are timed one after the
other on the same clips; the DVAE also in batches of like length. `cold` is all of `prepare_dataset` into an empty
cache, with each number of processes; `warm` is the same call again.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import synthetic
import torch
from measuring import Cost, add_common_arguments, finish, measured
from sizes import SIZES

from tortoise_hf.audio import SAMPLE_RATE, LogMel, load_waveform, resample
from tortoise_hf.config import DataConfig
from tortoise_hf.data.examples import CLIP_FEATURES, ClipEncoder, Record
from tortoise_hf.data.prepare import prepare_dataset
from tortoise_hf.data.store import ShardStore
from tortoise_hf.models.dvae import DVAE
from tortoise_hf.text import TextTokenizer, train_tokenizer

LIMITS = DataConfig(root=".")


def load_random_dvae(size: str) -> DVAE:
    """The DVAE of a size, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DVAE(SIZES[size][1]).eval()


def stages(paths: list[Path], dvae: DVAE, batches: list[int], folder: Path, device: torch.device) -> dict[str, Cost]:
    """Cost of every stage by itself over all clips."""
    waveforms: list[torch.Tensor] = []
    mels: list[torch.Tensor] = []
    records: list[Record] = []
    costs = {
        "read": measured(lambda: [soundfile.read(path, dtype="float32") for path in paths], device),
        "read, check, to mono": measured(lambda: waveforms.extend(map(load_waveform, paths)), device),
    }
    doubled = [np.repeat(waveform.numpy(), 2) for waveform in waveforms]
    halve = partial(resample, from_rate=2 * SAMPLE_RATE, to_rate=SAMPLE_RATE)
    costs["resample from 44,100 Hz"] = measured(lambda: [halve(torch.from_numpy(one)) for one in doubled], device)
    log_mel = LogMel(synthetic.random_norms()).to(device)
    costs["mel"] = measured(lambda: mels.extend(log_mel(one.to(device)) for one in waveforms), device)
    mels.sort(key=lambda mel: mel.shape[-1])
    for size in batches:
        costs[f"DVAE, batches of {size}"] = measured(partial(_encode_all, dvae, mels, size), device)
    encoder = ClipEncoder(dvae, synthetic.random_norms(), 1, LIMITS.max_samples, device)
    keys = [f"{place}" for place in range(len(paths))]
    costs["all of a clip's record"] = measured(lambda: records.extend(encoder(keys, list(map(str, paths)))), device)
    costs["write"] = measured(lambda: ShardStore(folder / "stage", CLIP_FEATURES).write(records), device)
    return costs


def _encode_all(dvae: DVAE, mels: list[torch.Tensor], size: int) -> None:
    """Encode mels in the order of their length, padded to the longest of a batch."""
    for start in range(0, len(mels), size):
        part = mels[start : start + size]
        longest = part[-1].shape[-1]
        dvae.encode(torch.cat([torch.nn.functional.pad(mel, (0, longest - mel.shape[-1])) for mel in part])).cpu()


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, and give the numbers back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the DVAE")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--seconds", type=float, help="length of every clip; left out: as LJSpeech's")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="clips the DVAE stage encodes at once")
    parser.add_argument("--num_proc", type=int, nargs="+", default=[1], help="processes of the whole")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    shapes = synthetic.ljspeech_shapes(args.clips)
    if args.seconds is not None:
        samples = np.full(args.clips, int(args.seconds * SAMPLE_RATE))
        shapes = synthetic.Shapes(samples, np.full(args.clips, max(1, int(args.seconds * 9))))
    with tempfile.TemporaryDirectory(prefix="tortoise_hf_prepare_") as name:
        folder = Path(name)
        synthetic.write_raw_folder(folder / "raw", shapes)
        paths = sorted((folder / "raw" / "wavs").iterdir())
        # An odd place for it: the DVAE's first use takes longer, whoever comes first.
        dvae = load_random_dvae(args.size).to(device)
        dvae.encode(torch.zeros(1, 80, 400, device=device))
        costs = stages(paths, dvae, args.batches, folder, device)
        tokenizer: TextTokenizer = train_tokenizer([" ".join(synthetic.WORDS)], 100)
        for num_proc in args.num_proc:
            cfg = DataConfig(root=str(folder / "raw"), cache_dir=str(folder / f"cache-{num_proc}"), num_proc=num_proc)
            load = partial(load_random_dvae, args.size)
            prepare = partial(
                prepare_dataset, cfg, tokenizer, synthetic.random_norms(), load, "random", device, show_progress=False
            )
            many = f", {num_proc} processes" if num_proc > 1 else ""
            costs[f"cold{many}"] = measured(prepare, device)
            costs[f"warm{many}"] = measured(prepare, device)
    rows = [
        {
            "stage": stage,
            "audio_seconds_per_second": shapes.seconds / cost.seconds,
            "audio_seconds_per_computing_second": shapes.seconds / max(cost.cpu_seconds, 1e-9),
            "seconds": cost.seconds,
            "peak_gib": cost.peak_bytes / 2**30,
        }
        for stage, cost in costs.items()
    ]
    return finish(args, "prepare", device, rows, audio_seconds=shapes.seconds)


if __name__ == "__main__":
    main()
