"""Latents of voices nobody has: noise to what a conditioning encoder might have said of some speaker.

Key names and constants are those of the released ``rlg_auto.pth`` and ``rlg_diffuser.pth``.
"""

# B batch · D width of the latent

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init


class RandomLatentsConfig(PreTrainedConfig):
    """Sizes of a generator.

    Args:
        hidden_size: width D; 1,024 for the GPT's latent, 2,048 for the diffusion model's.
        num_layers: scaled layers before the last, plain one.
        learning_rate_factor: what the scaled layers' weights and biases are multiplied by. Source: StyleGAN2's mapping
            network, whose layers these are.
    """

    model_type = "tortoise_random_latents"

    hidden_size: int = 1024
    num_layers: int = 5
    learning_rate_factor: float = 0.1


class ScaledLinear(nn.Module):
    """Linear layer with small effective weights, then a leaky ReLU that keeps the variance."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.randn(width, width) / factor)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, D) to the same."""
        scale = self.factor * self.weight.shape[1] ** -0.5
        hidden = nn.functional.linear(hidden, self.weight * scale, self.bias * self.factor)
        return nn.functional.leaky_relu(hidden, 0.2) * 2**0.5


class RandomLatents(PreTrainedModel):
    """Noise to latents."""

    config_class = RandomLatentsConfig
    base_model_prefix = ""
    main_input_name = "noise"

    def __init__(self, config: RandomLatentsConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        layers: list[nn.Module] = [ScaledLinear(width, config.learning_rate_factor) for _ in range(config.num_layers)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, width))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScaledLinear):
            init.normal_(module.weight, std=1 / module.factor)
            init.zeros_(module.bias)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """(B, D) standard normal noise to (B, D) latents."""
        return self.layers(noise)
