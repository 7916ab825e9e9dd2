"""Whether a voice sounds like its speaker: distances between clips' vectors, by a measure of our own or a model's.

A measure turns a clip into a vector. `EnrolledVoices` keeps the mean vector of each voice and tells how near another
clip is to each. It is checked before it is believed: `accuracy` is the share of recordings it hasn't seen that it gives
to the right voice.
"""

# N clips · D size of a vector · V voices · F mel frames

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tortoise_hf.audio import NUM_MEL_BINS, resample
from tortoise_hf.errors import UserError
from tortoise_hf.evaluation.recognition import first_sentence
from tortoise_hf.evaluation.speaking import Utterance

SPECTRAL = "spectral"
NUM_CEPSTRA = 44
"""Cepstral coefficients of a frame that count, from the second on: the first is the loudness. The lower ones hold the
shape of the vocal tract, those from about 20 on the distance of the harmonics, that is the pitch. Measured
on previews of 17 synthetic voices, some of them the same at another pitch: with 20 coefficients it mistakes one clip in
fifty, with 44 one in a hundred."""
SPEECH_DB = 30.0
"""Frames that far below the loudest of a clip are no speech and don't count."""
_SHRINKAGE = 0.3
"""Share of the diagonal in the covariance within voices: with few clips the rest of it isn't known well."""


class SpeakerMeasure(Protocol):
    """Turns clips into vectors."""

    name: str
    same_channel: bool
    """Whether it hears the channel as well as the speaker, so that all clips have to come through the same one."""
    whitens: bool
    """Whether distances take the covariance within voices into account; otherwise the cosine is taken."""

    def embed(self, clips: Sequence[Utterance]) -> np.ndarray:
        """(N, D) vectors."""
        ...


class SpectralMeasure:
    """Mean and spread of mel cepstra over a clip's speech: the timbre, and the pitch as far as a mel shows it.

    Simple, quick and without a model. It hears whatever colours a sound, so only clips that went through the same
    channel may be compared.
    """

    name, same_channel, whitens = SPECTRAL, True, True

    def embed(self, clips: Sequence[Utterance]) -> np.ndarray:
        """(N, 2 * 44): means, then logarithms of the standard deviations."""
        return np.stack([cepstral_statistics(clip.log_mel) for clip in clips])


class XVectorMeasure:
    """A speaker verification model of transformers (x-vectors, WavLM-SV, ...), from the Hub or a folder."""

    same_channel, whitens = False, False

    def __init__(self, model_id: str, device: torch.device) -> None:
        """Fetch and load the model.

        Raises: UserError: if it isn't to be had, or is no such model.
        """
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        self.name = model_id
        try:
            self._extractor = AutoFeatureExtractor.from_pretrained(model_id)
            self._model = AutoModelForAudioXVector.from_pretrained(model_id).to(device).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"The speaker model {model_id} can't be loaded ({first_sentence(error)}). Without a network, name a "
                f"folder that holds one, or take --speaker_measure {SPECTRAL}."
            ) from error

    @torch.inference_mode()
    def embed(self, clips: Sequence[Utterance]) -> np.ndarray:
        """(N, D) of length 1."""
        rate, vectors = self._extractor.sampling_rate, []
        for clip in clips:
            samples = resample(clip.waveform, clip.sample_rate, rate).numpy()
            inputs = self._extractor(samples, sampling_rate=rate, return_tensors="pt").to(self._model.device)
            vectors.append(torch.nn.functional.normalize(self._model(**inputs).embeddings[0].float(), dim=0).cpu())
        return torch.stack(vectors).numpy()


def load_measure(name: str, device: torch.device) -> SpeakerMeasure:
    """`spectral`, or the model with that id or in that folder.

    Raises: UserError: if it isn't to be had.
    """
    return SpectralMeasure() if name == SPECTRAL else XVectorMeasure(name, device)


def cepstral_statistics(log_mel: torch.Tensor) -> np.ndarray:
    """(80, F) log-mel, not normalised, to the (88,) vector of `SpectralMeasure`. Loudness changes nothing."""
    loudness = log_mel.logsumexp(0)
    speech = log_mel[:, loudness >= loudness.max() - SPEECH_DB / 10 * math.log(10)].double().numpy()
    cepstra = _cosines() @ speech
    return np.concatenate([cepstra.mean(1), np.log(cepstra.std(1) + 1e-3)])


def _cosines() -> np.ndarray:
    """(44, 80) rows 1 to 44 of the orthonormal discrete cosine transform."""
    rows, bins = np.arange(1, NUM_CEPSTRA + 1)[:, None], np.arange(NUM_MEL_BINS)[None]
    return math.sqrt(2 / NUM_MEL_BINS) * np.cos(math.pi * rows * (bins + 0.5) / NUM_MEL_BINS)


