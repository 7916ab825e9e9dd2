"""What a run sounds like on the way: a few sentences, spoken as previews, in the run's folder.

    samples/index.html            plays and shows all of it, see `sample_page.py`
    samples/sentences.json        what is said
    samples/recording/1.wav       the clip that says sentence 1; 1-codes.wav is its codes made heard: the most that any
                                  preview can be
    samples/step-000040/1.wav     sentence 1, spoken by the weights of step 40
    samples/samples.json          at the end: what the voice's card plays

A preview is made of the GPT's codes by the DVAE and Griffin-Lim alone. It is rough, and quick enough to be made while
the model trains. Training doesn't notice: the weights, its random numbers and its mode are left as they were, and what
goes wrong here ends in a warning.
"""

# C mel codes · S samples of a waveform

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch

from tortoise_hf.audio import FFT_SIZE, SAMPLE_RATE, SAMPLES_PER_CODE, AudioError, load_waveform
from tortoise_hf.checkpoint import rng_state, set_rng_state
from tortoise_hf.config import Config
from tortoise_hf.data.prepare import Prepared
from tortoise_hf.errors import UserError
from tortoise_hf.hub.conditioning import write_clips
from tortoise_hf.latents import CLIPS_FOLDER, VoiceLatents, find_clips, gpt_latent
from tortoise_hf.mel_picture import draw_mel
from tortoise_hf.models.dvae import DVAE
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.models.pretrained import BaseFiles, load_dvae, load_gpt, load_mel_norms, load_tokenizer
from tortoise_hf.presets import choose_preset
from tortoise_hf.sample_folder import RECORDING_DIR, SAMPLES_DIR, SAMPLES_LIST, SENTENCES, spoken_steps, step_name
from tortoise_hf.sample_page import write_page
from tortoise_hf.sample_sentences import Sentence, choose_sentences
from tortoise_hf.speech import Chain, ModelShelf, griffin_lim
from tortoise_hf.text import clean_text

SEED = 0
"""Of the draws, always the same one: what differs between two steps is what was learnt between them."""
LOUDEST = math.log((FFT_SIZE / 2) ** 2)
"""Log-mel values can't be larger: the power of a sine of full scale under a Hann window."""


