"""Training of a DVAE: pieces of log-mel to codes and back, a codebook that follows, callbacks as in the GPT's loop.

Mel spectrogram → encoder → nearest codebook vector → decoder → mel spectrogram. The loss measures log-mels in nats, not
the normalised mels: dividing by the norms would weigh the bins by chance.
"""

# B pieces · W codes of a piece · dim length of a codebook vector · K codes

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from tortoise_hf.callbacks.checkpointing import CheckpointCallback
from tortoise_hf.callbacks.interrupt import InterruptCallback
from tortoise_hf.callbacks.lr_schedule import LRScheduleCallback
from tortoise_hf.callbacks.run_log import RunLogCallback
from tortoise_hf.checkpoint import Checkpoint, load_checkpoint
from tortoise_hf.codebook import code_statistics, initialize, perplexity, quantize, revive, update_averages
from tortoise_hf.config import OptimConfig
from tortoise_hf.data.mels import ClipMels, PieceDraws, Pieces
from tortoise_hf.distributed import shards_weights
from tortoise_hf.dvae_config import DVAEModelConfig, DVAERunConfig
from tortoise_hf.dvae_evaluation import evaluate_dvae, reconstruction_loss
from tortoise_hf.errors import UserError
from tortoise_hf.faults import in_words
from tortoise_hf.machine import compile_blocks
from tortoise_hf.models.dvae import DVAE, FRAMES_PER_CODE, DVAEConfig, ResidualBlock, full_precision
from tortoise_hf.optim import build_lr_scheduler

BRANCH_SCALE = 0.1
"""Factor on the last weights of each residual branch when training begins, or their sum would explode."""
FITTING_BATCHES = 16
"""Batches that k-means sees when the codebook begins."""
REVIVAL_END = 0.8
"""Share of the run after which no code is moved any more, so that decoder and codebook settle."""
MIN_LR_RATIO = 0.02
"""The last learning rate, as a share of the first."""


