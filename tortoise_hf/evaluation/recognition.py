"""Word error rate: what a recogniser understands of speech, compared with what was to be said."""

# N clips or texts · S samples of a waveform

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tortoise_hf.audio import resample
from tortoise_hf.errors import UserError
from tortoise_hf.text import clean_text

DEFAULT_RECOGNIZER = "transformers:openai/whisper-base.en"
INSTALL = "pip install -c constraints.txt -e '.[evaluate]'"
_SPHINX_RATE = 16_000
"""Hz, of pocketsphinx's acoustic model."""
_WIDE_BEAMS = {"beam": 1e-80, "pbeam": 1e-80, "wbeam": 1e-60}
"""How unlikely a path may become, beside the likeliest one, before pocketsphinx gives it up; its own values are 1e-48,
1e-48 and 7e-29. With these a clip of 2 to 4 s takes 1 to 20 s, several times as long; most where it is no speech."""
_BOOTSTRAP_DRAWS = 1000
_SYMBOLS = {"&": " and ", "%": " percent ", "+": " plus "}
# One spelling of what recognisers write in several ways. "misess" is what TorToiSe's cleaner makes of "mrs.".
_SPELLINGS = {"misess": "missus", "mrs": "missus", "mr": "mister", "dr": "doctor", "ok": "okay"}


class Recognizer(Protocol):
    """Anything that writes down what it hears."""

    name: str

    def transcribe(self, waveform: torch.Tensor, sample_rate: int) -> str:
        """What is said in (S,) samples in [-1, 1]."""
        ...

    def unknown_words(self, texts: Sequence[str]) -> list[str]:
        """Words of the texts that it can't write down, each once: they will count as errors whatever is said."""
        ...


class SphinxRecognizer:
    """PocketSphinx with its own US English model, which comes with it: a download is never needed.

    Each clip is heard on its own: nothing is carried over from the one before. With a grammar a single odd sound can
    make pocketsphinx give up all paths through a sentence, and what was clear is lost with it. So a clip in which
    nothing was found is heard again, with more patience. That may find the beginning of a sentence alone, and words in
    what is no speech, speech played backwards for instance: with a grammar something is often likeliest, and
    `WordErrors.chance` tells how much that is worth.
    """

    def __init__(self, grammar: Path | None = None) -> None:
        """Get ready.

        Args:
            grammar: JSGF file of all that may be said; without one any English is expected.

        Raises: UserError: if pocketsphinx isn't installed, or the grammar can't be read.
        """
        try:
            from pocketsphinx import Decoder
        except ImportError as error:
            raise UserError(f"The recogniser pocketsphinx isn't installed; install it with: {INSTALL}") from error
        self.name = "pocketsphinx" if grammar is None else f"pocketsphinx with a second hearing, grammar {grammar.name}"
        self._settings = {"samprate": float(_SPHINX_RATE), "cmn": "batch", "loglevel": "FATAL"}
        self._grammar_words, self._patient = None, None
        if grammar is not None:
            try:
                self._grammar_words = _words_in(grammar.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"The grammar {grammar} can't be read ({error}); give a JSGF file.") from error
            self._settings["jsgf"] = str(grammar)
        try:
            self._decoder = Decoder(**self._settings)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"The grammar {grammar} is no JSGF grammar that pocketsphinx understands, or holds words that its "
                f"dictionary lacks{_name_unknown(self._grammar_words or [])}; correct it."
            ) from error

    def transcribe(self, waveform: torch.Tensor, sample_rate: int) -> str:
        """What is said in (S,) samples in [-1, 1]; "" if nothing fits."""
        samples = resample(waveform, sample_rate, _SPHINX_RATE).clamp(-1, 1) * 32_767
        data = samples.round().short().numpy().tobytes()
        found = _hear(self._decoder, data)
        if not found and self._grammar_words is not None:
            if self._patient is None:
                self._patient = type(self._decoder)(**self._settings, **_WIDE_BEAMS)
            found = _hear(self._patient, data)
        return found

    def unknown_words(self, texts: Sequence[str]) -> list[str]:
        """Words of the texts that the grammar, or without one the dictionary, doesn't have."""
        words = dict.fromkeys(word for text in texts for word in spoken_words(text).split())
        if self._grammar_words is not None:
            return [word for word in words if word not in self._grammar_words]
        return [word for word in words if self._decoder.lookup_word(word) is None]


def _hear(decoder: Any, data: bytes) -> str:
    """What a decoder of pocketsphinx finds in 16-bit samples; "" for nothing."""
    decoder.reinit_feat()  # forgets the noise and the loudness of the clip before
    decoder.start_utt()
    decoder.process_raw(data, full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr if found is not None else ""


class TransformersRecognizer:
    """A speech recogniser of transformers (Whisper, wav2vec 2.0, ...), from the Hub or a folder."""

    def __init__(self, model_id: str, device: torch.device) -> None:
        """Fetch and load the model.

        Raises: UserError: if it isn't to be had, or is no recogniser.
        """
        from transformers import pipeline

        self.name = model_id
        try:
            self._pipeline = pipeline("automatic-speech-recognition", model=model_id, device=device)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"The recogniser {model_id} can't be loaded ({first_sentence(error)}). Without a network, name a "
                "folder that holds one, or take --asr pocketsphinx, which brings its model along."
            ) from error
        self._rate = self._pipeline.feature_extractor.sampling_rate

    def transcribe(self, waveform: torch.Tensor, sample_rate: int) -> str:
        """What is said in (S,) samples in [-1, 1]."""
        samples = resample(waveform, sample_rate, self._rate).numpy()
        return self._pipeline({"raw": samples, "sampling_rate": self._rate})["text"]

    def unknown_words(self, texts: Sequence[str]) -> list[str]:
        """None: it spells."""
        return []