class EnrolledVoices:
    """The voices that clips are compared with."""

    def __init__(self, vectors: Mapping[str, np.ndarray], whitens: bool) -> None:
        """Learn them.

        Args:
            vectors: (N, D) of each voice, at least two.
            whitens: as of the measure.
        """
        self.names, self._whitens = list(vectors), whitens
        self._means = np.stack([each.mean(0) for each in vectors.values()])
        self._whitening = np.eye(self._means.shape[1])
        if whitens:
            around = np.concatenate([each - each.mean(0) for each in vectors.values()])
            covariance = around.T @ around / max(1, len(around) - len(vectors))
            diagonal = np.diag(np.diag(covariance) + 1e-9)
            shrunk = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * diagonal
            self._whitening = np.linalg.inv(np.linalg.cholesky(shrunk))

    def distances(self, vectors: np.ndarray) -> np.ndarray:
        """(N, V): Mahalanobis distances by the covariance within voices, or 1 - cosine."""
        if self._whitens:
            return np.linalg.norm((vectors[:, None] - self._means) @ self._whitening.T, axis=-1)
        means = self._means / np.linalg.norm(self._means, axis=1, keepdims=True)
        return 1 - vectors / np.linalg.norm(vectors, axis=1, keepdims=True) @ means.T

    def nearest(self, vectors: np.ndarray) -> list[str]:
        """(N,) name of the voice that each is nearest to."""
        return [self.names[index] for index in self.distances(vectors).argmin(1)]


def speaker_accuracy(voices: EnrolledVoices, vectors: Mapping[str, np.ndarray]) -> float:
    """Share of clips that are nearest to their own voice.

    Args:
        voices: enrolled from other clips.
        vectors: (N, D) of each voice.
    """
    right = [found == name for name, each in vectors.items() for found in voices.nearest(each)]
    return sum(right) / len(right)


@dataclass(frozen=True)
class Similarity:
    """How near clips are to the voice they should sound like."""

    similarity: float
    """A model's: mean cosine. The spectral measure's: the distance that the voice's own recordings have, divided by
    that of these clips; 1 is as near as a recording, 0.5 twice as far."""
    each: tuple[float, ...]
    """(N,) the same of each clip."""
    nearest: tuple[str, ...] | None
    """(N,) the voice each is nearest to; None if only one is known."""
    nearest_is_target: float | None
    """Share of the clips that are nearest to the voice."""


class SpeakerJudge:
    """Compares clips with one voice among others."""

    def __init__(
        self,
        measure: SpeakerMeasure,
        target: str,
        enrolled: Mapping[str, Sequence[Utterance]],
        unseen: Mapping[str, Sequence[Utterance]],
    ) -> None:
        """Enrol voices and check the measure on them.

        Args:
            measure: whose vectors are compared.
            target: name of the voice that is evaluated.
            enrolled: clips of each voice to learn it from, the target's among them.
            unseen: other clips of each voice to check the measure with.
        """
        self.measure, self.target = measure, target
        self.voices = EnrolledVoices({name: measure.embed(clips) for name, clips in enrolled.items()}, measure.whitens)
        vectors = {name: measure.embed(clips) for name, clips in unseen.items()}
        self.num_unseen = sum(len(each) for each in vectors.values())
        self.accuracy = speaker_accuracy(self.voices, vectors) if len(self.voices.names) > 1 else None
        """None if there is only one voice."""
        self._target = self.voices.names.index(target)
        self._own = float(self.voices.distances(vectors[target])[:, self._target].mean())
        self.others = {
            name: self._similarity(self.voices.distances(each)[:, self._target].mean())
            for name, each in vectors.items()
            if name != target
        }
        """How similar the recordings of the other voices are to the target, for comparison."""

    def judge(self, clips: Sequence[Utterance]) -> Similarity:
        """How near these clips are to the target."""
        vectors = self.measure.embed(clips)
        distances = self.voices.distances(vectors)[:, self._target]
        several = len(self.voices.names) > 1
        nearest = tuple(self.voices.nearest(vectors)) if several else None
        return Similarity(
            similarity=self._similarity(distances.mean()),
            each=tuple(self._similarity(distance) for distance in distances),
            nearest=nearest,
            nearest_is_target=sum(name == self.target for name in nearest) / len(nearest) if nearest else None,
        )

    def _similarity(self, distance: float) -> float:
        return float(self._own / max(distance, 1e-9) if self.measure.whitens else 1 - distance)
