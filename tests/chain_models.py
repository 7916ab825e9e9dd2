"""Helpers: the small models of the golden files."""

from __future__ import annotations

import json

from conftest import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import pad


def golden_file(name):
    """Tensors and `config` of a golden file."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        sizes = json.loads(file.metadata()["config"])
    return load_file(path), sizes


def state_of(tensors):
    return {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}


def golden_clvp():
    from tortoise_hf.models.clvp import CLVP, CLVPConfig

    tensors, sizes = golden_file("clvp")
    config = CLVPConfig(
        hidden_size=sizes["dim_text"],
        num_layers=sizes["text_enc_depth"],
        num_heads=sizes["text_heads"],
        num_text_tokens=sizes["num_text_tokens"],
        num_mel_codes=sizes["num_speech_tokens"],
    )
    model = CLVP(config)
    model.load_state_dict(state_of(tensors), strict=True)
    return model.eval(), tensors


def golden_diffusion():
    from tortoise_hf.models.diffusion import DiffusionConfig, DiffusionDecoder

    tensors, sizes = golden_file("diffusion")
    config = DiffusionConfig(
        hidden_size=sizes["model_channels"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        num_mel_bins=sizes["in_channels"],
        latent_size=sizes["in_latent_channels"],
        num_mel_codes=sizes["in_tokens"],
    )
    model = DiffusionDecoder(config)
    model.load_state_dict(state_of(tensors), strict=True)
    return model.eval(), tensors


def golden_vocoder():
    from transformers import UnivNetConfig, UnivNetModel

    from tortoise_hf.models.vocoder import convert_vocoder_weights

    tensors, sizes = golden_file("univnet")
    # transformers builds its kernel predictors as wide as the noise, which is right for the released sizes (64 and 64).
    # The golden model has noise 16 channels wide: further ones that always are 0 change nothing.
    noise_dim = 64
    config = UnivNetConfig(
        model_in_channels=noise_dim,
        model_hidden_channels=sizes["channel_size"],
        num_mel_bins=sizes["n_mel_channels"],
        resblock_stride_sizes=sizes["strides"],
        resblock_dilation_sizes=[sizes["dilations"]] * 3,
        leaky_relu_slope=sizes["lReLU_slope"],
        kernel_predictor_conv_size=sizes["kpnet_conv_size"],
    )
    model = UnivNetModel(config)
    weights = convert_vocoder_weights(state_of(tensors))
    unused = noise_dim - sizes["noise_dim"]
    weights["conv_pre.weight"] = pad(weights["conv_pre.weight"], (0, 0, 0, unused))
    tensors["in.z"] = pad(tensors["in.z"], (0, 0, 0, unused))
    model.load_state_dict(weights, strict=True)
    return model.eval(), tensors
