"""Sizes of the models that are trained: the released ones, the demo's, small ones for a CPU, tiny ones for tests."""

from __future__ import annotations

from tortoise_hf.models.dvae import DVAEConfig
from tortoise_hf.models.gpt import GPTConfig

SIZES = {
    "released": (GPTConfig(), DVAEConfig()),
    "demo": (  # as in examples/demo_base; its DVAE has no part in a step of ours
        GPTConfig(
            num_layers=6,
            hidden_size=256,
            num_heads=4,
            num_text_tokens=256,
            num_mel_codes=512,
            num_conditioning_layers=2,
        ),
        DVAEConfig(hidden_size=64, codebook_dim=64, num_codes=512),
    ),
    "small": (
        GPTConfig(num_layers=6, hidden_size=192, num_heads=3, num_conditioning_layers=2),
        DVAEConfig(hidden_size=64, codebook_dim=64),
    ),
    "tiny": (
        GPTConfig(num_layers=1, hidden_size=32, num_heads=2, num_mel_codes=64, num_conditioning_layers=1),
        DVAEConfig(hidden_size=16, codebook_dim=16, num_codes=64, num_resnet_blocks=1),
    ),
}
"""GPT and DVAE of each."""
