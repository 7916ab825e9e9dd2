"""Make the small base the demo trains from scratch: tokenizer, mel norms, model sizes and a DVAE, all from its voice.

    python scripts/make_demo_base.py --output /tmp/demo_base

The folder has a base's layout, so `model.base: examples/demo_base` with `model.from_scratch: true` needs no download.
The DVAE is a random projection with a fitted codebook: its codes tell sounds apart, but its decoder is untrained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from tortoise_hf.audio import SAMPLES_PER_CODE, LogMel, load_waveform, num_codes
from tortoise_hf.errors import UserError
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.gpt import GPTConfig
from tortoise_hf.text import train_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

VOCAB_SIZE = 128
"""Text ids: frequent words are single ids, and a hundred sentences still show each of them often."""
NUM_CODES = 128
"""Mel codes. The demo voice has about 7 000, so that each is seen some fifty times."""
SEED = 0
LLOYD_STEPS = 50
"""The codebook moves little after some twenty."""
TAIL_SAMPLES = 8192
"""Silence after a clip, more than an encoder output can reach, so that no code sees the end of the waveform."""

GPT_CONFIG = GPTConfig(
    num_layers=4,
    hidden_size=128,
    num_heads=4,
    num_text_tokens=VOCAB_SIZE,
    num_mel_codes=NUM_CODES,
    dropout=0.0,  # 1.4 million parameters on five minutes of speech: the demo is to learn fast, not to generalize
)
DVAE_CONFIG = DVAEConfig(hidden_size=32, codebook_dim=32, num_codes=NUM_CODES, num_resnet_blocks=1)


def read_voice(voice: Path) -> tuple[list[torch.Tensor], list[str]]:
    """Waveforms and all transcripts, both columns, of a folder in LJSpeech's layout.

    Returns:
        Waveforms (S,) at 22 050 Hz, one per row; texts, two per row.

    Raises:
        UserError: if there is no metadata.csv.
    """
    metadata = voice / "metadata.csv"
    if not metadata.is_file():
        raise UserError(f"{metadata} is missing; give the demo voice with --voice, or make it with make_demo_voice.py.")
    rows = [line.split("|") for line in metadata.read_text(encoding="utf-8").splitlines()]
    waveforms = [load_waveform(voice / "wavs" / f"{row[0]}.flac") for row in rows]
    return waveforms, [text for row in rows for text in row[1:]]


def measure_mel_norms(waveforms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean log-mel of every bin over all frames, at most -2.

    The released norms are all negative too: the log-mel is divided by them (nothing is subtracted), which makes quiet
    frames positive. The limit keeps it so for a voice with loud bins, and keeps those from drowning the others.

    Returns:
        (80,) float32, all negative.
    """
    log_mel = LogMel(None)
    frames = torch.cat([log_mel(waveform[None])[0] for waveform in waveforms], dim=1)
    return frames.double().mean(dim=1).clamp(max=-2.0).float()


@torch.no_grad()
def make_dvae(waveforms: Sequence[torch.Tensor], mel_norms: torch.Tensor) -> tuple[DVAE, torch.Tensor]:
    """A DVAE with a random encoder whose codebook is fitted to what that encoder makes of the waveforms.

    Returns:
        The DVAE, codes numbered by falling frequency, and how often each occurs, (NUM_CODES,) int64.
    """
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        dvae = DVAE(DVAE_CONFIG).eval()
    log_mel = LogMel(mel_norms)
    vectors = []
    for waveform in waveforms:
        kept = num_codes(len(waveform))
        padded = torch.nn.functional.pad(waveform, (0, kept * SAMPLES_PER_CODE + TAIL_SAMPLES - len(waveform)))
        vectors.append(dvae.encoder(log_mel(padded[None]))[0, :, :kept].T)
    points = torch.cat(vectors)
    # Scaled so that a typical vector has unit components; silence would otherwise set the scale of everything.
    last = dvae.encoder[-1]
    spread = points.std(dim=0).mean()
    last.weight /= spread
    last.bias /= spread
    points /= spread

    centres = fit_codebook(points, NUM_CODES)
    nearest = dvae.codebook
    nearest.embed.copy_(centres.T)
    counts = torch.bincount(nearest.nearest(points.T[None])[0], minlength=NUM_CODES)
    order = counts.argsort(descending=True, stable=True)
    nearest.embed.copy_(centres[order].T)
    nearest.cluster_size.copy_(counts[order])
    nearest.embed_avg.copy_(nearest.embed * nearest.cluster_size)
    return dvae, counts[order]


def fit_codebook(points: torch.Tensor, num_centres: int) -> torch.Tensor:
    """k-means: k-means++ starting points, then Lloyd's steps.

    Args:
        points: (N, dim), N at least num_centres.
        num_centres: how many centres.

    Returns:
        (num_centres, dim) float32. The same points give the same centres.
    """
    points = points.double()
    generator = torch.Generator().manual_seed(SEED)
    chosen = [torch.randint(len(points), (1,), generator=generator)]
    distance = torch.full((len(points),), torch.inf, dtype=points.dtype)
    while len(chosen) < num_centres:
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(dim=1))
        chosen.append(torch.multinomial(distance, 1, generator=generator))
    centres = points[torch.cat(chosen)]
    for _ in range(LLOYD_STEPS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres.float()


def perplexity(counts: torch.Tensor) -> float:
    """How many equally frequent codes would be as hard to guess as these."""
    share = counts[counts > 0] / counts.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def make_demo_base(voice: Path, output: Path, overwrite: bool = False) -> torch.Tensor:
    """Write config.json, tokenizer.json, mel_norms.safetensors and dvae/.

    Returns:
        How often each code occurs in the voice, (NUM_CODES,) int64.

    Raises:
        UserError: if the voice is missing or too small, or `output` holds something and may not be overwritten.
    """
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise UserError(f"{output} is not empty; name another folder, or add --overwrite to replace the base in it.")
    waveforms, texts = read_voice(voice)
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    available = sum(num_codes(len(waveform)) for waveform in waveforms)
    if tokenizer.vocab_size < VOCAB_SIZE or available < NUM_CODES:
        raise UserError(
            f"{voice} is too small for a base: it gives {tokenizer.vocab_size} text ids and {available} codes; "
            f"{VOCAB_SIZE} and {NUM_CODES} are needed. Use the whole demo voice."
        )
    mel_norms = measure_mel_norms(waveforms)
    dvae, counts = make_dvae(waveforms, mel_norms)

    output.mkdir(parents=True, exist_ok=True)
    GPT_CONFIG.save_pretrained(output)
    tokenizer.save(output / "tokenizer.json")
    save_file({"mel_norms": mel_norms}, output / "mel_norms.safetensors")
    dvae.save_pretrained(output / "dvae")
    return counts


def main(argv: list[str] | None = None) -> None:
    """Read the command line, make the base, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voice", type=Path, default=EXAMPLES / "demo_voice", help="folder in LJSpeech's layout")
    parser.add_argument("--output", type=Path, default=EXAMPLES / "demo_base", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the base in a folder that is not empty")
    args = parser.parse_args(argv)

    counts = make_demo_base(args.voice, args.output, args.overwrite)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(
        f"{args.output}: {size / 1e6:.2f} MB; {int(counts.sum())} codes in the voice, perplexity "
        f"{perplexity(counts):.0f} of {NUM_CODES}, the rarest occurs {int(counts.min())} times"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
