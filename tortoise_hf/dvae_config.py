"""What can be set when a DVAE is trained: meaning, unit and default. Imports the standard library only.

Three sections, `data`, `model` and `training`, filled by `cli.py` as those of `config.py` are.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tortoise_hf.config import DataConfig

NOT_FOR_DVAE = ("max_text_ids", "num_conditioning_clips", "conditioning_seconds", "conditioning_group", "padding",
                "num_workers")  # fmt: skip
"""Settings of `data` that only the GPT's training reads; here they aren't offered."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class DVAEModelConfig:
    """Sizes of the DVAE; a code always stands for four mel frames."""

    hidden_size: int = 512
    """Channels after the first convolution; twice as many after the second. 512 is the released DVAE."""
    codebook_dim: int = 512
    """Length of a codebook vector."""
    num_codes: int = 8192
    """Codebook vectors: what the GPT's num_mel_codes has to be. At most 32768."""
    num_resnet_blocks: int = 3
    """Residual blocks in the encoder and in the decoder; with each a code hears two codes further to both sides."""
    mel_norms: str | None = None
    """File with the 80 divisors of the mel spectrogram. Left out: measured on the training clips."""

    def __post_init__(self) -> None:
        """Check ranges; `ValueError` names the key."""
        for name in ("hidden_size", "codebook_dim", "num_resnet_blocks"):
            _require(getattr(self, name) >= 1, f"model.{name} must be 1 or more, got {getattr(self, name)}")
        _require(2 <= self.num_codes <= 1 << 15, f"model.num_codes must lie between 2 and 32768, got {self.num_codes}")


@dataclass(frozen=True, kw_only=True)
class DVAETrainingConfig:
    """How long, how often, how large a batch, and where the result goes.

    The names are those transformers' callbacks ask for, as in `config.TrainingConfig`.
    """

    output_dir: str
    """Folder of the run and of its result: dvae/, mel_norms.safetensors, metrics.json, samples/."""
    max_steps: int = 3000
    """Optimizer steps of the run."""
    batch_size: int = 32
    """Pieces of clips per optimizer step, over all processes."""
    piece_codes: int = 48
    """Length of a piece, in codes of 46 ms."""
    learning_rate: float = 1e-3
    """Highest learning rate of the run; it falls to 2 % of that along a cosine."""
    warmup_steps: int = 50
    """Optimizer steps over which the learning rate rises linearly from 0."""
    max_grad_norm: float = 1.0
    """Largest L2 norm of the gradient; a larger one is scaled down to it."""
    codebook_start_step: int = 150
    """Optimizer steps in which the encoder's output goes to the decoder as it is. Then the codebook is fitted to it."""
    codebook_decay: float = 0.99
    """Share of the codebook's moving averages that an optimizer step leaves."""
    commitment_weight: float = 0.25
    """Weight of the encoder outputs' distance to their codebook vectors. Source: the VQ-VAE paper."""
    min_code_share: float = 0.05
    """A code used less often than this share of the mean is put elsewhere."""
    revival_steps: int = 20
    """Optimizer steps between two looks for such codes; in the last fifth of the run there is none."""
    logging_steps: int = 20
    """Optimizer steps between two log lines."""
    eval_steps: int = 250
    """Optimizer steps between two evaluations; one more comes after the last step."""
    save_steps: int = 250
    """Optimizer steps between two checkpoints; a new best evaluation is saved besides."""
    save_total_limit: int = 1
    """Newest checkpoints kept; the best one is kept besides."""
    half: bool = False
    """Round the result to float16, which halves its file; figures are those of the rounded weights."""
    num_samples: int = 3
    """Held-out clips that are made heard at the end: from their mel spectrogram, and from their codes."""
    seed: int = 1234
    """Seed of the weights, of the pieces and of the codebook."""

    def __post_init__(self) -> None:
        """Check ranges; `ValueError` names the key."""
        counts = ("max_steps", "batch_size", "piece_codes", "revival_steps", "save_total_limit")
        for name in (*counts, "logging_steps", "eval_steps", "save_steps"):
            _require(getattr(self, name) >= 1, f"training.{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("warmup_steps", "commitment_weight", "num_samples", "seed"):
            _require(getattr(self, name) >= 0, f"training.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            _require(getattr(self, name) > 0, f"training.{name} must be above 0, got {getattr(self, name)}")
        _require(
            0 <= self.codebook_start_step < self.max_steps,
            f"training.codebook_start_step must lie between 0 and training.max_steps {self.max_steps}, "
            f"got {self.codebook_start_step}",
        )
        for name in ("codebook_decay", "min_code_share"):
            _require(0 <= getattr(self, name) < 1, f"training.{name} must be in [0, 1), got {getattr(self, name)}")

    # What callbacks and run folders read besides the fields above.
    logging_strategy = eval_strategy = save_strategy = "steps"
    logging_first_step = True
    eval_delay = 0
    metric_for_best_model = "eval_loss"
    optimizer_state = "full"
    resume = "auto"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return dataclasses.asdict(self)

    def to_json_string(self) -> str:
        """The settings as JSON."""
        return json.dumps(self.to_dict(), indent=2)


@dataclass(frozen=True, kw_only=True)
class DVAERunConfig:
    """A whole run of `scripts/train_dvae.py`."""

    data: DataConfig = field(metadata={"hidden": NOT_FOR_DVAE})
    model: DVAEModelConfig
    training: DVAETrainingConfig

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as a YAML file would hold them, without what isn't offered."""
        values = dataclasses.asdict(self)
        for name in NOT_FOR_DVAE:
            del values["data"][name]
        return values

    @property
    def output_dir(self) -> Path:
        """`training.output_dir` as a path."""
        return Path(self.training.output_dir)
