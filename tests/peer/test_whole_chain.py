"""From text, sampled codes and the same noise, tortoise-tts 3.0.0 and this package make the same sound."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import reference_path

from tortoise_hf.generation import clean_codes, num_spoken
from tortoise_hf.latents import VoiceLatents, diffusion_latent, gpt_latent
from tortoise_hf.models.clvp import CLVP, CLVPConfig
from tortoise_hf.models.diffusion import DiffusionConfig, DiffusionDecoder
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.models.random_latents import RandomLatents, RandomLatentsConfig
from tortoise_hf.samplers import DiffusionSettings
from tortoise_hf.speech import Chain, ModelShelf
from tortoise_hf.text import TextTokenizer

from .released import released_vocoder

pytestmark = pytest.mark.timeout(1800)

TEXT = "The kettle is on, Dr. Brown; it cost $3.50 in 1984."
CODES, STEPS, SEED = 40, 6, 5
SIZES = {
    "gpt": {
        "layers": 2,
        "model_dim": 64,
        "heads": 4,
        "max_text_tokens": 402,
        "max_mel_tokens": 604,
        "max_conditioning_inputs": 2,
        "number_text_tokens": 255,
        "start_text_token": 255,
        "number_mel_codes": 258,
        "start_mel_token": 256,
        "stop_mel_token": 257,
    },
    "clvp": {
        "dim_text": 48,
        "dim_speech": 48,
        "dim_latent": 48,
        "num_text_tokens": 256,
        "text_enc_depth": 2,
        "text_seq_len": 350,
        "text_heads": 2,
        "num_speech_tokens": 256,
        "speech_enc_depth": 2,
        "speech_heads": 2,
        "speech_seq_len": 430,
    },
    "diffusion": {
        "model_channels": 48,
        "num_layers": 2,
        "in_channels": 100,
        "out_channels": 200,
        "in_latent_channels": 64,
        "in_tokens": 97,
        "dropout": 0,
        "use_fp16": False,
        "num_heads": 3,
        "layer_drop": 0,
        "unconditioned_percentage": 0,
    },
    "vocoder": {"noise_dim": 64, "channel_size": 4},
    "random": [64, 96],
}


@pytest.fixture(scope="module")
def models():
    """Our models, random, with outputs small enough that the diffusion loop stays off the clamp."""
    from transformers import UnivNetConfig, UnivNetModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt = TortoiseGPT(GPTConfig(num_layers=2, hidden_size=64, num_heads=4, num_mel_codes=256, dropout=0.0))
        for block in gpt.conditioning_encoder.attn:  # fresh ones are zero at their ends and would hide mistakes
            torch.nn.init.normal_(block.proj_out.weight, std=0.05)
        clvp = CLVP(CLVPConfig(hidden_size=48, num_layers=2, num_heads=2, num_mel_codes=256))
        diffusion = DiffusionDecoder(
            DiffusionConfig(hidden_size=48, num_layers=2, num_heads=3, latent_size=64, num_mel_codes=97)
        )
        with torch.no_grad():
            diffusion.out[2].weight *= 0.005
            diffusion.out[2].bias *= 0.005
        vocoder = UnivNetModel(UnivNetConfig(model_hidden_channels=4))
        random = [RandomLatents(RandomLatentsConfig(hidden_size=width)) for width in SIZES["random"]]
    return {"gpt": gpt.eval(), "clvp": clvp.eval(), "diffusion": diffusion.eval(), "vocoder": vocoder.eval()}, random


@pytest.fixture(scope="module")
def codes():
    """Rows as sampling leaves them: some ended, one with a long silence before its end, one that never ended."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 256, (6, CODES), generator=generator)
    rows[:, -1] = 11
    for row, end in ((0, 12), (1, 30), (2, 39), (3, 25)):
        rows[row, end:] = 257
    rows[3, 8:20] = 83
    return rows


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    paths = []
    for index, seconds in enumerate((2.0, 6.0)):  # no longer than what is heard, so that nothing is cut at random
        paths.append(folder / f"{index}.wav")
        time = np.arange(int(22_050 * seconds)) / 22_050
        sound = 0.3 * np.sin(2 * np.pi * 150 * (index + 1) * time) + 0.05 * rng.standard_normal(len(time))
        soundfile.write(paths[-1], sound, 22_050, subtype="PCM_16")
    return paths


def test_the_same_sound(peer, models, codes, clips, tmp_path):
    parts, random = models
    weights = tmp_path / "weights"
    weights.mkdir()
    states = {
        "autoregressive": parts["gpt"].state_dict(),
        "clvp": parts["clvp"].state_dict(),
        "diffusion": parts["diffusion"].state_dict(),
        "vocoder": released_vocoder(parts["vocoder"]),
        "rlg_auto": random[0].state_dict(),
        "rlg_diffusion": random[1].state_dict(),
    }
    for name, state in states.items():
        torch.save(state, weights / f"{name}.pth")
    generator = torch.Generator().manual_seed(2)
    latents = VoiceLatents(torch.randn(1, 64, generator=generator), torch.randn(1, 96, generator=generator))
    theirs, _ = peer.run(
        "whole_chain",
        tmp_path / "run",
        {"codes": codes, "gpt": latents.gpt, "diffusion": latents.diffusion},
        sizes=SIZES,
        weights=str(weights),
        batch_size=3,
        clips=[str(path) for path in clips],
        text=TEXT,
        seed=SEED,
        steps=STEPS,
        guidances=[2.0, 0.0],
    )

    norms = torch.tensor(json.loads(reference_path("mel_norms.json").read_text()))
    heard = gpt_latent(clips, parts["gpt"], norms)
    torch.testing.assert_close(heard, theirs["gpt_latent"], rtol=0, atol=1e-4)
    heard = diffusion_latent(clips, parts["diffusion"])
    torch.testing.assert_close(heard, theirs["diffusion_latent"], rtol=0, atol=1e-3)

    shelf = ModelShelf({name: lambda part=part: part for name, part in parts.items()}, torch.device("cpu"))
    tokenizer = TextTokenizer.from_file(reference_path("tokenizer.json"))
    chain = Chain(shelf, parts["gpt"].config, tokenizer, norms)
    text_ids = chain.text_ids(TEXT)
    cleaned = clean_codes(codes, 257)
    scores = chain.rank(text_ids, cleaned)
    torch.testing.assert_close(scores, theirs["scores"], rtol=0, atol=1e-4)
    best = cleaned[int(scores.argmax())]
    for guidance in (2.0, 0.0):
        noise = torch.Generator().manual_seed(SEED)
        settings = DiffusionSettings(sampler="ancestral", steps=STEPS, guidance=guidance)
        mel = chain.mel(chain.latents(text_ids, best, latents), latents, settings, noise)
        assert mel.shape[2] == num_spoken(best) * 4 * 24_000 // 22_050
        torch.testing.assert_close(mel, theirs[f"mel_{guidance}"], rtol=0, atol=1e-3)
        waveform = chain.waveform(mel, noise)
        torch.testing.assert_close(waveform, theirs[f"waveform_{guidance}"].flatten(), rtol=0, atol=1e-3)