class Samples:
    """Speaks a run's sentences with whatever its GPT has become, and keeps what was said. For the main process."""

    def __init__(
        self,
        cfg: Config,
        sentences: list[Sentence],
        clip_ids: Sequence[str],
        device: torch.device,
        files: BaseFiles,
    ) -> None:
        """Nothing is loaded or written yet.

        Args:
            cfg: the experiment.
            sentences: to speak.
            clip_ids: of the training clips. Some are put into the run's folder and say who speaks, as in the finished
                voice.
            device: to speak on.
            files: what the run starts from.
        """
        self.cfg, self.sentences, self.clip_ids = cfg, sentences, clip_ids
        self.device, self.files = device, files
        self.run_dir = Path(cfg.training.output_dir)
        self.folder = self.run_dir / SAMPLES_DIR
        self.max_seconds = max(sentence.max_seconds for sentence in sentences)
        self._dvae: DVAE | None = None
        self._warned = False

    def begin(self, gpt: TortoiseGPT, step: int) -> None:
        """Make room for the samples of a run that is about to train: what came after `step` is forgotten."""
        with self._unnoticed(gpt, "the folder of samples"):
            self._prepare(gpt)
            for later in spoken_steps(self.folder):
                if later > step:  # as in the log, which starts over from the checkpoint's history
                    shutil.rmtree(self.folder / step_name(later))
            (self.folder / SAMPLES_LIST).unlink(missing_ok=True)

    def speak(self, gpt: TortoiseGPT, step: int) -> list[torch.Tensor]:
        """Say every sentence with the weights of a step, unless that was done before.

        Args:
            gpt: unwrapped, whole, on the device; left as it is.
            step: its optimizer steps.

        Returns: (S,) samples at 22,050 Hz of each, where they were made now.
        """
        waveforms: list[torch.Tensor] = []
        with self._unnoticed(gpt, f"samples of step {step}"):
            if not (self.folder / step_name(step)).is_dir():
                waveforms = self._say(gpt)
                with _whole_folder(self.folder / step_name(step)) as staging:
                    for number, waveform in enumerate(waveforms, start=1):
                        self._write(staging / f"{number}.wav", waveform)
        return waveforms

    def show(self, running: bool = True) -> None:
        """Write the page."""
        with self._unnoticed(None, "the page of samples"):
            write_page(self.run_dir, running)

    def finish(self, gpt: TortoiseGPT, step: int) -> None:
        """Complete what a finished run plays: the start, the exported step, the list for the card, and the page.

        Args:
            gpt: the exported model.
            step: of it.
        """
        with self._unnoticed(gpt, "the folder of samples"):
            self._prepare(gpt)
        if not (self.folder / step_name(0)).is_dir():
            with self._unnoticed(None, "samples of step 0"):
                start = load_gpt(self.files, self.cfg.model.from_scratch, self.cfg.training.seed)
                self.speak(start.to(self.device), 0)
        self.speak(gpt.to(self.device), step)
        with self._unnoticed(None, "the list of samples"):
            if (self.folder / step_name(step)).is_dir():
                self._write_list(step)
        self.show(running=False)

    def _prepare(self, gpt: TortoiseGPT) -> None:
        """Who speaks, and recordings of the sentences; samples of other sentences are put aside."""
        write_clips(self.cfg.data, self.clip_ids, self.run_dir)
        for leftover in self.folder.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        said = {"max_seconds": self.max_seconds, "sentences": [sentence.to_dict() for sentence in self.sentences]}
        if (self.folder / SENTENCES).is_file():
            if json.loads((self.folder / SENTENCES).read_text(encoding="utf-8")) == said:
                return
            number = 1
            while (aside := self.run_dir / f"aside-{number}-{SAMPLES_DIR}").exists():
                number += 1
            self.folder.rename(aside)
            print(f"The samples in {self.folder} said other sentences; they are now in {aside}.", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / RECORDING_DIR, ignore_errors=True)
        chain = self._chain(gpt)
        with _whole_folder(self.folder / RECORDING_DIR) as staging:
            for number, sentence in enumerate(self.sentences, start=1):
                if sentence.clip_id is None:
                    continue
                with contextlib.suppress(AudioError):  # it is gone since it was encoded
                    self._write(staging / f"{number}.wav", load_waveform(sentence.audio_path))
                self._write(staging / f"{number}-codes.wav", _heard(chain, torch.tensor(sentence.mel_codes)))
        # Last: what this file tells of is there.
        _write_json(self.folder / SENTENCES, said)

    def _say(self, gpt: TortoiseGPT) -> list[torch.Tensor]:
        chain = self._chain(gpt)
        with chain.shelf.use("gpt"):
            voice = gpt_latent(find_clips(self.run_dir / CLIPS_FOLDER), gpt, chain.mel_norms)
        most = min(math.ceil(self.max_seconds * SAMPLE_RATE / SAMPLES_PER_CODE), gpt.config.max_mel_tokens)
        preset = choose_preset("single_sample", num_samples=1, max_codes=most)
        rows = chain.codes([each.text for each in self.sentences], VoiceLatents(voice, None), preset, SEED)
        return [_heard(chain, row) for row in rows]

    def _chain(self, gpt: TortoiseGPT) -> Chain:
        if self._dvae is None:
            self._dvae = load_dvae(self.files)
        shelf = _Lent(self.device, gpt, self._dvae)
        return Chain(shelf, gpt.config, load_tokenizer(self.files), load_mel_norms(self.files))

    def _write(self, path: Path, waveform: torch.Tensor) -> None:
        """A recording and its picture.

        Raises: ValueError: if it is no sound.
        """
        if not waveform.isfinite().all():
            raise ValueError("what the DVAE's decoder makes of codes is no sound")
        soundfile.write(path, waveform.numpy(), SAMPLE_RATE, "PCM_16")
        path.with_suffix(".png").write_bytes(draw_mel(waveform, self.max_seconds))

    def _write_list(self, step: int) -> None:
        entries = []
        for number, sentence in enumerate(self.sentences, start=1):
            places = {"tuned": step_name(step), "base": step_name(0), "recording": RECORDING_DIR}
            files = {role: f"{place}/{number}.wav" for role, place in places.items()}
            there = {role: name for role, name in files.items() if (self.folder / name).is_file()}
            entries.append({"text": sentence.text, **there, "preview": True})
        _write_json(self.folder / SAMPLES_LIST, entries)

    @contextlib.contextmanager
    def _unnoticed(self, gpt: TortoiseGPT | None, what: str) -> Iterator[None]:
        """Leave random numbers and the model's mode as they were; turn a failure into a warning, the first time."""
        before, training = rng_state(), gpt is not None and gpt.training
        log = logging.getLogger("tortoise_hf.speech")
        level = log.level
        log.setLevel(logging.ERROR)  # that a model doesn't know yet when to stop, the page says
        try:
            if gpt is not None:
                gpt.eval()
            yield
        except Exception as error:  # whatever it is, the run goes on
            if not self._warned:
                reason = str(error).strip().split("\n")[0] or "no reason given"
                print(
                    f"Warning: {what} couldn't be made ({type(error).__name__}: {reason}). The run goes on without; "
                    "samples.enabled false switches them off.",
                    flush=True,
                )
            self._warned = True
        finally:
            if gpt is not None:
                gpt.train(training)
            log.setLevel(level)
            set_rng_state(before)


