"""Tasks for driver.py, inside the peer's environment: tortoise-tts's own `tts` with our weights."""

import itertools
import random
from pathlib import Path

import torch
from cost import measured, peak_gib


def build(task):
    """The peer's TextToSpeech as its constructor builds it, but with the sizes and weights of the task."""
    from tortoise.api import TextToSpeech
    from tortoise.models.autoregressive import UnifiedVoice
    from tortoise.models.clvp import CLVP
    from tortoise.models.diffusion_decoder import DiffusionTts
    from tortoise.models.random_latent_generator import RandomLatentConverter
    from tortoise.models.vocoder import UnivNetGenerator
    from tortoise.utils.tokenizer import VoiceBpeTokenizer

    sizes, weights = task["sizes"], Path(task["weights"])
    tts = TextToSpeech.__new__(TextToSpeech)
    tts.device, tts.half, tts.enable_redaction, tts.cvvp = torch.device("cpu"), False, False, None
    tts.autoregressive_batch_size = task["batch_size"]
    tts.tokenizer = VoiceBpeTokenizer()
    tts.autoregressive = UnifiedVoice(**sizes["gpt"], checkpointing=False, train_solo_embeddings=False).eval()
    tts.clvp = CLVP(**sizes["clvp"], use_xformers=True).eval()
    tts.diffusion = DiffusionTts(**sizes["diffusion"]).eval()
    tts.vocoder = UnivNetGenerator(**sizes["vocoder"])
    tts.rlg_auto, tts.rlg_diffusion = (RandomLatentConverter(width).eval() for width in sizes["random"])
    for name in ("autoregressive", "clvp", "diffusion", "vocoder", "rlg_auto", "rlg_diffusion"):
        getattr(tts, name).load_state_dict(torch.load(weights / f"{name}.pth", weights_only=True), strict=True)
    tts.vocoder.eval(inference=True)
    tts.autoregressive.post_init_gpt2_config(kv_cache=False)
    return tts


def construct(task):
    """The peer's TextToSpeech by its own constructor, which knows the released sizes only, with weights of a folder."""
    import tortoise.api as api

    api.get_model_path = lambda name, models_dir=None: str(Path(task["weights"]) / name)
    options = {name: task[name] for name in ("autoregressive_batch_size", "kv_cache") if name in task}
    return api.TextToSpeech(enable_redaction=False, **options)  # redaction takes a model of its own


def measure(task, folder, inputs):
    """What it costs to construct it and to say a text, without finding out how the voice sounds."""
    latents = torch.load(Path(task["weights"]) / "latents.pth", weights_only=True)
    tts, loading = measured(lambda: construct(task))
    waveform, speaking = measured(
        lambda: tts.tts(
            task["text"],
            conditioning_latents=latents,
            verbose=False,
            use_deterministic_seed=0,
            num_autoregressive_samples=task["samples"],
            max_mel_tokens=task["codes"],
            diffusion_iterations=task["steps"],
        )
    )
    return {}, {
        "loading": loading,
        "speaking": speaking,
        "peak_gib": peak_gib(),
        "audio_seconds": waveform.shape[-1] / 24_000,
    }


def whole_chain(task, folder, inputs):
    """Latents of recordings, and the waveform of a text, given the codes and the noise that chance would bring."""
    import tortoise.api as api
    from tortoise.utils.audio import load_audio

    tts = build(task) if "sizes" in task else construct(task)
    outputs = {}
    random.seed(0)
    clips = [load_audio(path, 22050) for path in task["clips"]]
    if clips:
        outputs["gpt_latent"], outputs["diffusion_latent"] = tts.get_conditioning_latents(clips)

    batches = itertools.cycle(inputs["codes"].split(tts.autoregressive_batch_size))
    tts.autoregressive.inference_speech = lambda *args, **kwargs: next(batches).clone()
    scores, mels = [], []
    clvp, to_mel, randn_like = tts.clvp.forward, api.do_spectrogram_diffusion, torch.randn_like

    def score(*args, **kwargs):
        scores.append(clvp(*args, **kwargs))
        return scores[-1]

    def seeded(*args, **kwargs):
        torch.manual_seed(task["seed"])
        drawn = []

        def without_the_unused_last(like):
            drawn.append(1)
            return torch.zeros_like(like) if len(drawn) == task["steps"] else randn_like(like)

        torch.randn_like = without_the_unused_last
        try:
            mels.append(to_mel(*args, **kwargs))
        finally:
            torch.randn_like = randn_like
        return mels[-1]

    tts.clvp.forward, api.do_spectrogram_diffusion = score, seeded
    for guidance in task["guidances"]:
        scores.clear()
        outputs[f"waveform_{guidance}"] = tts.tts(
            task["text"],
            conditioning_latents=(inputs["gpt"], inputs["diffusion"]),
            verbose=False,
            num_autoregressive_samples=len(inputs["codes"]),
            max_mel_tokens=inputs["codes"].shape[1],
            diffusion_iterations=task["steps"],
            cond_free=guidance > 0,
            cond_free_k=guidance,
        )
        outputs["scores"], outputs[f"mel_{guidance}"] = torch.cat(scores), mels[-1]
    return outputs, {}
