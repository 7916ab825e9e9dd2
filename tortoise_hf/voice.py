"""A voice that speaks: `Voice.from_pretrained("folder").speak("Hello.").save("hello.wav")`.

A voice is a GPT with its tokenizer (an export folder of this package, a user's repository on the Hub, or a weights file
in the published layout) and the latents of a speaker: stored beside the GPT, made from recordings, or random.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tortoise_hf.audio import SAMPLE_RATE, SAMPLE_RATE_24K
from tortoise_hf.config import ModelConfig
from tortoise_hf.errors import UserError
from tortoise_hf.latents import (
    VoiceLatents,
    diffusion_latent,
    find_clips,
    save_latents,
)
from tortoise_hf.models.chain import find_parts, load_part, part_config
from tortoise_hf.models.pretrained import (
    RELEASED_BASE,
    load_dvae,
    load_gpt,
    load_mel_norms,
    load_tokenizer,
    resolve_base,
)
from tortoise_hf.presets import Preset, choose_preset
from tortoise_hf.sentences import Piece, split_text
from tortoise_hf.sound import Speech, join_speech, pause_behind
from tortoise_hf.speaker import locate_voice, speaker_latents, stored_speaker
from tortoise_hf.speech import Chain, ModelShelf, Progress
from tortoise_hf.text import clean_text

SPEAKING_PARTS = ("clvp", "diffusion", "vocoder")


class Voice:
    """A GPT, a speaker's latents and the chain that makes them heard."""

    def __init__(self, chain: Chain, latents: VoiceLatents) -> None:
        """Put a voice together; `from_pretrained` does it from files.

        Args:
            chain: the models.
            latents: of the speaker.
        """
        self.chain, self.latents = chain, latents

    @classmethod
    def from_pretrained(
        cls,
        voice: str | Path = RELEASED_BASE,
        *,
        revision: str | None = None,
        clips: str | Path | Sequence[str | Path] | None = None,
        latents: str | Path | Sequence[str | Path] | None = None,
        random: int | None = None,
        weights_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        low_memory: bool = False,
        preview: bool = False,
    ) -> Voice:
        """Find a voice's files and get ready; models are loaded when they are first needed.

        Args:
            voice: an export's folder, a run's folder, a repository on the Hub (`user/name`), a `.pth` or
                `.safetensors` file in the published layout, or "released" for TorToiSe's own GPT.
            revision: branch, tag or commit of a voice on the Hub; None takes the newest.
            clips: recordings of the speaker, or folders of them.
            latents: files from scripts/voice.py or tortoise-tts; of several the mean is taken.
            random: seed of a voice nobody has. Without these three the voice's own latents are used.
            weights_dir: folder to look for released files in, before the Hub's cache and the Hub.
            device: "cpu", "cuda", ...; None takes a GPU if there is one.
            dtype: precision of the larger models; None is bfloat16 on a GPU that has it, else float32.
            low_memory: keep one model at a time, and none on the device between stages.
            preview: only previews are to be heard, so nothing behind the GPT is looked for.

        Raises: UserError: if a file is missing, damaged or doesn't fit.
        """
        device = choose_device(device)
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
        source = locate_voice(voice, revision)
        cfg = ModelConfig(base=str(source), weights_dir=None if weights_dir is None else str(weights_dir))
        try:
            files = resolve_base(cfg, dvae=False)
        except UserError as error:  # said to somebody who trains
            raise UserError(
                str(error).replace("model.weights_dir", "weights_dir").replace("model.base", "voice")
            ) from None
        wanted = [] if preview else list(SPEAKING_PARTS)
        if random is not None:
            wanted += ["random_gpt"] if preview else ["random_gpt", "random_diffusion"]
        folder = source if isinstance(source, Path) and source.is_dir() else None
        beside: Path | None = None
        if not clips and not latents and random is None:
            latents, beside = stored_speaker(folder, voice)
            clips = beside if latents is None else None
        parts = find_parts(wanted, weights_dir)

        loaders: dict[str, Callable[[], torch.nn.Module]] = {
            "gpt": lambda: load_gpt(files, keep_mapped=True),
            "dvae": lambda: load_dvae(resolve_base(cfg)),
        }
        for name, path in parts.items():
            loaders[name] = lambda name=name, path=path: load_part(name, path)
        shelf = ModelShelf(loaders, device, dtype, low_memory)
        with shelf.use("gpt") as gpt:
            chain = Chain(shelf, gpt.config, load_tokenizer(files), load_mel_norms(files))
        if not preview:
            chain.num_mel_codes = part_config("clvp", parts["clvp"]).num_mel_codes
            chain.latent_size = part_config("diffusion", parts["diffusion"]).latent_size
        speaker = speaker_latents(shelf, chain.mel_norms, clips, latents, random, preview)
        if speaker.diffusion is None and not preview and beside is not None:
            # Where the latents were stored, the diffusion model wasn't at hand.
            with shelf.use("diffusion") as diffusion:
                speaker = VoiceLatents(speaker.gpt, diffusion_latent(find_clips(beside), diffusion))
        width = chain.gpt_config.hidden_size
        if speaker.gpt.shape[1] != width:
            raise UserError(
                f"The speaker's latents are {speaker.gpt.shape[1]:,} wide, the GPT {width:,}; they belong to another "
                f"model. Make them again from recordings with scripts/voice.py."
            )
        return cls(chain, speaker)

    def save_latents(self, path: str | Path) -> None:
        """Store the speaker for later, or as `.pth` for tortoise-tts."""
        save_latents(self.latents, path)

    def speak(
        self,
        text: str | Sequence[str],
        *,
        preset: str | Preset = "fast",
        seed: int = 0,
        preview: bool = False,
        num_results: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Any:
        """Say a text of any length, or each of several.

        Args:
            text: what to say. Several texts are one batch: their samples are drawn together, and where memory is short,
                models are loaded once for all.
            preset: one of `speech.PRESETS`.
            seed: the same seed says it the same way.
            preview: make a rough sound of it without the chain's large models.
            num_results: so many ways to say it, the best first, out of the preset's samples; None for the best alone.
            progress: told of finished samples and diffusion steps.
            options: `num_samples`, `steps`, `sampler`, `temperature`, `max_codes` in place of the preset's.

        Returns: a `Speech`, or with `num_results` a list of so many; for several texts a list of those.
        Raises: UserError: if there is nothing to say, or the preset or an option isn't known or makes no sense.
        """
        texts = [text] if isinstance(text, str) else list(text)
        chosen = preset if isinstance(preset, Preset) else choose_preset(preset, **options)
        pieces = [self.pieces(each) for each in texts]
        count = _check_results(num_results, chosen, preview)
        spoken = iter(self._say([piece for group in pieces for piece in group], chosen, seed, preview, progress, count))
        results = []
        for group, each in zip(pieces, texts, strict=True):
            ways = zip(*(next(spoken) for _ in group), strict=True)
            results.append([join_speech(way, group, each) for way in ways])
        if num_results is None:
            results = [ways[0] for ways in results]
        return results[0] if isinstance(text, str) else results

    def stream(
        self,
        text: str,
        *,
        preset: str | Preset = "fast",
        seed: int = 0,
        preview: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[Speech]:
        """Say a text piece by piece, each with its pause behind it; played one after the other they are `speak`'s.

        Args and errors are those of `speak`; they are checked before the first piece.
        """
        chosen = preset if isinstance(preset, Preset) else choose_preset(preset, **options)
        pieces = self.pieces(text)
        return self._stream(pieces, chosen, seed, preview, progress)

    def _stream(
        self, pieces: list[Piece], preset: Preset, seed: int, preview: bool, progress: Progress | None
    ) -> Iterator[Speech]:
        for index, piece in enumerate(pieces):
            ((speech,),) = self._say([piece], preset, seed, preview, progress)
            pause = pause_behind(piece, index == len(pieces) - 1, speech.sample_rate)
            yield Speech(torch.cat([speech.waveform, pause]), speech.sample_rate, piece.text)

    def pieces(self, text: str) -> list[Piece]:
        """The pieces a text is spoken in; ones without letters or digits are left out.

        Raises: UserError: if nothing is left.
        """
        tokenizer = self.chain.tokenizer
        most = self.chain.gpt_config.max_text_tokens - 1  # one STOP is added to a piece's ids
        pieces = split_text(text, lambda piece: len(tokenizer.encode(piece, clean_text)) <= most)
        spoken = [piece for piece in pieces if re.search(r"[a-z0-9]", clean_text(piece.text))]
        if not spoken:
            what = f"{text.strip()[:40]!r} has no letters or digits" if text.strip() else "the text is empty"
            raise UserError(f"There is nothing to say: {what}.")
        return spoken

    def _say(
        self,
        pieces: list[Piece],
        preset: Preset,
        seed: int,
        preview: bool,
        progress: Progress | None,
        num_results: int = 1,
    ) -> list[list[Speech]]:
        texts = [piece.text for piece in pieces]
        if preview:
            said = [[waveform] for waveform in self.chain.preview(texts, self.latents, preset, seed, progress)]
        else:
            said = self.chain.speak(texts, self.latents, preset, seed, progress, num_results)
        rate = SAMPLE_RATE if preview else SAMPLE_RATE_24K
        return [[Speech(way, rate, text) for way in ways] for ways, text in zip(said, texts, strict=True)]


def _check_results(num_results: int | None, preset: Preset, preview: bool) -> int:
    """How many results to make of each piece.

    Raises: UserError: if there aren't that many.
    """
    if num_results is None:
        return 1
    if preview:
        raise UserError("A preview is made of one sample; leave num_results or preview out.")
    if not 1 <= num_results <= preset.num_samples:
        raise UserError(
            f"num_results must be between 1 and the number of samples, {preset.num_samples}, got {num_results}; give a "
            f"larger num_samples to choose from."
        )
    return num_results


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or a GPU if there is one, or the CPU.

    Raises: UserError: if the device isn't there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The device {device} can't be used here ({reason}); leave it out, or say cpu.") from error
    return chosen
