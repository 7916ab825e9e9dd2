"""A training step as DL-Art-School's fork does it with its example settings, for comparison only.

Every clip is padded to 255,995 samples, whose 250 codes all count, silence included. Audio is decoded, and mel and
codes are computed, at every step; two windows of 2 s of the clip itself condition a row, as two positions. Activations
of the GPT are recomputed in the backward pass, attention is spelled out, and everything is float32 (TF32 on a GPU).

    python benchmarks/reference_step.py --root examples/demo_voice --base examples/demo_base --epochs 3

trains so on a folder, from random weights, without evaluation; it saves the weights at the end.
"""

# B clips · S samples · F mel frames · T text positions · C mel positions · D hidden size

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers.activations import ACT2FN

from tortoise_hf.audio import SAMPLE_RATE, LogMel, load_mel_norms, load_waveform
from tortoise_hf.config import OptimConfig
from tortoise_hf.machine import set_gradient_checkpointing
from tortoise_hf.models.conditioning import ConditioningAttention
from tortoise_hf.models.dropout import Dropout
from tortoise_hf.models.dvae import DVAE
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.optim import clip_gradients, parameter_groups
from tortoise_hf.text import TextTokenizer, clean_training_text

PADDED_SAMPLES = 255_995
PADDED_TEXT_IDS = 200
SHORTEST_SAMPLES = 13_230
CONDITIONING_CLIPS = 2
CONDITIONING_SAMPLES = 44_000
TEXT_WEIGHT, MEL_WEIGHT = 0.01, 1.0
BATCH_SIZE, MICRO_BATCHES = 128, 4
"""Clips of an optimizer step and the micro-batches it is cut into. Source of all: the fork's EXAMPLE_gpt.yml."""


@dataclass
class RawBatch:
    """One micro-batch as the reference's loader hands it over."""

    waveforms: torch.Tensor
    """(B, 255995), zeros behind each clip."""
    conditioning: torch.Tensor
    """(B, 2, 44000) windows of the same clips."""
    text_ids: torch.Tensor
    """(B, 200) int64, zeros behind each text."""
    text_lengths: torch.Tensor
    """(B,) int64."""

    def to(self, device: torch.device) -> RawBatch:
        """The same on another device."""
        return RawBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class RawClips(torch.utils.data.Dataset):
    """Decodes a recording whenever it is asked for."""

    def __init__(self, clips: Sequence[tuple[Path, torch.Tensor]]) -> None:
        """Take recordings with their text ids, (n,) int64 each."""
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        path, text_ids = self.clips[index]
        waveform = load_waveform(path)
        windows = torch.zeros(CONDITIONING_CLIPS, CONDITIONING_SAMPLES)
        for window in windows:
            start = int(torch.randint(max(0, len(waveform) - CONDITIONING_SAMPLES) + 1, ()))
            part = waveform[start : start + CONDITIONING_SAMPLES]
            window[: len(part)] = part
        return F.pad(waveform, (0, PADDED_SAMPLES - len(waveform))), windows, text_ids


