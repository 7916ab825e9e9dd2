"""Lets a run be heard while it trains."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from tortoise_hf.audio import SAMPLE_RATE
from tortoise_hf.distributed import shards_weights
from tortoise_hf.sample_folder import PAGE
from tortoise_hf.samples import Samples

MOST_SHARE = 0.1
"""Share of the run's time that speaking may take."""
FREE_SECONDS = 5.0
"""Speaking that takes no longer than this goes on however short the time between evaluations is."""


class SamplesCallback(TrainerCallback):
    """Speak before the first step and at evaluations, on the main process; the others meet it again in the next step.

    An evaluation is passed over while the last speaking took more than a tenth of the time since. Where processes share
    the weights out none of them has a model that could speak; then the run's end does it all, see `Samples.finish`.
    """

    def __init__(self, accelerator: Accelerator, samples: Samples, writer: Any = None) -> None:
        """Speak `samples`; `writer`, a `SummaryWriter`, shows them in TensorBoard too."""
        self.accelerator, self.samples, self.writer = accelerator, samples, writer
        self.spoken_at, self.took = float("-inf"), 0.0
        self.said = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Say where to listen; speak with the weights the run starts from."""
        if not self.accelerator.is_main_process:
            return
        if shards_weights(self.accelerator):
            print("Samples: processes share the weights out, so none of them can speak before the run's end.")
            return
        self.samples.begin(model, state.global_step)
        if state.global_step == 0:
            self._speak(model, 0)
        self.samples.show()
        print(f"Samples: {self.samples.folder / PAGE} shows and plays them, anew at every evaluation.", flush=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Speak with the weights just evaluated, if there is time; show the curve in any case."""
        if not self.accelerator.is_main_process or shards_weights(self.accelerator):
            return
        if state.global_step > 0 and self._has_time(state.global_step):
            self._speak(model, state.global_step)
        self.samples.show()

    def _has_time(self, step: int) -> bool:
        since = time.monotonic() - self.spoken_at
        if self.took <= FREE_SECONDS or self.took <= MOST_SHARE * since:
            return True
        if not self.said:
            print(
                f"Samples: none at step {step}. Speaking took {self.took:.0f} s, and {since:.0f} s have passed since; "
                f"it waits until that is {MOST_SHARE:.0%} of the time.",
                flush=True,
            )
            self.said = True
        return False

    def _speak(self, model: Any, step: int) -> None:
        started = time.monotonic()
        waveforms: list[torch.Tensor] = self.samples.speak(model, step)
        self.spoken_at = time.monotonic()
        self.took = self.spoken_at - started
        for number, waveform in enumerate(waveforms if self.writer is not None else [], start=1):
            self.writer.add_audio(f"samples/{number}", waveform, step, SAMPLE_RATE)