class _Lent(ModelShelf):
    """Models that belong to somebody else; the GPT stays as and where it is.

    It computes in float32 even where training mixes precisions: so does the exported voice, and one position at a time
    gains nothing from less.
    """

    def __init__(self, device: torch.device, gpt: TortoiseGPT, dvae: DVAE) -> None:
        super().__init__({}, device)
        self.gpt, self.dvae = gpt, dvae

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """The GPT, or the DVAE for as long as it is needed."""
        if name == "gpt":
            yield self.gpt
            return
        home = self.dvae.device
        try:
            yield self.dvae.to(self.device)
        finally:
            self.dvae.to(home)  # the device's memory is planned without it


def open_samples(cfg: Config, device: torch.device, files: BaseFiles, data: Prepared, gpt: GPTConfig) -> Samples | None:
    """The samples a config asks for; None where it asks for none.

    Args:
        cfg: the experiment.
        device: to speak on.
        files: what the run starts from.
        data: its clips.
        gpt: sizes of the model.

    Raises:
        UserError: if a text of `samples.texts` is too long for the model.
    """
    if not cfg.samples.enabled:
        return None
    tokenizer = load_tokenizer(files)
    for text in cfg.samples.texts or ():
        length = len(tokenizer.encode(text, clean_text)) + 1  # with the STOP that belongs to it
        if length > gpt.max_text_tokens:
            raise UserError(
                f"samples.texts: {text[:40]!r}… takes {length} text ids, the model {gpt.max_text_tokens} at most; give "
                "a shorter sentence."
            )
    sentences = choose_sentences(cfg.samples, data.train, data.eval)
    return Samples(cfg, sentences, data.train["clip_id"], device, files)


def _heard(chain: Chain, codes: torch.Tensor) -> torch.Tensor:
    """Rough sound of codes, (C,): (S,) samples at 22,050 Hz."""
    # A decoder that wasn't trained gives values whose powers are infinite.
    return griffin_lim(chain.preview_mel(codes).clamp(max=LOUDEST), SEED)


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder that gets its name when all that belongs into it is there."""
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    staging.rename(target)


def _write_json(path: Path, value: Any) -> None:
    staging = path.with_name(f".{path.name}.part")
    staging.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    staging.replace(path)
