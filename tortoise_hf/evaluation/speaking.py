"""What is judged: texts spoken by a voice, recordings, and recordings that went through the voice's own channel.

A preview turns codes into a mel with the DVAE and into sound with Griffin-Lim. Recordings encoded and made heard in the
same way are the most that a preview can be, and the only fair company for it: what the channel does to a sound would
otherwise count for or against the voice.
"""

# C mel codes · F mel frames · S samples

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tortoise_hf.audio import (
    MIN_MEL_SAMPLES,
    SAMPLE_RATE,
    SAMPLE_RATE_24K,
    SAMPLES_PER_CODE,
    LogMel,
    load_waveform,
    resample,
)
from tortoise_hf.data.examples import ClipEncoder
from tortoise_hf.evaluation.recordings import Recording
from tortoise_hf.speech import Preset, Progress, griffin_lim
from tortoise_hf.voice import Voice

SECONDS_PER_CODE = SAMPLES_PER_CODE / SAMPLE_RATE


@dataclass(frozen=True)
class Utterance:
    """Something said, with all that the measures look at."""

    text: str
    codes: torch.Tensor
    """(C,) without STOP."""
    ended: bool
    """Whether it ended by itself; recordings do."""
    log_mel: torch.Tensor
    """(80, F) of 22,050 Hz audio, not normalised: a preview's is the DVAE's, not that of its rough sound."""
    waveform: torch.Tensor | None
    """(S,); None where nobody needs to hear it."""
    sample_rate: int

    @property
    def seconds(self) -> float:
        """How long it is, by its codes."""
        return len(self.codes) * SECONDS_PER_CODE


def speak_texts(
    voice: Voice, texts: Sequence[str], preset: Preset, seed: int, preview: bool, progress: Progress | None = None
) -> list[Utterance]:
    """Have a voice say texts; one that is longer than what is spoken in one go is judged piece by piece.

    Args:
        voice: who speaks.
        texts: what.
        preset: how; of a preview one sample is made whatever it says.
        seed: of the draws.
        preview: rough sound, without the large models.
        progress: told of finished samples and diffusion steps.

    Raises: UserError: if a text holds nothing to say, or the voice can't speak so.
    """
    pieces = [piece.text for text in texts for piece in voice.pieces(text)]
    if preview:
        preset = replace(preset, num_samples=1)
    else:
        voice.chain.check(voice.latents)
    rows = voice.chain.codes(pieces, voice.latents, preset, seed, progress)
    return _make_heard(voice, pieces, rows, preset, seed, preview, progress)


def encode_recordings(voice: Voice, recordings: Sequence[Recording]) -> list[Utterance]:
    """Recordings as they are, with the codes that the voice's DVAE gives them.

    Raises: AudioError: if a file can't be read.
    """
    log_mel, utterances = LogMel(), []
    with voice.chain.shelf.use("dvae") as dvae:
        encoder = ClipEncoder(dvae, voice.chain.mel_norms, 0, 0, voice.chain.shelf.device)
        for recording in recordings:
            waveform = load_waveform(recording.path)
            codes = torch.from_numpy(encoder.encode(waveform).mel_codes).long()
            utterances.append(Utterance(recording.text, codes, True, _mel_of(log_mel, waveform), waveform, SAMPLE_RATE))
    return utterances


def resynthesize(
    voice: Voice, recordings: Sequence[Utterance], preset: Preset, seed: int, preview: bool, audible: bool = True
) -> list[Utterance]:
    """Make the codes of recordings heard as the voice's own would be.

    Args:
        voice: whose models.
        recordings: from `encode_recordings`.
        preset: of the diffusion model.
        seed: of its noise, or of Griffin-Lim's phases.
        preview: without the large models.
        audible: False leaves a preview's waveform out, which is the slow part.
    """
    texts, stop = [each.text for each in recordings], voice.chain.gpt_config.stop_mel_id
    # As sampled rows are: STOP from the end on, up to the limit.
    rows = [
        torch.cat([each.codes, each.codes.new_full((max(1, preset.sampling.max_codes - len(each.codes)),), stop)])
        for each in recordings
    ]
    return _make_heard(voice, texts, rows, preset, seed, preview, audible=audible)


def _make_heard(
    voice: Voice,
    texts: Sequence[str],
    rows: Sequence[torch.Tensor],
    preset: Preset,
    seed: int,
    preview: bool,
    progress: Progress | None = None,
    audible: bool = True,
) -> list[Utterance]:
    stop = voice.chain.gpt_config.stop_mel_id
    codes = [row[row != stop] for row in rows]
    ended = [len(spoken) < len(row) for spoken, row in zip(codes, rows, strict=True)]
    if preview:
        with voice.chain.shelf.use("dvae"):
            mels = [voice.chain.preview_mel(spoken) for spoken in codes]
        waveforms = [griffin_lim(mel, seed) if audible else None for mel in mels]
        rate = SAMPLE_RATE
    else:
        waveforms = voice.chain.speak_codes(list(texts), list(rows), voice.latents, preset, seed, progress)
        log_mel, rate = LogMel(), SAMPLE_RATE_24K
        mels = [_mel_of(log_mel, resample(waveform, rate, SAMPLE_RATE)) for waveform in waveforms]
    return [Utterance(*parts, rate) for parts in zip(texts, codes, ended, mels, waveforms, strict=True)]


def _mel_of(log_mel: LogMel, waveform: torch.Tensor) -> torch.Tensor:
    short = MIN_MEL_SAMPLES - len(waveform)
    return log_mel(torch.nn.functional.pad(waveform, (0, max(0, short))))[0]