class Reconstruction(nn.Module):
    """What is trained, as one forward pass: pieces to their reconstruction."""

    def __init__(self, dvae: DVAE, mel_norms: torch.Tensor) -> None:
        """Wrap a DVAE; `mel_norms` (80,) are the divisors of its input."""
        super().__init__()
        self.dvae = dvae
        self.register_buffer("norms", mel_norms.clone()[:, None], persistent=False)

    def encode(self, pieces: Pieces) -> torch.Tensor:
        """(B, dim, W) encoder outputs of the pieces."""
        with full_precision(pieces.log_mel.device):
            return pieces.codes_of_piece(self.dvae.encoder(pieces.log_mel / self.norms))

    def forward(self, pieces: Pieces, quantized: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Reconstruct.

        Args:
            pieces: B of them.
            quantized: False passes the encoder's output on as it is.

        Returns: (B, 80, 4 W) log-mel; (B, dim, W) encoder outputs; (B, W) codes, None if not quantized.
        """
        vectors = self.encode(pieces)
        codes, passed = quantize(self.dvae.codebook, vectors) if quantized else (None, vectors)
        with full_precision(vectors.device):
            return self.dvae.decoder(passed) * self.norms, vectors, codes


def commitment_loss(dvae: DVAE, vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of each encoder output to its codebook vector, which stays; (B, W)."""
    return (vectors - dvae.codebook.lookup(codes).detach()).square().mean(dim=1)


def new_dvae(cfg: DVAEModelConfig, seed: int) -> DVAE:
    """A DVAE with random weights, ready to be trained; the global random state is left as it was."""
    config = DVAEConfig(
        hidden_size=cfg.hidden_size,
        codebook_dim=cfg.codebook_dim,
        num_codes=cfg.num_codes,
        num_resnet_blocks=cfg.num_resnet_blocks,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dvae = DVAE(config)
    return dvae


@torch.no_grad()
def settle_weights(model: Reconstruction, pieces: Pieces) -> None:
    """Scale random weights so that activations keep their size, and the first reconstruction is the mean mel.

    Args:
        model: with fresh weights.
        pieces: a batch, to measure the encoder's output on.
    """
    dvae = model.dvae
    for module in dvae.modules():
        if isinstance(module, ResidualBlock):
            module.net[-1].weight.mul_(BRANCH_SCALE)
    dvae.encoder[-1].weight.div_(model.encode(pieces).std().clamp(min=1e-6))
    dvae.decoder[-1].weight.mul_(BRANCH_SCALE)
    dvae.decoder[-1].bias.fill_(1.0)  # norms are means


@dataclass
class _Meter:
    """Figures of a log interval, summed on the device."""

    sums: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, losses: list[torch.Tensor], codes: torch.Tensor | None, num_codes: int) -> None:
        """Note one step's losses, already shares of the whole batch's, and this process's valid codes."""
        values = torch.stack([loss.detach() for loss in losses])
        self.sums = values if self.sums is None else self.sums + values
        self.steps += 1
        if codes is not None:
            found = torch.bincount(codes, minlength=num_codes)
            self.counts = found if self.counts is None else self.counts + found

    def logs(self, accelerator: Accelerator, learning_rate: float) -> dict[str, float]:
        """Means over the interval and over processes, as plain numbers."""
        reconstruction, commitment = (accelerator.reduce(self.sums, "sum") / self.steps).tolist()
        logs = {"loss": reconstruction, "commitment_loss": commitment, "learning_rate": learning_rate}
        if self.counts is not None:
            counts = accelerator.reduce(self.counts, "sum")
            logs |= {"perplexity": perplexity(counts), "codes_used": int((counts > 0).sum())}
        logs["steps_per_second"] = self.steps / max(1e-9, time.perf_counter() - self.started)
        return logs


class DVAETrainer:
    """A run: its model, its optimizer and the steps. Every process has one."""

    def __init__(
        self,
        cfg: DVAERunConfig,
        accelerator: Accelerator,
        train: ClipMels,
        held_out: ClipMels,
        mel_norms: torch.Tensor,
    ) -> None:
        """Build everything; the run's folder isn't touched.

        Args:
            cfg: the run.
            accelerator: devices and processes, as launched.
            train: clips to train on.
            held_out: clips to evaluate on; may be empty.
            mel_norms: (80,) divisors of the log-mel.

        Raises: UserError: if processes share the weights out, or there are more of them than pieces in a batch.
        """
        if shards_weights(accelerator):
            raise UserError(
                "accelerate was told to share the weights out (FSDP), which a DVAE is too small for; take "
                "accelerate_config.yaml or configs/accelerate/multi_gpu.yaml."
            )
        if cfg.training.batch_size < accelerator.num_processes:
            raise UserError(
                f"training.batch_size is {cfg.training.batch_size}, fewer pieces than the {accelerator.num_processes} "
                "processes; give every process at least one."
            )
        self.cfg, self.accelerator, self.held_out, self.mel_norms = cfg, accelerator, held_out, mel_norms
        settings = cfg.training
        self.dvae = new_dvae(cfg.model, settings.seed)
        reach = self.dvae.config.reach
        self.draw = PieceDraws(train, settings.batch_size, settings.piece_codes, reach, settings.seed)
        model = Reconstruction(self.dvae, mel_norms)
        settle_weights(model, self.draw(0))
        model.to(accelerator.device)
        optimizer = torch.optim.AdamW(self.dvae.parameters(), settings.learning_rate, betas=(0.9, 0.99), weight_decay=0)
        schedule = OptimConfig(lr_schedule="cosine", warmup_steps=settings.warmup_steps, min_lr_ratio=MIN_LR_RATIO)
        self.lr_scheduler = build_lr_scheduler(optimizer, schedule, settings.max_steps)
        compile_blocks(accelerator, ())  # it has none that repeat
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.state = TrainerState(
            max_steps=settings.max_steps,
            logging_steps=settings.logging_steps,
            eval_steps=settings.eval_steps,
            save_steps=settings.save_steps,
            is_world_process_zero=accelerator.is_main_process,
            is_local_process_zero=accelerator.is_local_main_process,
        )

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Go on from a checkpoint, if there is one; every process calls it."""
        if checkpoint is None:
            return
        flags = {name: getattr(self.state, name) for name in ("is_world_process_zero", "is_local_process_zero")}
        self.state = load_checkpoint(checkpoint, self.accelerator, self.dvae, self.optimizer, self.lr_scheduler)
        for name, value in flags.items():
            setattr(self.state, name, value)
        self.accelerator.print(f"Going on from {checkpoint.path}.")

    @in_words()
    def train(self) -> TrainerState:
        """Train to `training.max_steps`, evaluating, logging and saving in between.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, when the step in hand is saved.
            UserError: if a checkpoint can't be written, or the loss isn't a number any more.
        """
        args, state = self.cfg.training, self.state
        callbacks: list[TrainerCallback] = [
            DefaultFlowCallback(),
            LRScheduleCallback(),
            CheckpointCallback(self.accelerator, args.save_total_limit),
            RunLogCallback(),
            InterruptCallback(self.accelerator),
            _PrintLogs(),
        ]
        events = CallbackHandler(callbacks, self.dvae, None, self.optimizer, self.lr_scheduler)
        control = events.on_train_begin(args, state, TrainerControl())
        meter = _Meter()
        while state.global_step < args.max_steps:
            control = events.on_step_begin(args, state, control)
            self._step(meter)
            control = events.on_optimizer_step(args, state, control)
            state.global_step += 1
            control = events.on_step_end(args, state, control)
            if control.should_log:
                self._record(meter.logs(self.accelerator, self.lr_scheduler.get_last_lr()[0]), events, control)
                meter = _Meter()
            if (control.should_evaluate or state.global_step == args.max_steps) and len(self.held_out):
                control = self._evaluate(events, control)
            if control.should_save:
                control = events.on_save(args, state, control)
        events.on_train_end(args, state, control)
        return state

    def _step(self, meter: _Meter) -> None:
        """One batch: move the weights, let the codebook follow."""
        settings, accelerator, step = self.cfg.training, self.accelerator, self.state.global_step
        quantized = step >= settings.codebook_start_step
        if step == settings.codebook_start_step:
            self._fit_codebook()
        pieces = self._pieces(step)
        log_mel, vectors, codes = self.model(pieces, quantized)
        # Divided by what the whole batch holds, the processes' losses add up to its mean; gradients are averaged.
        frames = pieces.valid.repeat_interleave(FRAMES_PER_CODE, dim=1)
        losses = [(reconstruction_loss(log_mel, pieces.target()) * frames).sum() / (pieces.num_valid * FRAMES_PER_CODE)]
        losses.append(
            (commitment_loss(self.dvae, vectors, codes) * pieces.valid).sum() / pieces.num_valid
            if quantized
            else torch.zeros_like(losses[0])
        )
        accelerator.backward((losses[0] + settings.commitment_weight * losses[1]) * accelerator.num_processes)
        accelerator.clip_grad_norm_(self.dvae.parameters(), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        found = None
        if quantized:
            heard, found = vectors.detach().transpose(1, 2)[pieces.valid], codes[pieces.valid]
            self._update_codebook(heard, found)
        meter.add(losses, found, self.dvae.config.num_codes)

    def _pieces(self, number: int) -> Pieces:
        share = self.draw(number, self.accelerator.process_index, self.accelerator.num_processes)
        return share.to(self.accelerator.device)

    def _update_codebook(self, vectors: torch.Tensor, codes: torch.Tensor) -> None:
        """Averages over all processes; now and then, codes nobody uses are moved. Every process comes to the same."""
        settings, step = self.cfg.training, self.state.global_step
        codebook = self.dvae.codebook
        statistics = self.accelerator.reduce(code_statistics(codebook, vectors, codes), "sum")
        update_averages(codebook, statistics, settings.codebook_decay)
        if (step + 1) % settings.revival_steps == 0 and step < REVIVAL_END * settings.max_steps:
            generator = torch.Generator().manual_seed(settings.seed + step)
            revive(codebook, self._gather(vectors), settings.min_code_share, generator)

    @torch.no_grad()
    def _fit_codebook(self) -> None:
        """k-means on batches to come, enough of them for every code to have some vectors."""
        settings, codebook = self.cfg.training, self.dvae.codebook
        model = self.accelerator.unwrap_model(self.model)
        found, vectors = 0, []
        for number in count(settings.codebook_start_step):
            pieces = self._pieces(number)
            vectors.append(model.encode(pieces).transpose(1, 2)[pieces.valid])
            found += pieces.num_valid
            if len(vectors) >= FITTING_BATCHES and found >= 2 * self.dvae.config.num_codes:
                break
        initialize(codebook, self._gather(torch.cat(vectors)), settings.seed)
        # The averages stand for one batch.
        codebook.cluster_size.div_(len(vectors))
        codebook.embed_avg.div_(len(vectors))

    def _gather(self, vectors: torch.Tensor) -> torch.Tensor:
        """(N, dim) rows of all processes, in the same order on each."""
        if self.accelerator.num_processes == 1:
            return vectors
        padded = self.accelerator.pad_across_processes(vectors, dim=0, pad_index=math.nan)
        gathered = self.accelerator.gather(padded)
        return gathered[~gathered.isnan().any(dim=1)]

    def _evaluate(self, events: CallbackHandler, control: TrainerControl) -> TrainerControl:
        """Figures of the held-out clips; every process computes all of them, which is quicker than agreeing."""
        args, state = self.cfg.training, self.state
        figures = evaluate_dvae(self.dvae, self.mel_norms, self.held_out, self.accelerator.device)
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        control = self._record(metrics, events, control)
        control = events.on_evaluate(args, state, control, dict(metrics))
        value = metrics[args.metric_for_best_model]
        if state.best_metric is None or value < state.best_metric:
            state.best_metric, state.best_global_step = value, state.global_step
        return control

    def _record(self, logs: dict[str, Any], events: CallbackHandler, control: TrainerControl) -> TrainerControl:
        if not all(map(math.isfinite, logs.values())):
            raise UserError(
                f"The loss of step {self.state.global_step} is no number any more; lower training.learning_rate "
                f"({self.cfg.training.learning_rate:g}) and train into another training.output_dir."
            )
        self.state.log_history.append({**logs, "step": self.state.global_step})
        return events.on_log(self.cfg.training, self.state, control, dict(logs))


class _PrintLogs(TrainerCallback):
    """One line per log entry, on the main process."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print it."""
        if state.is_world_process_zero:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in logs.items())
            print(f"step {state.global_step:,} of {state.max_steps:,}: {figures}", flush=True)
