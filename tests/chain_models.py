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


def make_tiny_chain(folder):
    """Every model of the chain, small and random, as `weights_dir` takes them; `make_tiny_voice` fits."""
    import torch
    from transformers import UnivNetConfig, UnivNetModel

    from tortoise_hf.models.clvp import CLVP, CLVPConfig
    from tortoise_hf.models.diffusion import DiffusionConfig, DiffusionDecoder
    from tortoise_hf.models.random_latents import RandomLatents, RandomLatentsConfig

    with torch.random.fork_rng():
        torch.manual_seed(1)
        models = {
            "clvp": CLVP(CLVPConfig(hidden_size=32, num_layers=1, num_heads=1, num_mel_codes=256)),
            "diffusion": DiffusionDecoder(DiffusionConfig(hidden_size=32, num_layers=1, num_heads=2, latent_size=32)),
            "vocoder": UnivNetModel(
                UnivNetConfig(model_in_channels=8, model_hidden_channels=4, kernel_predictor_hidden_channels=8)
            ),
            "random_gpt": RandomLatents(RandomLatentsConfig(hidden_size=32)),
            "random_diffusion": RandomLatents(RandomLatentsConfig(hidden_size=64)),
        }
        for name, model in models.items():
            model.save_pretrained(folder / name)
    return folder


def make_tiny_voice(folder, tokenizer_texts):
    """An export's folder around a random GPT that stops after some dozen codes."""
    import torch
    from safetensors.torch import save_file

    from tortoise_hf.models.dvae import DVAE, DVAEConfig
    from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
    from tortoise_hf.text import train_tokenizer

    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(tokenizer_texts, 60)
    tokenizer.save(folder / "tokenizer.json")
    config = GPTConfig(
        num_layers=1,
        hidden_size=32,
        num_heads=2,
        num_text_tokens=tokenizer.vocab_size,
        num_mel_codes=256,
        num_conditioning_layers=1,
        dropout=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        gpt = TortoiseGPT(config)
        with torch.no_grad():
            gpt.mel_head.bias[config.stop_mel_id] += 1.0
        gpt.save_pretrained(folder)
        dvae = DVAE(DVAEConfig(hidden_size=16, codebook_dim=8, num_codes=256, num_resnet_blocks=1))
        dvae.save_pretrained(folder / "dvae")
    save_file({"mel_norms": torch.full((80,), -4.0)}, folder / "mel_norms.safetensors")
    return folder