def collate(items: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> RawBatch:
    """Stack clips."""
    waveforms, windows, texts = zip(*items, strict=True)
    return RawBatch(
        torch.stack(waveforms),
        torch.stack(windows),
        torch.stack([F.pad(ids, (0, PADDED_TEXT_IDS - len(ids))) for ids in texts]),
        torch.tensor([len(ids) for ids in texts]),
    )


def read_folder(root: Path, tokenizer: TextTokenizer) -> list[tuple[Path, torch.Tensor]]:
    """Clips of an LJSpeech folder that are neither too short nor too long."""
    clips, recordings = [], {path.stem: path for path in (root / "wavs").iterdir()}
    for line in (root / "metadata.csv").read_text(encoding="utf-8").splitlines():
        name, *texts = line.split("|")
        path = recordings[name]
        ids = tokenizer.encode(clean_training_text(texts[-1]), cleaner=str)
        samples = soundfile.info(path).duration * SAMPLE_RATE
        if SHORTEST_SAMPLES <= samples <= PADDED_SAMPLES and 0 < len(ids) <= PADDED_TEXT_IDS:
            clips.append((path, torch.tensor(ids)))
    return clips


def encode_conditioning(gpt: TortoiseGPT, mels: torch.Tensor) -> torch.Tensor:
    """Vectors of clips, (N, 80, F) to (N, D); the residual branch starts from the normalised input."""
    encoder = gpt.conditioning_encoder
    hidden = encoder.init(mels)
    for block in encoder.attn:
        hidden = _attend(block, block.norm(hidden))
    return hidden[:, :, 0]


def _attend(block: ConditioningAttention, normed: torch.Tensor) -> torch.Tensor:
    clips, channels, frames = normed.shape
    heads = block.qkv(normed).view(clips * block.num_heads, 3, channels // block.num_heads, frames)
    query, key, value = heads.unbind(1)
    scale = query.shape[1] ** -0.25
    weights = torch.softmax(torch.einsum("bct,bcs->bts", query * scale, key * scale).float(), dim=-1)
    attended = torch.einsum("bts,bcs->bct", weights.to(value.dtype), value)
    return normed + block.proj_out(attended.reshape(clips, channels, frames))


def losses(
    gpt: TortoiseGPT, text_ids: torch.Tensor, mel_codes: torch.Tensor, mels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and mel loss of a micro-batch: means over all positions, padding included.

    Args:
        gpt: the model.
        text_ids: (B, n), zeros (STOP) behind each text.
        mel_codes: (B, m), all of which count.
        mels: (B, K, 80, F) conditioning clips.
    """
    config = gpt.config
    text, text_targets = _row(text_ids, config.start_text_id, config.stop_text_id)
    mel, mel_targets = _row(mel_codes, config.start_mel_id, config.stop_mel_id)
    conditioning = encode_conditioning(gpt, mels.flatten(0, 1)).view(*mels.shape[:2], -1)
    text_rows = gpt.text_embedding(text) + gpt.text_pos_embedding(text)
    mel_rows = gpt.mel_embedding(mel) + gpt.mel_pos_embedding(mel)
    rows = torch.cat([conditioning, text_rows, mel_rows], dim=1)
    hidden = gpt.gpt(inputs_embeds=rows, use_cache=False).last_hidden_state
    # One position is dropped though there are two conditioning vectors, so text logits are read a position too early.
    hidden = gpt.final_norm(hidden[:, 1:])
    text_logits = gpt.text_head(hidden[:, : text.shape[1]])
    mel_logits = gpt.mel_head(hidden[:, -mel.shape[1] :])
    return (
        F.cross_entropy(text_logits.transpose(1, 2), text_targets),
        F.cross_entropy(mel_logits.transpose(1, 2), mel_targets),
    )


def _row(ids: torch.Tensor, start_id: int, stop_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs START ids STOP, targets ids STOP STOP."""
    stopped = F.pad(ids, (0, 1), value=stop_id)
    return F.pad(stopped, (1, 0), value=start_id), F.pad(stopped, (0, 1), value=stop_id)


def build_optimizer(gpt: TortoiseGPT) -> torch.optim.AdamW:
    """AdamW with the example's settings, PyTorch's default kernels."""
    optim = OptimConfig()
    groups = parameter_groups(gpt, optim.weight_decay)
    groups = [{name: group[name] for name in ("params", "weight_decay")} for group in groups]
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=optim.eps)


class ReferenceStep:
    """Gradients of micro-batches, and the move of the weights."""

    def __init__(
        self,
        gpt: TortoiseGPT,
        dvae: DVAE,
        mel_norms: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        """Set the models up; the GPT's weights are those that move."""
        self.gpt, self.dvae, self.optimizer, self.device = gpt.train(), dvae.to(device).eval(), optimizer, device
        self.log_mel = LogMel(mel_norms).to(device)

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """Have the GPT compute as the reference does: attention and activation in single steps, activations recomputed.

        The conditioning encoder's aren't recomputed. Dropout is torch's.
        """
        activation, implementation = self.gpt.gpt.h[0].mlp.act, self.gpt.config._attn_implementation
        try:
            self._set(ACT2FN["gelu_new"], "eager", nn.Dropout)
            set_gradient_checkpointing(self.gpt.gpt, True)
            yield
        finally:
            self._set(activation, implementation, Dropout)
            set_gradient_checkpointing(self.gpt, False)

    def _set(self, activation: nn.Module, implementation: str, dropout: type[nn.Dropout]) -> None:
        set_gradient_checkpointing(self.gpt, False)
        self.gpt.set_attn_implementation(implementation)
        p = self.gpt.config.dropout
        self.gpt.gpt.drop = dropout(p)
        for block in self.gpt.gpt.h:
            block.mlp.act, block.mlp.dropout, block.attn.resid_dropout = activation, dropout(p), dropout(p)
        self.gpt.train(self.gpt.training)

    def micro_batch(self, batch: RawBatch, num_micro_batches: int = 1) -> torch.Tensor:
        """Add one micro-batch's gradients; its loss, still on the device. Only `in_charge`."""
        batch = batch.to(self.device)
        with torch.no_grad():
            codes = self.dvae.codebook.nearest(self.dvae.encoder(self.log_mel(batch.waveforms)))
            mels = self.log_mel(batch.conditioning.flatten(0, 1)).unflatten(0, batch.conditioning.shape[:2])
        text_ids = batch.text_ids[:, : int(batch.text_lengths.max())]
        text_loss, mel_loss = losses(self.gpt, text_ids, codes, mels)
        loss = TEXT_WEIGHT * text_loss + MEL_WEIGHT * mel_loss
        (loss / num_micro_batches).backward()
        return loss.detach()

    def update(self) -> None:
        """Clip the gradients, move the weights."""
        clip_gradients(self.optimizer, OptimConfig().max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def set_precision() -> None:
    """TF32 wherever the device has it, as the reference sets it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def train(
    step: ReferenceStep,
    clips: RawClips,
    epochs: int,
    batch_size: int,
    micro_batches: int,
    num_workers: int = 0,
) -> int:
    """Train for some epochs; the last partial batch of each is dropped, as the reference does.

    Returns: optimizer steps made.
    """
    loader = torch.utils.data.DataLoader(
        clips, batch_size, shuffle=True, drop_last=True, num_workers=num_workers, collate_fn=list
    )
    steps = 0
    with step.in_charge():
        for items in (items for _ in range(epochs) for items in loader):
            for part in _chunks(items, micro_batches):
                step.micro_batch(collate(part), micro_batches)
            step.update()
            steps += 1
    return steps


def _chunks(items: list, count: int) -> Iterator[list]:
    size = -(-len(items) // count)
    return (items[start : start + size] for start in range(0, len(items), size))


def main(argv: list[str] | None = None) -> int:
    """Train on a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="folder with config.json, tokenizer, norms and dvae/")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE)
    parser.add_argument("--micro_batches", type=int, default=MICRO_BATCHES)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="file of the trained weights (.safetensors)")
    args = parser.parse_args(argv)
    set_precision()
    torch.manual_seed(0)
    gpt = TortoiseGPT(GPTConfig.from_pretrained(args.base)).to(args.device)
    dvae = DVAE.from_pretrained(args.base / "dvae", dtype=torch.float32)
    norms = load_mel_norms(args.base / "mel_norms.safetensors")
    step = ReferenceStep(gpt, dvae, norms, build_optimizer(gpt), torch.device(args.device))
    clips = RawClips(read_folder(args.root, TextTokenizer.from_file(args.base / "tokenizer.json")))
    steps = train(step, clips, args.epochs, args.batch_size, args.micro_batches, args.num_workers)
    if args.output is not None:
        save_file(step.gpt.state_dict(), args.output)
    print(f"{steps} steps over {len(clips)} clips.")
    return steps


if __name__ == "__main__":
    main()
