"""Everything a user can set: its meaning, its unit and its default.

Eight sections (`data`, `model`, `lora`, `optim`, `training`, `callbacks`, `samples`, `hub`) of frozen dataclasses.
`cli.py` fills them from YAML files and flags; tests and notebooks build them directly. A setting of `PLANNED` that is
None is chosen by the plan (`plan.py`). Only the standard library is imported here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

MAX_MODEL_TEXT_IDS = 402
"""Text ids of the released model's position table (its max_text_tokens)."""
MAX_MODEL_MEL_CODES = 604
"""Mel codes of the released model's position table (max_mel_tokens)."""

PLANNED = (
    "training.num_train_epochs", "training.max_steps", "training.batch_size", "training.micro_batch_size",
    "training.eval_batch_size", "training.logging_steps", "training.eval_steps", "training.save_steps",
    "model.gradient_checkpointing", "optim.lr_schedule", "optim.warmup_steps", "optim.milestones",
    "callbacks.early_stopping_patience",
)  # fmt: skip
"""Settings that may be left to the plan."""


def default_cache_dir() -> str:
    """`$TORTOISE_HF_CACHE`, or `~/.cache/tortoise_hf`."""
    return os.environ.get("TORTOISE_HF_CACHE") or str(Path.home() / ".cache" / "tortoise_hf")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which recordings, which of them count, and how they become batches."""

    root: str
    """Folder that holds metadata.csv and wavs/, an archive (.zip, .tar, .tar.gz, .tgz) of such a folder, or the id of a
    dataset on the Hub (owner/name)."""
    train_list: str | None = None
    """List file of the training clips, relative to root. Left out: metadata.csv, train.txt and the like are tried."""
    eval_list: str | None = None
    """List file of the evaluation clips. Left out: val.txt and the like if there, otherwise clips are split off."""
    eval_fraction: float = 0.05
    """Share of the clips split off for evaluation when there is no list for it."""
    min_eval_clips: int = 8
    """Fewest clips split off, as long as at least half stay for training."""
    max_eval_clips: int = 200
    """Most clips split off."""
    metadata_text: Literal["normalized", "raw"] = "normalized"
    """Column of a three-column metadata.csv that is the transcript: the last (normalized) or the second (raw)."""
    split: str = "train"
    """Split of a Hub dataset."""
    eval_split: str | None = None
    """Split of a Hub dataset used for evaluation. Left out: clips are split off."""
    audio_column: str = "audio"
    """Column of a Hub dataset that holds the recordings."""
    text_column: str | None = None
    """Column of a Hub dataset with the transcripts. Left out: normalized_text, text, sentence or transcription."""
    speaker_column: str | None = None
    """Column of a Hub dataset that names the speaker. Left out: one speaker."""
    streaming: bool = False
    """Read a Hub dataset row by row instead of downloading all of it first."""
    min_seconds: float = 0.6
    """Shortest clip kept, in seconds. Source of the default: DL-Art-School's 0.6 s."""
    max_samples: int = 255_995
    """Longest clip kept, in samples at 22 050 Hz (11.6 s). Source of the default: EXAMPLE_gpt.yml."""
    max_text_ids: int = 200
    """Most text ids of a clip kept. Source of the default: EXAMPLE_gpt.yml."""
    missing: Literal["skip", "error"] = "skip"
    """What a clip without its audio file does: be left out and counted, or stop the run."""
    allow_outside: bool = False
    """Follow paths and links that lead out of the dataset folder."""
    cache_dir: str = field(default_factory=default_cache_dir)
    """Where prepared examples and unpacked archives are kept."""
    num_proc: int = 1
    """Processes that prepare examples."""
    num_workers: int = 0
    """Processes per GPU that collate batches while the model works; 0 does it in between."""
    num_conditioning_clips: int = 2
    """Reference clips a training row is conditioned on; their vectors are averaged, as when the voice speaks."""
    conditioning_seconds: float = 6.0
    """Length of a reference clip, in seconds. Source: 132 300 samples at 22 050 Hz in tortoise-tts."""
    conditioning_group: int = 1
    """Training rows of one speaker in a step that share their reference clips, which say what none of them says. At 8
    the conditioning encoder costs an eighth; the clips are as many, but a step hears fewer of them."""
    padding: Literal["mask", "stop"] = "mask"
    """mask: padding counts for nothing. stop: padding is filled with stop tokens that count, as in the reference
    trainer; for comparisons only."""

    def __post_init__(self) -> None:
        """Check ranges; `ValueError` names the key."""
        _require(0 <= self.eval_fraction < 1, f"data.eval_fraction must be in [0, 1), got {self.eval_fraction}")
        _require(self.min_eval_clips >= 0, f"data.min_eval_clips must be 0 or more, got {self.min_eval_clips}")
        _require(
            self.max_eval_clips >= max(1, self.min_eval_clips),
            f"data.max_eval_clips must be at least data.min_eval_clips and 1, got {self.max_eval_clips}",
        )
        _require(self.min_seconds > 0, f"data.min_seconds must be above 0 seconds, got {self.min_seconds}")
        # A row holds len // 1024 + 1 codes and START; 604 codes are what the position table allows for.
        most_samples = MAX_MODEL_MEL_CODES * 1024 - 1
        _require(
            self.min_seconds * 22_050 <= self.max_samples <= most_samples,
            f"data.max_samples must lie between data.min_seconds and the model's wall of {most_samples:,} samples "
            f"({MAX_MODEL_MEL_CODES} codes), got {self.max_samples:,}",
        )
        _require(
            1 <= self.max_text_ids <= MAX_MODEL_TEXT_IDS,
            f"data.max_text_ids must lie between 1 and the model's wall of {MAX_MODEL_TEXT_IDS}, "
            f"got {self.max_text_ids}",
        )
        _require(self.num_proc >= 1, f"data.num_proc must be 1 or more, got {self.num_proc}")
        _require(self.num_workers >= 0, f"data.num_workers must be 0 or more, got {self.num_workers}")
        _require(
            self.num_conditioning_clips >= 1,
            f"data.num_conditioning_clips must be 1 or more, got {self.num_conditioning_clips}",
        )
        _require(
            self.conditioning_group >= 1, f"data.conditioning_group must be 1 or more, got {self.conditioning_group}"
        )
        _require(
            0.5 <= self.conditioning_seconds <= 30,
            f"data.conditioning_seconds must lie between 0.5 and 30 seconds, got {self.conditioning_seconds}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights the run starts from."""

    base: str = "released"
    """released: TorToiSe's own weights from the Hub. Otherwise a folder (config.json, model.safetensors,
    tokenizer.json, mel_norms.safetensors, dvae/; what it lacks comes from the released files), an autoregressive .pth
    or .safetensors file, or a voice on the Hub (owner/name or owner/name@revision)."""
    weights_dir: str | None = None
    """Folder with the released files (autoregressive.pth, dvae.pth, tokenizer.json, mel_norms.pth) for machines without
    a network."""
    tokenizer: str | None = None
    """Another tokenizer.json than base's; tokens both know keep their embeddings. Left out: base's own."""
    from_scratch: bool = False
    """Start from random weights of base's size instead of its weights."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: about a third slower, far less memory. Left out: the plan chooses."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train small matrices beside frozen weights (LoRA) instead of them: less memory, files of megabytes."""

    rank: int = 0
    """Rank of the matrices, 1 to 256: what they can express, and their size. 0 trains the weights themselves."""
    alpha: float = 32.0
    """Strength: what the matrices add is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Probability that a value on its way into the matrices is left out, in [0, 1)."""
    conditioning_encoder: bool = False
    """Adapt the layers that listen to the reference clips as well."""
    embeddings: bool = False
    """Adapt the tables of text tokens, mel codes and positions as well."""
    heads: bool = False
    """Adapt the layers that predict text tokens and mel codes as well."""

    def __post_init__(self) -> None:
        """Check ranges; `ValueError` names the key."""
        _require(0 <= self.rank <= 256, f"lora.rank must lie between 1 and 256, or be 0 for no LoRA, got {self.rank}")
        _require(self.alpha > 0, f"lora.alpha must be above 0, got {self.alpha}")
        _require(0 <= self.dropout < 1, f"lora.dropout must be in [0, 1), got {self.dropout}")
        for name in ("conditioning_encoder", "embeddings", "heads"):
            _require(
                self.rank > 0 or not getattr(self, name),
                f"lora.{name} is true, but lora.rank is 0 and trains all weights; set a rank, 16 for instance",
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its learning rate and what the loss weighs. Defaults: DL-Art-School's EXAMPLE_gpt.yml."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps AdamW's memory in 8 bits: 2 bytes per trained weight instead of 8 (needs the 8bit extra). Where
    that can't be had a line says so, and the run goes on with adamw."""

    learning_rate: float = 1e-5
    """Highest learning rate of the run."""
    weight_decay: float = 0.01
    """AdamW weight decay of matrices; biases, norms and embeddings have none."""
    beta1: float = 0.9
    """AdamW: decay of the gradient's mean."""
    beta2: float = 0.96
    """AdamW: decay of the squared gradient's mean."""
    eps: float = 1e-8
    """AdamW: added to the denominator."""
    max_grad_norm: float = 4.0
    """Largest L2 norm of the gradients of each parameter group; larger ones are scaled down to it."""
    lr_schedule: Literal["constant", "linear", "cosine", "multistep", "tortoise_multistep", "inverse_sqrt"] | None = (
        None
    )
    """How the learning rate falls over the run; tortoise_multistep is the reference trainer's multistep, whose
    milestones act two steps earlier. Left out: the plan chooses."""
    warmup_steps: int | None = None
    """Optimizer steps over which the learning rate rises linearly from 0. Left out: the plan chooses."""
    milestones: tuple[int, ...] | None = None
    """Schedules multistep: optimizer steps after which the learning rate is multiplied by gamma. Left out: the plan
    chooses."""
    gamma: float = 0.5
    """Schedules multistep: the factor."""
    min_lr_ratio: float = 0.0
    """Schedules linear and cosine: the last learning rate, as a share of learning_rate."""
    text_loss_weight: float = 0.01
    """Weight of the text head's loss. Source: EXAMPLE_gpt.yml."""
    mel_loss_weight: float = 1.0
    """Weight of the mel head's loss. Source: EXAMPLE_gpt.yml."""

    def __post_init__(self) -> None:
        """Check ranges; `ValueError` names the key."""
        _require(self.learning_rate > 0, f"optim.learning_rate must be above 0, got {self.learning_rate}")
        _require(self.weight_decay >= 0, f"optim.weight_decay must be 0 or more, got {self.weight_decay}")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        _require(self.eps > 0, f"optim.eps must be above 0, got {self.eps}")
        _require(self.max_grad_norm > 0, f"optim.max_grad_norm must be above 0, got {self.max_grad_norm}")
        _require((self.warmup_steps or 0) >= 0, f"optim.warmup_steps must be 0 or more, got {self.warmup_steps}")
        _require(
            all(step >= 1 for step in self.milestones or ()),
            f"optim.milestones must be optimizer steps of 1 or more, got {list(self.milestones or ())}",
        )
        _require(0 < self.gamma <= 1, f"optim.gamma must be in (0, 1], got {self.gamma}")
        _require(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        for name in ("text_loss_weight", "mel_loss_weight"):
            _require(getattr(self, name) >= 0, f"optim.{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how often, how large a batch, and where results go.

    Carries the names transformers' callbacks ask `TrainingArguments` for, so the stock ones run unmodified; the ones a
    user doesn't set are properties below. Every `_steps` counts optimizer steps.
    """

    output_dir: str
    """Folder of the run: checkpoints, log, exported model."""
    plan: Literal["auto", "tortoise"] = "auto"
    """Who chooses what is left out: auto goes by the clips and by a measurement on this machine, tortoise by the
    calculator of the Colab guide."""
    max_steps: int | None = None
    """Optimizer steps of the run; wins over num_train_epochs. Left out: num_train_epochs decides."""
    num_train_epochs: int | None = None
    """Times every clip is seen. Left out: the plan chooses."""
    batch_size: int | None = None
    """Clips per optimizer step, over all processes and micro-batches. Left out: the plan chooses."""
    micro_batch_size: int | None = None
    """Most clips one device works on at once; the rest of its share is accumulated. Left out: the plan chooses."""
    eval_batch_size: int | None = None
    """Clips one device evaluates at once; the result doesn't depend on it. Left out: as many as it trains on."""
    logging_strategy: Literal["steps", "epoch"] = "steps"
    """Log every logging_steps or after every epoch; the first step is always logged."""
    logging_steps: int | float | None = None
    """Optimizer steps between two log lines; a number below 1 is a share of the run. Left out: the plan chooses."""
    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    """Evaluate every eval_steps, after every epoch, or never."""
    eval_steps: int | float | None = None
    """Optimizer steps between two evaluations; a number below 1 is a share of the run. One more comes before the first
    step and one after the last. Left out: the plan chooses."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """Save a checkpoint every save_steps, after every epoch, or only at the end (no)."""
    save_steps: int | float | None = None
    """Optimizer steps between two checkpoints; a number below 1 is a share of the run. Left out: the plan chooses."""
    save_total_limit: int = 2
    """Newest checkpoints kept; the best one is kept besides."""
    optimizer_state: Literal["full", "8bit", "none"] = "full"
    """What a checkpoint keeps of AdamW's memory: all of it (a resumed run is exact), rounded to 8 bits (a quarter of
    the bytes; nearly exact), or nothing (a resumed run has to gather it anew)."""
    resume: str = "auto"
    """auto: go on where the run in output_dir stopped, if there is one. never: refuse a folder that holds a run.
    Otherwise the folder of a checkpoint to go on from, or hub:owner/name for checkpoints pushed there
    (hub.checkpoint_repo_id)."""
    seed: int = 1234
    """Seed of weights made from scratch, clip order, conditioning clips and dropout."""

    def __post_init__(self) -> None:
        """Check ranges; `ValueError` names the key."""
        sizes = ("batch_size", "micro_batch_size", "eval_batch_size")
        for name in ("max_steps", "num_train_epochs", *sizes, "save_total_limit"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"training.{name} must be 1 or more, got {value}")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            hint = "" if name == "logging_steps" else "; switch it off with strategy no"
            _require(
                value is None or 0 < value < 1 or (value >= 1 and value == int(value)),
                f"training.{name} must be a whole number of steps, 1 or more, or a share of the run below 1, "
                f"got {value}{hint}",
            )
        _require(self.seed >= 0, f"training.seed must be 0 or more, got {self.seed}")

    # What transformers' callbacks read from TrainingArguments besides the fields above.
    metric_for_best_model = "eval_loss"
    greater_is_better = False
    load_best_model_at_end = True  # EarlyStoppingCallback only asks whether best models are tracked; they are.
    logging_first_step = True
    eval_delay = 0
    report_to = ()
    run_name = None
    disable_tqdm = False

    @property
    def logging_dir(self) -> str:
        """Folder of TensorBoard's event files."""
        return str(Path(self.output_dir) / "logs")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values (the trackers log them)."""
        return dataclasses.asdict(self)

    def to_json_string(self) -> str:
        """The settings as JSON (the TensorBoard callback stores it)."""
        return json.dumps(self.to_dict(), indent=2)


@dataclass(frozen=True, kw_only=True)
class CallbackConfig:
    """Which extra callbacks run."""

    progress: bool = True
    """Show a progress bar; plain lines where the output is not a terminal."""
    tensorboard: bool = False
    """Write TensorBoard logs (needs the tensorboard extra)."""
    early_stopping_patience: int | None = None
    """Evaluations without improvement after which the run ends; 0 never ends it early. Left out: the plan chooses."""
    early_stopping_threshold: float = 0.0
    """Smallest fall of the eval loss that counts as an improvement, in nats."""

    def __post_init__(self) -> None:
        """Check ranges; `ValueError` names the key."""
        for name in ("early_stopping_patience", "early_stopping_threshold"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"callbacks.{name} must be 0 or more, got {value}")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """What the run lets be heard of itself: a few sentences, spoken roughly with the GPT and the DVAE alone."""

    enabled: bool = True
    """Speak before the first step and at every evaluation, into output_dir/samples, with a page to look and listen.
    Evaluations are passed over where speaking would take more than a tenth of the run's time."""
    texts: tuple[str, ...] | None = None
    """Sentences to speak; where a clip says one of them, its recording is played beside. Left out: what num_texts clips
    of medium length say that are kept back from training."""
    num_texts: int = 3
    """Sentences chosen where texts is left out."""

    def __post_init__(self) -> None:
        """Check ranges; `ValueError` names the key."""
        _require(1 <= self.num_texts <= 20, f"samples.num_texts must lie between 1 and 20, got {self.num_texts}")
        for text in self.texts or ():
            _require(any(map(str.isalnum, text)), f"samples.texts must hold sentences, got {text!r}")
        _require(self.texts is None or 1 <= len(self.texts) <= 20, "samples.texts must hold 1 to 20 sentences")


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Whether and how the voice goes to the Hugging Face Hub. The token comes from `hf auth login` or HF_TOKEN."""

    repo_id: str | None = None
    """Repository of the voice, owner/name; made if it isn't there. Left out: nothing is pushed."""
    push: Literal["end", "best", "checkpoint", "every_eval"] = "end"
    """When, besides the end of the run: never, at every new best evaluation, at every checkpoint, or at every
    evaluation (which then saves a checkpoint). Pushes run in the background."""
    adapter_only: bool = False
    """Push a LoRA run's adapter alone (tens of MB) instead of whole weights; whoever pulls it fetches its base as well,
    so that must be released or a voice on the Hub."""
    private: bool = True
    """Whether a new repository is only for its owner."""
    revision: str | None = None
    """Branch to push to. Left out: main."""
    consent: str | None = None
    """Whose voice it is and that they agree, in a sentence for the card. Nothing is pushed without it."""
    license: str = "apache-2.0"
    """Licence named in the card. Default: that of TorToiSe's own weights."""
    language: str = "en"
    """Language named in the card."""
    checkpoint_repo_id: str | None = None
    """Private repository for full checkpoints, from which `training.resume hub:owner/name` goes on elsewhere. Left out:
    they stay here."""

    def __post_init__(self) -> None:
        """Check names; `ValueError` names the key."""
        for name in ("repo_id", "checkpoint_repo_id"):
            value = getattr(self, name)
            _require(
                value is None or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}", value) is not None,
                f"hub.{name} must have the form owner/name, got {value!r}",
            )
        _require(
            self.repo_id is None or self.repo_id != self.checkpoint_repo_id,
            f"hub.checkpoint_repo_id must be another repository than hub.repo_id, got {self.repo_id!r} for both",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole experiment."""

    data: DataConfig
    model: ModelConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig
    training: TrainingConfig
    callbacks: CallbackConfig
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        """Check what several sections must agree on; `ValueError` names the keys."""
        _require(
            self.lora.rank == 0 or not self.model.from_scratch,
            "model.from_scratch is true and lora.rank above 0, but an adapter of random weights would teach nobody to "
            "speak; set one of them back",
        )
        _require(
            self.lora.rank > 0 or not self.hub.adapter_only,
            "hub.adapter_only is true, but lora.rank is 0, so all weights are trained and there is no adapter to push; "
            "set a rank, 16 for instance, or set hub.adapter_only to false",
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as a YAML file would hold them."""
        values = dataclasses.asdict(self)
        if self.optim.milestones is not None:
            values["optim"]["milestones"] = list(self.optim.milestones)
        if self.samples.texts is not None:
            values["samples"]["texts"] = list(self.samples.texts)
        return values

    def get(self, key: str) -> Any:
        """Value of `section.name`."""
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    def having(self, values: dict[str, Any]) -> Config:
        """A copy with other values, given as `section.name: value`."""
        changes: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, name = key.split(".")
            changes.setdefault(section, {})[name] = value
        return dataclasses.replace(
            self, **{name: dataclasses.replace(getattr(self, name), **new) for name, new in changes.items()}
        )