def load_recognizer(name: str, grammar: Path | None, device: torch.device) -> Recognizer:
    """The recogniser that a user named: `pocketsphinx`, or `transformers:` and a model's id or folder.

    Raises: UserError: if there is no such recogniser, or it isn't to be had.
    """
    require_jiwer()
    kind, _, model_id = name.partition(":")
    if kind == "transformers" and model_id:
        if grammar is not None:
            raise UserError(f"--grammar is for --asr pocketsphinx; {name} takes none.")
        return TransformersRecognizer(model_id, device)
    if name == "pocketsphinx":
        return SphinxRecognizer(grammar)
    raise UserError(
        f"There is no recogniser {name!r}; give pocketsphinx, {DEFAULT_RECOGNIZER} or another model, or none."
    )


def require_jiwer() -> None:
    """Raises: UserError: if the library that counts errors isn't installed."""
    try:
        import jiwer  # noqa: F401
    except ImportError as error:
        raise UserError(f"Word error rates take jiwer, which isn't installed; install it with: {INSTALL}") from error


def spoken_words(text: str) -> str:
    """A text as its words alone, so that spelling isn't counted as mishearing.

    Numbers are written out as TorToiSe reads them; case, punctuation and hyphens go, apostrophes inside words stay;
    a few titles get one spelling. Both transcripts and what a recogniser wrote go through this.
    """
    for symbol, word in _SYMBOLS.items():
        text = text.replace(symbol, word)
    words = (word.strip("'") for word in re.sub(r"[^a-z0-9']+", " ", clean_text(text)).split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word)


@dataclass(frozen=True)
class WordErrors:
    """How far what was understood is from what was to be said."""

    wer: float
    """(substitutions + deletions + insertions) / words of all texts; 0 is perfect, above 1 is possible."""
    interval: tuple[float, float]
    """95 % of drawings of as many texts lie within (bootstrap over texts)."""
    chance: float | None
    """The same when each transcript is compared with another text: what a recogniser that heard nothing would get by
    guessing what is said here. A closed grammar makes it low. None with a single text."""
    num_words: int
    substitutions: int
    deletions: int
    insertions: int
    heard: tuple[str, ...]
    """(N,) what the recogniser wrote, as words."""
    errors: tuple[int, ...]
    """(N,) wrong words of each text."""


def word_errors(texts: Sequence[str], transcripts: Sequence[str], seed: int = 0) -> WordErrors:
    """Compare transcripts with texts, both as written.

    Args:
        texts: (N,) what was to be said; each holds a word.
        transcripts: (N,) what was understood.
        seed: of the bootstrap.
    """
    import jiwer

    references, heard = [spoken_words(text) for text in texts], [spoken_words(text) for text in transcripts]
    each = [jiwer.process_words(reference, hypothesis) for reference, hypothesis in zip(references, heard, strict=True)]
    words = np.array([one.hits + one.substitutions + one.deletions for one in each])
    errors = np.array([one.substitutions + one.deletions + one.insertions for one in each])
    draws = np.random.default_rng(seed).integers(len(words), size=(_BOOTSTRAP_DRAWS, len(words)))
    low, high = np.percentile(errors[draws].sum(1) / words[draws].sum(1), [2.5, 97.5])
    # Each text is compared with what was heard of the next one.
    chance = jiwer.process_words(references, heard[1:] + heard[:1]).wer if len(heard) > 1 else None
    return WordErrors(
        wer=float(errors.sum() / words.sum()),
        interval=(float(low), float(high)),
        chance=chance,
        num_words=int(words.sum()),
        substitutions=sum(one.substitutions for one in each),
        deletions=sum(one.deletions for one in each),
        insertions=sum(one.insertions for one in each),
        heard=tuple(heard),
        errors=tuple(errors.tolist()),
    )


def first_sentence(error: Exception) -> str:
    """The first sentence of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")


def _words_in(grammar: str) -> list[str]:
    """The words of a JSGF grammar, each once; read without parsing it, so a grammar that is none gives any words."""
    no_words = r"/\*.*?\*/|//[^\n]*|#JSGF[^;]*;|grammar\s[^;]*;|import\s[^;]*;|<[^>]*>|\{[^}]*\}|/[^/]*/"
    body = re.sub(no_words, " ", grammar, flags=re.DOTALL)
    return list(dict.fromkeys(word for word in re.findall(r"[^\s|()\[\]=;*+\"]+", body) if word != "public"))


def _name_unknown(words: Sequence[str]) -> str:
    """` (for instance: a, b)`, the words that pocketsphinx's dictionary lacks; "" if it has them all."""
    from pocketsphinx import get_model_path

    with open(get_model_path("en-us/cmudict-en-us.dict"), encoding="utf-8") as lines:
        known = {line.split(maxsplit=1)[0] for line in lines}
    missing = [word for word in words if word not in known]
    return f" (for instance: {', '.join(missing[:5])})" if missing else ""
