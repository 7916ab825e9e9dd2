"""How well a DVAE's codes keep what is in a clip, and the folder a trained DVAE is left in.

Codes are computed as preparation computes them and decoded as a preview decodes them.
"""

from __future__ import annotations

import re
from pathlib import Path

import soundfile
import torch

from tortoise_hf.audio import SAMPLE_RATE
from tortoise_hf.codebook import perplexity
from tortoise_hf.data.mels import ClipMels
from tortoise_hf.models.dvae import DVAE
from tortoise_hf.speech import griffin_lim

AUDIBLE = -6.0
"""Log-mel at which a mistake counts half: some 50 dB below a loud vowel, where little of it is heard."""
LEAST_WEIGHT = 0.1
"""What a mistake counts in silence. Not nothing, or the decoder would be free to hum there."""
SQUARE_WEIGHT = 0.25
"""Weight of squared errors beside absolute ones: gross mistakes count more than many fine ones."""


def reconstruction_loss(log_mel: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute plus squared error in nats, weighted by how audible the target is; (B, 80, F) each to (B, F)."""
    error = log_mel - target
    weight = LEAST_WEIGHT + (1 - LEAST_WEIGHT) * torch.sigmoid(target - AUDIBLE)
    return (weight * (error.abs() + SQUARE_WEIGHT * error.square())).mean(dim=1)


def reconstruct(dvae: DVAE, mel_norms: torch.Tensor, mels: ClipMels, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a clip and the log-mel they stand for.

    Args:
        dvae: on the device that computes.
        mel_norms: (80,) divisors, on the same.
        mels: of the clips.
        index: of the clip, which gets C codes.

    Returns: (C,) int64 codes; (80, 4 C) log-mel, not normalised.
    """
    norms = mel_norms[:, None]
    count = int(mels.num_codes[index])
    heard = mels.cut(index, 0, count + dvae.config.reach).to(norms)
    codes = dvae.encode((heard / norms)[None])[:, :count]
    return codes[0], dvae.decode(codes)[0] * norms


@torch.no_grad()
def evaluate_dvae(
    dvae: DVAE, mel_norms: torch.Tensor, mels: ClipMels, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Figures over all frames of the clips.

    Returns: by name
        loss: what training lowers, see `reconstruction_loss`.
        l1: mean absolute error of the normalised mel.
        explained: share of the log-mel's variance, around each bin's mean, that is in the reconstruction.
        perplexity: how many equally frequent codes would be as hard to guess as the clips' codes.
        codes_used: codes that occur.
    """
    norms = mel_norms.to(device)
    counts = torch.zeros(dvae.config.num_codes, dtype=torch.int64)
    # In float64: sums over hours of speech.
    loss = absolute = squared = torch.zeros((), dtype=torch.float64)
    bin_sum, bin_squares, frames = torch.zeros(80, dtype=torch.float64), torch.zeros(80, dtype=torch.float64), 0
    for index in range(len(mels)):
        codes, log_mel = reconstruct(dvae, norms, mels, index)
        target = mels.cut(index, 0, len(codes)).to(device)
        error = (log_mel - target).double().cpu()
        counts += torch.bincount(codes.cpu(), minlength=len(counts))
        loss = loss + reconstruction_loss(log_mel[None], target[None]).double().sum().cpu()
        absolute = absolute + (error / mel_norms.double().cpu()[:, None]).abs().sum()
        squared = squared + error.square().sum()
        target = target.double().cpu()
        bin_sum, bin_squares = bin_sum + target.sum(dim=1), bin_squares + target.square().sum(dim=1)
        frames += target.shape[1]
    variance = (bin_squares - bin_sum.square() / frames).sum()
    return {
        "loss": float(loss / frames),
        "l1": float(absolute / (frames * len(mel_norms))),
        "explained": float(1 - squared / variance),
        "perplexity": perplexity(counts),
        "codes_used": int((counts > 0).sum()),
    }


@torch.no_grad()
def round_to_half(dvae: DVAE) -> None:
    """Give every weight its nearest float16 value, in place; they stay float32.

    The codebook's averages become shares of 1 first: as counts they may be beyond float16's range.
    """
    total = dvae.codebook.cluster_size.sum().clamp(min=1e-12)
    dvae.codebook.cluster_size.div_(total)
    dvae.codebook.embed_avg.div_(total)
    for tensor in dvae.state_dict().values():
        tensor.copy_(tensor.half())


def save_dvae(dvae: DVAE, folder: Path, half: bool) -> None:
    """Write config.json and model.safetensors; with `half`, of weights that `round_to_half` has rounded, in float16."""
    weights = dvae.state_dict()
    if half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
    dvae.save_pretrained(folder, state_dict=weights)


def save_samples(dvae: DVAE, mel_norms: torch.Tensor, mels: ClipMels, folder: Path, num_samples: int) -> None:
    """Let some clips be heard: NAME-mel.wav from the clip's mel spectrogram, NAME-codes.wav from its codes.

    Both go through Griffin-Lim, so what differs between them is what the codes lose.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index in torch.linspace(0, len(mels) - 1, min(num_samples, len(mels))).round().int().tolist():
        codes, log_mel = reconstruct(dvae, mel_norms, mels, index)
        name = re.sub(r"[^\w.-]+", "_", mels.clip_ids[index])
        for kind, mel in (("mel", mels.cut(index, 0, len(codes))), ("codes", log_mel)):
            soundfile.write(folder / f"{name}-{kind}.wav", griffin_lim(mel).numpy(), SAMPLE_RATE)
