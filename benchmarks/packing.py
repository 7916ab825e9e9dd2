"""Forward and backward pass over packed rows, beside the same rows padded: processor time, memory, and the losses.

    OMP_NUM_THREADS=1 python benchmarks/packing.py --size demo --micro_batch_size 16 --repeats 8

The padded way is what training did before: rows as long as the longest, heads asked at every position, all logits in
memory at once, in float32. Nothing is dropped: draws cost differently where rows are packed. Clips have LJSpeech's
lengths; the micro-batch is the middle one of an epoch's plan by length, and its rows share one conditioning.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import numpy as np
import synthetic
import torch
import torch.nn.functional as F
from measuring import add_common_arguments, alternate, finish, medians
from sizes import SIZES
from torch.nn.utils.rnn import pad_sequence

from tortoise_hf.audio import num_codes
from tortoise_hf.data.collate import IGNORE_INDEX, Batch, Collator, Example
from tortoise_hf.data.sampler import StepSampler, count_positions
from tortoise_hf.loss import gpt_loss
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT

CONDITIONING_FRAMES = 517


def packed_loss(model: TortoiseGPT, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of text and mel loss as training takes them."""
    sums = gpt_loss(model, batch)
    return sums.text, sums.mel


def padded_loss(model: TortoiseGPT, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The same over padded rows."""
    latents = model.encode_conditioning(batch.conditioning_mel)
    text = model.text_embedding(batch.text_inputs) + model.text_pos_embedding(batch.text_inputs)
    mel = model.mel_embedding(batch.mel_inputs) + model.mel_pos_embedding(batch.mel_inputs)
    sizes = list(zip(batch.text_lengths.tolist(), batch.mel_lengths.tolist(), strict=True))
    rows = [torch.cat([latents[:1], text[row, :t], mel[row, :m]]) for row, (t, m) in enumerate(sizes)]
    hidden = model.gpt(inputs_embeds=pad_sequence(rows, batch_first=True), use_cache=False).last_hidden_state
    hidden = model.final_norm(hidden)
    text_states = pad_sequence([hidden[row, 1 : 1 + t] for row, (t, _) in enumerate(sizes)], batch_first=True)
    mel_states = pad_sequence([hidden[row, 1 + t : 1 + t + m] for row, (t, m) in enumerate(sizes)], batch_first=True)
    return (
        F.cross_entropy(model.text_head(text_states).flatten(0, 1).float(), batch.text_targets.flatten(),
                        ignore_index=IGNORE_INDEX, reduction="sum"),
        F.cross_entropy(model.mel_head(mel_states).flatten(0, 1).float(), batch.mel_targets.flatten(),
                        ignore_index=IGNORE_INDEX, reduction="sum"),
    )  # fmt: skip


def typical_batch(config: GPTConfig, size: int) -> tuple[Batch, float]:
    """The middle micro-batch of an epoch's plan, of random ids, and the share that padding would be of it."""
    shapes, rng = synthetic.ljspeech_shapes(max(1024, 2 * size)), np.random.default_rng(0)
    codes = [num_codes(int(samples)) for samples in shapes.num_samples]
    lengths = count_positions(shapes.num_text_ids, codes)
    plan = [one for step in StepSampler(lengths, max(128, size), size).steps(0) for one in step if len(one) == size]
    plan.sort(key=lambda one: sum(lengths[draw.index] for draw in one))
    chosen = [draw.index for draw in plan[len(plan) // 2]]
    conditioning_mel = rng.standard_normal((2, config.num_mel_bins, CONDITIONING_FRAMES), dtype=np.float32)
    examples = [
        Example(
            text_ids=rng.integers(2, config.num_text_tokens, int(shapes.num_text_ids[index])),
            mel_codes=rng.integers(0, config.num_mel_codes, codes[index]),
            conditioning_mel=conditioning_mel, index=index, conditioning_of=0,
        )
        for index in chosen
    ]  # fmt: skip
    share = 1 - lengths[chosen].sum() / (lengths[chosen].max() * size)
    return Collator.for_model(config)(examples), float(share)


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, and give the numbers back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--micro_batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=8, help="turns of each that are measured")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    device, config = torch.device(args.device), copy.deepcopy(SIZES[args.size][0])
    config.dropout = 0.0
    torch.manual_seed(0)
    model = TortoiseGPT(config).to(device).train()
    batch, share = typical_batch(config, args.micro_batch_size)
    batch = batch.to(device)
    losses: dict[str, float] = {}

    def turn(name: str, loss: Callable) -> Callable[[], None]:
        def work() -> None:
            text, mel = loss(model, batch)
            (0.01 * text / batch.num_text_targets + mel / batch.num_mel_targets).backward()
            model.zero_grad(set_to_none=False)
            losses[name] = float(mel.detach()) / batch.num_mel_targets

        return work

    variants = {"padded": turn("padded", padded_loss), "packed": turn("packed", packed_loss)}
    costs = alternate(variants, args.repeats, device)
    positions = {"padded": round(batch.packing.num_positions / (1 - share)), "packed": batch.packing.num_positions}
    rows = [
        {
            "variant": name,
            "positions": positions[name],
            "padding_share": 1 - batch.packing.num_positions / positions[name],
            "computing_seconds": medians(each).cpu_seconds,
            "peak_gib": medians(each).peak_bytes / 2**30,
            "mel_loss_in_training": losses[name],
        }
        for name, each in costs.items()
    ]
    turns = {name: [cost.cpu_seconds for cost in each] for name, each in costs.items()}
    ratios = sorted(one / other for one, other in zip(turns["padded"], turns["packed"], strict=True))
    return finish(args, "packing", device, rows, padded_over_packed=ratios[len(ratios) // 2], turns=turns)


if __name__ == "__main__":
    main()
