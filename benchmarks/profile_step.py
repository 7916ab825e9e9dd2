"""Where the time of a training step goes: one micro-batch, forward, backward and the move of the weights, by operation.

    OMP_NUM_THREADS=1 python benchmarks/profile_step.py --size released --micro_batch_size 4 --repeats 1

torch's profiler counts each operation's own time, without those it calls: on a CPU the clock's, on a GPU the device's.
The micro-batch is that of packing.py. What is listed under `the rest` took less than `--least` of the time each.
"""

from __future__ import annotations

import argparse

import torch
from measuring import add_common_arguments, finish, wait_for
from packing import packed_loss, typical_batch
from sizes import SIZES
from torch.profiler import ProfilerActivity, profile

from tortoise_hf.config import OptimConfig
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.optim import build_optimizer


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, and give the numbers back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--micro_batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="steps that are measured")
    parser.add_argument("--least", type=float, default=0.01, help="share of the time from which an operation is named")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    device, config = torch.device(args.device), SIZES[args.size][0]
    torch.manual_seed(0)
    model = TortoiseGPT(config).to(device).train()
    optimizer = build_optimizer(model, OptimConfig())
    batch = typical_batch(config, args.micro_batch_size)[0].to(device)

    def step() -> None:
        text, mel = packed_loss(model, batch)
        (0.01 * text / batch.num_text_targets + mel / batch.num_mel_targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        wait_for(device)

    step()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu], acc_events=True) as record:
        for _ in range(args.repeats):
            step()
    own = {
        event.key: ((event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6, event.count)
        for event in record.key_averages()
    }
    total = sum(seconds for seconds, _ in own.values())
    named = {key: cost for key, cost in own.items() if cost[0] >= args.least * total}
    others = [own[key] for key in own.keys() - named.keys()]
    named["the rest"] = (sum(seconds for seconds, _ in others), sum(calls for _, calls in others))
    rows = [
        {"operation": key, "share": seconds / total, "seconds_per_step": seconds / args.repeats,
         "calls_per_step": calls / args.repeats}
        for key, (seconds, calls) in sorted(named.items(), key=lambda item: -item[1][0])
    ]  # fmt: skip
    return finish(args, "profile_step", device, rows, seconds_per_step=total / args.repeats)


if __name__ == "__main__":
    main()
