"""How the DVAE's codebook learns: nearest vectors with a straight-through gradient, moving averages, revival.

No gradient reaches the codebook. Each vector follows the mean of what falls to it, as in the VQ-VAE paper's appendix
(van den Oord et al. 2017, https://arxiv.org/abs/1711.00937); one that nothing falls to any more is put where encoder
outputs are. The three buffers are the released file's: `embed`, and the two averages it is the quotient of.
"""

# N vectors · K codes · dim length of a vector

from __future__ import annotations

import torch

from tortoise_hf.models.dvae import Codebook

LLOYD_STEPS = 50
"""Most steps of k-means; the codebook moves little after some twenty."""
MAX_DISTANCES = 1 << 24
"""Squared distances held at once: 128 MB of float64."""


def quantize(codebook: Codebook, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes, and their vectors with the gradient of what they stand for.

    Args:
        codebook: K codes.
        vectors: (B, dim, C) encoder outputs.

    Returns:
        (B, C) int64 codes; (B, dim, C) codebook vectors, through which a gradient passes to `vectors` unchanged.
    """
    codes = codebook.nearest(vectors.detach())
    return codes, vectors + (codebook.lookup(codes) - vectors).detach()


def code_statistics(codebook: Codebook, vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """What one step contributes to the averages, as one tensor that processes can add up.

    Args:
        codebook: K codes.
        vectors: (N, dim) encoder outputs.
        codes: (N,) their codes.

    Returns: (dim + 1, K): sums of the vectors of each code and, in the last row, how many there are.
    """
    columns = torch.cat([vectors.detach().float(), torch.ones_like(vectors[:, :1])], dim=1).T
    dim, num_codes = codebook.embed.shape
    return torch.zeros(dim + 1, num_codes, device=vectors.device).index_add_(1, codes, columns)


@torch.no_grad()
def update_averages(codebook: Codebook, statistics: torch.Tensor, decay: float, eps: float = 1e-5) -> None:
    """Move the averages towards a step's statistics and the vectors to the quotient of both.

    Args:
        codebook: changed in place.
        statistics: from `code_statistics`, summed over processes.
        decay: share of the old averages that stays.
        eps: added to every count before dividing, so that a code without vectors stays finite; the counts are scaled
            down by as much as that adds.
    """
    sums, counts = statistics[:-1], statistics[-1]
    codebook.cluster_size.lerp_(counts, 1 - decay)
    codebook.embed_avg.lerp_(sums, 1 - decay)
    total = codebook.cluster_size.sum()
    sizes = (codebook.cluster_size + eps) / (total + len(counts) * eps) * total
    codebook.embed.copy_(codebook.embed_avg / sizes)


@torch.no_grad()
def revive(
    codebook: Codebook, vectors: torch.Tensor, min_share: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Put codes that are hardly used any more onto encoder outputs drawn at random.

    Args:
        codebook: changed in place.
        vectors: (N, dim) encoder outputs.
        min_share: codes whose average count is below this share of the mean count are moved; a moved one starts with
            the mean count, so that it is left alone for a while.
        generator: of the draw, on the CPU.

    Returns: codes that were moved, at most N.
    """
    mean = codebook.cluster_size.mean()
    dead = torch.nonzero(codebook.cluster_size < min_share * mean).squeeze(1)[: len(vectors)]
    if len(dead):
        drawn = torch.randperm(len(vectors), generator=generator)[: len(dead)].to(vectors.device)
        _place(codebook, dead, vectors[drawn].float().T, mean.expand(len(dead)))
    return dead


@torch.no_grad()
def initialize(codebook: Codebook, vectors: torch.Tensor, seed: int) -> torch.Tensor:
    """Fit the codebook to encoder outputs with k-means, commonest code first.

    Args:
        codebook: changed in place.
        vectors: (N, dim), N at least the number of codes.
        seed: of the starting points.

    Returns: (K,) int64, vectors of each code, falling.
    """
    num_codes = codebook.embed.shape[1]
    centres = fit_centres(vectors.cpu(), num_codes, seed)
    counts = torch.bincount(_nearest(vectors.cpu().double(), centres.double()), minlength=num_codes)
    order = counts.argsort(descending=True, stable=True)
    every_code = torch.arange(num_codes, device=codebook.embed.device)
    _place(codebook, every_code, centres[order].T.to(vectors.device), counts[order].to(vectors))
    return counts[order]


def _place(codebook: Codebook, codes: torch.Tensor, columns: torch.Tensor, sizes: torch.Tensor) -> None:
    """Give codes new vectors, (dim, n), and counts."""
    codebook.embed[:, codes] = columns
    codebook.cluster_size[codes] = sizes
    codebook.embed_avg[:, codes] = columns * sizes


def fit_centres(points: torch.Tensor, num_centres: int, seed: int) -> torch.Tensor:
    """k-means: k-means++ starting points, then Lloyd's steps until nothing changes sides.

    Args:
        points: (N, dim), N at least num_centres.
        num_centres: how many centres.
        seed: of the starting points.

    Returns:
        (num_centres, dim) float32. The same points give the same centres.
    """
    points = points.double()
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randint(len(points), (1,), generator=generator)]
    distance = torch.full((len(points),), torch.inf, dtype=points.dtype)
    while len(chosen) < num_centres:
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(dim=1))
        # Fewer different points than centres: the rest of the centres are doubles.
        weights = distance if bool(distance.any()) else torch.ones_like(distance)
        chosen.append(torch.multinomial(weights, 1, generator=generator))
    centres = points[torch.cat(chosen)]
    before = None
    for _ in range(LLOYD_STEPS):
        nearest = _nearest(points, centres)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        counts = torch.bincount(nearest, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres.float()


def _nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    parts = points.split(max(1, MAX_DISTANCES // len(centres)))
    return torch.cat([torch.cdist(part, centres).argmin(dim=1) for part in parts])


def perplexity(counts: torch.Tensor) -> float:
    """How many equally frequent codes would be as hard to guess as these; `counts` (K,)."""
    share = counts[counts > 0].double() / counts.sum()
    return float(torch.exp(-(share * share.log()).sum()))
