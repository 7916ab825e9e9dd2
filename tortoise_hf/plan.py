"""The plan of a run: a value for every setting the user left out, with its reason.

Pure arithmetic over settings, facts about the data and a measurement (`measure.py`): no file is read and no tensor made
here. What the user set always stands. A run that goes on keeps the values it began with, so its numbers don't change
when the machine is busier than it was.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from tortoise_hf.calculator import Calculation, calculate
from tortoise_hf.config import PLANNED, Config
from tortoise_hf.optimizer_state import checkpoint_bytes
from tortoise_hf.units import format_bytes, format_seconds

SET_BY_USER = "set by you"
AS_BEGUN = "as this run began"

STEPS_PER_EPOCH = 8
"""Optimizer steps an epoch of a small dataset is cut into: enough for a gradient that differs from step to step."""
LARGEST_BATCH = 128
"""Clips per optimizer step of larger datasets. Source: the Colab guide's default."""
SMALLEST_BATCH = 8
HOURS_HEARD = 20
"""Hours of audio a run hears in all, within `EPOCHS`. Judged from the guide's decay epochs (20 to 72), not measured on
TorToiSe's weights; early stopping ends what is too long."""
EPOCHS = (10, 60)
EVALUATIONS = 20
"""Evaluations of a run."""
EVALUATION_SHARE = 0.1
"""Most of the run's time that evaluations may take."""
FORWARD_SHARE = 1 / 3
"""Cost of a clip in evaluation relative to training: a forward pass without the backward one, which costs twice it."""
LOG_LINES = 50
PATIENCE = 5
"""Evaluations without improvement: a quarter of the run."""
MOST_CLIPS_AT_ONCE = {"cuda": 32, "cpu": 8}
"""Micro-batches beyond which a device gets no faster; on a CPU larger ones only pad more."""
ENOUGH_CLIPS_AT_ONCE = 4
"""Micro-batch from which on memory isn't bought with time: below it, gradient checkpointing is tried."""
FEW_TRAIN_CLIPS = 128
FEW_EVAL_CLIPS = 20
"""Sizes below which the guide warns, too."""
MINUTES_PER_HOUR = 60


@dataclass(frozen=True)
class Facts:
    """What a plan goes by."""

    num_train_clips: int
    num_eval_clips: int
    minutes: float
    """Of the training clips."""
    num_processes: int = 1
    num_parameters: int = 0
    """Of the exported model."""
    num_trained: int | None = None
    """Of them, or of an adapter, those that a checkpoint keeps; None: all."""
    free_disk_bytes: int | None = None
    """Where the checkpoints will lie."""


@dataclass(frozen=True)
class Trial:
    """One size of micro-batch, tried on the longest clips."""

    micro_batch_size: int
    gradient_checkpointing: bool
    peak_bytes: int | None
    """Memory in use at most, optimizer state not included; None if it didn't fit."""


@dataclass(frozen=True)
class Measurement:
    """What training steps cost on this machine."""

    device: str
    """Kind of device: cuda or cpu."""
    usable_bytes: int
    """Memory a process may use, what it uses already included."""
    fixed_bytes: int
    """Memory in use before a batch comes: weights and gradients, on a CPU the whole process."""
    optimizer_bytes: int
    """Memory the optimizer adds in its first step."""
    trials: tuple[Trial, ...] = ()
    seconds_per_clip: float = 0.0
    """Forward and backward pass of a typical clip, at the micro-batch the plan takes."""

    def bytes_needed(self, micro_batch_size: int, gradient_checkpointing: bool) -> int | None:
        """Memory at most during a training step; extrapolated from the nearest smaller trial; None if it won't fit."""
        same = [trial for trial in self.trials if trial.gradient_checkpointing == gradient_checkpointing]
        for trial in same:
            if trial.peak_bytes is None and micro_batch_size >= trial.micro_batch_size:
                return None
        found = [trial for trial in same if trial.peak_bytes is not None]
        if not found:
            return None
        below = [trial for trial in found if trial.micro_batch_size <= micro_batch_size] or found[:1]
        trial = max(below, key=lambda trial: trial.micro_batch_size)
        growing = max(0, trial.peak_bytes - self.fixed_bytes)
        return round(self.fixed_bytes + growing * micro_batch_size / trial.micro_batch_size) + self.optimizer_bytes

    def fits(self, micro_batch_size: int, gradient_checkpointing: bool) -> bool:
        """Whether a training step of that size stays within `usable_bytes`."""
        needed = self.bytes_needed(micro_batch_size, gradient_checkpointing)
        return needed is not None and needed <= self.usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        """What `to_dict` gave."""
        return cls(**{**values, "trials": tuple(Trial(**trial) for trial in values["trials"])})


@dataclass(frozen=True)
class Prediction:
    """What the run will cost."""

    seconds: float | None
    memory_bytes: int | None
    """Of one process, on its device."""
    disk_bytes: int


@dataclass(frozen=True)
class Row:
    """A setting and where its value comes from."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Plan:
    """A config without gaps, and how it came about."""

    config: Config
    facts: Facts
    steps_per_epoch: int
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    prediction: Prediction
    measurement: Measurement | None = None

    def table(self) -> str:
        """The plan for people: a line per setting, then what it adds up to."""
        values = [in_words(row.value) for row in self.rows]
        widths = max(len(row.name) for row in self.rows), max(len(value) for value in values)
        lines = [self.head()]
        for row, value in zip(self.rows, values, strict=True):
            lines.append(f"  {row.name:<{widths[0]}}  {value:<{widths[1]}}  {row.origin}")
        return "\n".join(lines + self.closing_lines())

    def head(self) -> str:
        """What is planned for."""
        facts = self.facts
        return (
            f"Plan ({self.config.training.plan}) for {facts.num_train_clips:,} clips, {facts.minutes:.1f} minutes, to "
            f"train on and {facts.num_eval_clips:,} clips to evaluate on:"
        )

    def closing_lines(self) -> list[str]:
        """What the settings add up to, and what the user should know."""
        training, facts = self.config.training, self.facts
        rounds = accumulation(training.batch_size, training.micro_batch_size, facts)
        return [
            f"  = {training.max_steps:,} optimizer steps, {self.steps_per_epoch:,} per epoch; each of {rounds} "
            f"micro-batch{'es' * (rounds > 1)} on each of {facts.num_processes} process"
            f"{'es' * (facts.num_processes > 1)}",
            f"  {self._prediction_line()}",
            *(f"Warning: {warning}" for warning in self.warnings),
        ]

    def _prediction_line(self) -> str:
        prediction, parts = self.prediction, []
        if prediction.seconds is not None:
            parts.append(f"about {format_seconds(prediction.seconds)}")
        if prediction.memory_bytes is not None:
            parts.append(f"{format_bytes(prediction.memory_bytes)} of memory per process")
        parts.append(f"{prediction.disk_bytes / 1e9:.2f} GB of disk for checkpoints and export")
        return "Predicted: " + ", ".join(parts) + ("" if self.measurement else " (nothing was measured)") + "."

    def to_dict(self) -> dict[str, Any]:
        """What the run's record keeps, besides the config itself."""
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "warnings": list(self.warnings),
            "prediction": dataclasses.asdict(self.prediction),
            "measurement": self.measurement and self.measurement.to_dict(),
            "facts": dataclasses.asdict(self.facts),
        }


def accumulation(batch_size: int, micro_batch_size: int, facts: Facts) -> int:
    """Micro-batches of each process in an optimizer step."""
    return -(-min(batch_size, facts.num_train_clips) // (micro_batch_size * facts.num_processes))


def share_per_process(batch_size: int, facts: Facts) -> int:
    """Most clips of an optimizer step one process gets."""
    return -(-min(batch_size, facts.num_train_clips) // facts.num_processes)


def choose_batch_size(cfg: Config, facts: Facts) -> tuple[int, str]:
    """Clips per optimizer step, and why, where the user gave none."""
    clips = facts.num_train_clips
    if cfg.training.plan == "tortoise":
        return _calculate(cfg, facts).train_batch_size, "plan: the guide's 64, moved so that few clips are left over"
    target = min(clips, LARGEST_BATCH, max(SMALLEST_BATCH, clips // STEPS_PER_EPOCH))
    steps = -(-clips // target)
    size = -(-clips // steps)
    why = f"the Colab guide's {LARGEST_BATCH}" if target == LARGEST_BATCH else "an eighth of a small dataset"
    return size, f"plan: {why}, evened over the {steps} steps of an epoch"


def choose_micro_batch(cfg: Config, share: int, measurement: Measurement | None) -> tuple[int, bool, str]:
    """How many clips at once, whether to recompute activations, and why.

    Args:
        cfg: what the user set of the two stands.
        share: clips of an optimizer step one process gets; more at once are never needed.
        measurement: memory on this machine; None if it couldn't be measured.

    Returns: micro-batch size, gradient checkpointing, reason.
    """
    size, checkpointing = cfg.training.micro_batch_size, cfg.model.gradient_checkpointing
    if measurement is None:
        return size or min(share, ENOUGH_CLIPS_AT_ONCE), bool(checkpointing), "plan: nothing was measured"
    sizes = [size] if size else micro_batch_candidates(share, measurement.device)
    options = []
    for option in (False, True) if checkpointing is None else (checkpointing,):
        fitting = [one for one in sizes if measurement.fits(one, option)]
        options.append((max(fitting, default=0), option))
        if fitting and max(fitting) >= min(ENOUGH_CLIPS_AT_ONCE, sizes[-1]):
            break
    best, option = max(options, key=lambda pair: pair[0])
    if best == 0:
        return sizes[0], options[-1][1], "plan: the smallest; even it seems not to fit"
    why = "all of a step at once" if best == share else "the largest that helps on this device"
    if best < sizes[-1]:
        why = f"the largest that fits, {format_bytes(measurement.usable_bytes)} measured"
    return best, option, f"plan: {why}"


def micro_batch_candidates(share: int, device: str) -> list[int]:
    """Sizes worth trying, rising: powers of two, and last the largest of use."""
    largest = min(share, MOST_CLIPS_AT_ONCE.get(device, MOST_CLIPS_AT_ONCE["cpu"]))
    powers = [2**n for n in range(largest.bit_length()) if 2**n < largest]
    return [*powers, largest]


def resolve(
    cfg: Config, facts: Facts, measurement: Measurement | None = None, earlier: dict[str, Any] | None = None
) -> Plan:
    """Fill in what the user left out.

    Args:
        cfg: settings as given; None stands for left out.
        facts: about the data and the machine.
        measurement: on this machine; None if it couldn't be made.
        earlier: settings of the run that goes on, as `Config.to_dict` gave them; they win over the plan.

    Returns: the plan; its config has no gaps.
    """
    return _Resolver(cfg, facts, measurement, earlier).plan()


def _calculate(cfg: Config, facts: Facts) -> Calculation:
    own = cfg.training.batch_size
    sizes = {"batch_size": own, "fit_batch": False} if own else {}
    return calculate(facts.num_train_clips, facts.num_eval_clips, **sizes)


@dataclass
class _Resolver:
    cfg: Config
    facts: Facts
    measurement: Measurement | None
    earlier: dict[str, Any] | None
    values: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def plan(self) -> Plan:
        calculation = _calculate(self.cfg, self.facts) if self.cfg.training.plan == "tortoise" else None
        batch_size = self.choose("training.batch_size", *choose_batch_size(self.cfg, self.facts))
        self.choose_micro_batch(batch_size)
        steps_per_epoch = -(-self.facts.num_train_clips // batch_size)
        max_steps = self.choose_length(steps_per_epoch)
        self.choose_cadence(max_steps, calculation)
        self.choose_schedule(max_steps, calculation)
        patience = (0, "plan: the reference trainer never stops by itself") if calculation else (
            PATIENCE, "plan: so many evaluations without improvement end the run")  # fmt: skip
        self.choose("callbacks.early_stopping_patience", *patience)
        config = self.cfg.having(self.values)
        assert all(config.get(key) is not None for key in PLANNED if key != "optim.milestones")
        prediction = predict(config, self.facts, self.measurement)
        warnings = tuple(self.warnings(config, prediction, calculation))
        return Plan(config, self.facts, steps_per_epoch, tuple(self.rows), warnings, prediction, self.measurement)

    def choose(self, key: str, value: Any, reason: str, show: bool = True) -> Any:
        """What the user set, else what the run began with, else `value`."""
        given = self.cfg.get(key)
        section, name = key.split(".")
        before = self.earlier[section].get(name) if self.earlier else None
        if given is not None:
            value, reason = given, SET_BY_USER
        elif before is not None:
            value, reason = tuple(before) if isinstance(before, list) else before, AS_BEGUN
        self.values[key] = value
        if show:
            self.rows.append(Row(key, value, reason))
        return value

    def choose_micro_batch(self, batch_size: int) -> None:
        share = share_per_process(batch_size, self.facts)
        size, checkpointing, reason = choose_micro_batch(self.cfg, share, self.measurement)
        size = self.choose("training.micro_batch_size", size, reason)
        why = "plan: memory would not do without it" if checkpointing else "plan: memory does without it"
        key = "model.gradient_checkpointing"
        self.choose(key, checkpointing, why, show=checkpointing or self.was_set(key))
        key = "training.eval_batch_size"
        if self.cfg.training.plan == "tortoise":
            value, why = _calculate(self.cfg, self.facts).eval_batch_size, "plan: the guide's 16, moved likewise"
        else:
            value, why = size, "plan: as training.micro_batch_size; the result doesn't depend on it"
        self.choose(key, value, why, show=self.cfg.training.plan == "tortoise" or self.was_set(key))

    def was_set(self, key: str) -> bool:
        return self.cfg.get(key) is not None

    def choose_length(self, steps_per_epoch: int) -> int:
        key = "training.max_steps"
        if not self.was_set(key) and (self.earlier is None or self.was_set("training.num_train_epochs")):
            epochs = self.choose("training.num_train_epochs", *self.epochs())
            self.values[key] = epochs * steps_per_epoch
            return self.values[key]
        max_steps = self.choose(key, 0, "")
        self.values["training.num_train_epochs"] = -(-max_steps // steps_per_epoch)
        return max_steps

    def epochs(self) -> tuple[int, str]:
        if self.cfg.training.plan == "tortoise":
            return 88, "plan: the guide's last milestone is epoch 72; one interval more"
        fewest, most = EPOCHS
        wanted = math.ceil(HOURS_HEARD * MINUTES_PER_HOUR / max(self.facts.minutes, 1e-9))
        epochs = max(fewest, min(most, wanted))
        if wanted > most:
            return epochs, f"plan: the most; {HOURS_HEARD} hours of listening would be {wanted:,}"
        if wanted < fewest:
            return epochs, "plan: the fewest"
        return epochs, f"plan: {HOURS_HEARD} hours of listening in all"

    def choose_cadence(self, max_steps: int, calculation: Calculation | None) -> None:
        facts = self.facts
        if calculation:
            logging = calculation.logging_steps, "plan: an epoch, within 20 and 100"
            evaluating = calculation.eval_steps, "plan: three times the log's"
            saving = calculation.save_steps, "plan: likewise"
        else:
            logging = max(1, min(20, max_steps // LOG_LINES)), f"plan: about {LOG_LINES} lines, at most 20 steps apart"
            evaluating = self.auto_eval_steps(max_steps)
            saving = None
        self.choose_steps("logging_steps", "logging_strategy", max_steps, *logging)
        eval_steps = self.choose_steps(
            "eval_steps", "eval_strategy", max_steps, *evaluating, show=facts.num_eval_clips > 0
        )
        self.choose_steps(
            "save_steps", "save_strategy", max_steps, *(saving or (eval_steps, "plan: with every evaluation"))
        )

    def auto_eval_steps(self, max_steps: int) -> tuple[int, str]:
        facts, batch_size = self.facts, min(self.values["training.batch_size"], self.facts.num_train_clips)
        often = -(-max_steps // EVALUATIONS)
        cheap = math.ceil(facts.num_eval_clips * FORWARD_SHARE / (EVALUATION_SHARE * batch_size))
        if cheap > often:
            return min(cheap, max_steps), f"plan: evaluations take at most {EVALUATION_SHARE:.0%} of the time"
        return often, f"plan: {EVALUATIONS} evaluations"

    def choose_steps(self, name: str, strategy: str, max_steps: int, value: int, reason: str, show: bool = True) -> int:
        """A cadence in whole steps, whatever unit the user gave it in."""
        key, strategy = f"training.{name}", f"training.{strategy}"
        if self.cfg.get(strategy) != "steps":
            self.rows.append(Row(strategy, self.cfg.get(strategy), SET_BY_USER))
            show = False
        value = self.choose(key, value, reason, show=False)
        steps = math.ceil(value * max_steps) if value < 1 else int(value)
        origin = reason if not self.was_set(key) else SET_BY_USER
        if self.earlier and not self.was_set(key):
            origin = AS_BEGUN
        if value < 1:
            origin += f": {value:g} of the run"
        self.values[key] = steps
        if show:
            self.rows.append(Row(key, steps, origin))
        return steps

    def choose_schedule(self, max_steps: int, calculation: Calculation | None) -> None:
        optim = self.cfg.optim
        default = next(f.default for f in dataclasses.fields(optim) if f.name == "learning_rate")
        self.rows.append(
            Row(
                "optim.learning_rate",
                f"{optim.learning_rate:g}",
                "default" if optim.learning_rate == default else SET_BY_USER,
            )
        )
        if calculation:
            schedule = "tortoise_multistep", "plan: the reference trainer's"
            milestones = calculation.milestones, "plan: epochs 20, 40, 56 and 72"
            warmup = 0, "plan: the reference trainer has none"
        else:
            schedule = "cosine", "plan: falls to optim.min_lr_ratio at the end"
            if optim.milestones:
                schedule = "multistep", "plan: because optim.milestones are set"
            milestones = (
                tuple(max(1, max_steps * share // 100) for share in (50, 75, 90)),
                ("plan: at 50, 75 and 90 % of the run"),
            )
            warmup = min(50, max_steps // 20), "plan: a twentieth of the run, at most 50"
        name = self.choose("optim.lr_schedule", *schedule)
        if "multistep" in name:
            self.choose("optim.milestones", *milestones)
        self.choose("optim.warmup_steps", *warmup)

    def _more_evals(self, config: Config) -> str:
        """How to evaluate on more clips, if there are clips to spare."""
        lacking = FEW_EVAL_CLIPS - self.facts.num_eval_clips
        if config.data.eval_list is not None:
            return "Add clips to data.eval_list."
        if self.facts.num_train_clips - lacking < FEW_TRAIN_CLIPS:
            return "Holding back more would leave too little to train on; only more recordings help."
        return f"Hold back more with data.min_eval_clips {FEW_EVAL_CLIPS}."

    def warnings(self, config: Config, prediction: Prediction, calculation: Calculation | None) -> list[str]:
        facts, found = self.facts, []
        clips, evals, batch_size = facts.num_train_clips, facts.num_eval_clips, config.training.batch_size
        if calculation:
            found += [warning.removeprefix("WARNING: ") for warning in calculation.warnings]
        else:
            if clips < FEW_TRAIN_CLIPS:
                found.append(
                    f"{clips} training clips are few (under {FEW_TRAIN_CLIPS}); expect a voice that is learnt by heart "
                    "early. More recordings help more than any setting."
                )
            if clips < batch_size:
                found.append(
                    f"{clips} training clips are fewer than training.batch_size {batch_size}; every step sees all of "
                    "them."
                )
            if evals < FEW_EVAL_CLIPS:
                found.append(
                    f"{evals} evaluation clips are few (under {FEW_EVAL_CLIPS}); small changes of the eval loss mean "
                    f"little. {self._more_evals(config)}"
                    if evals
                    else "there are no evaluation clips: nothing tells when to stop or which checkpoint is best."
                )
        needed = prediction.memory_bytes
        if self.measurement and needed is not None and needed > self.measurement.usable_bytes:
            found.append(
                f"this needs about {format_bytes(needed)} of memory and {format_bytes(self.measurement.usable_bytes)} "
                "can be used; lower training.micro_batch_size or set model.gradient_checkpointing true."
            )
        elif self.measurement and needed is None:
            found.append(
                f"training.micro_batch_size {config.training.micro_batch_size} did not fit in memory when it was "
                "tried; lower it or set model.gradient_checkpointing true."
            )
        free = facts.free_disk_bytes
        if free is not None and prediction.disk_bytes > free:
            found.append(
                f"checkpoints and export need {prediction.disk_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free "
                "there; name another training.output_dir or lower training.save_total_limit."
            )
        return found


def predict(config: Config, facts: Facts, measurement: Measurement | None) -> Prediction:
    """Time, memory and disk of a config without gaps."""
    training = config.training
    kept = training.save_total_limit + 2  # the newest, the best, the one being written; then the export's two files
    trained = facts.num_parameters if facts.num_trained is None else facts.num_trained
    checkpoint = checkpoint_bytes(trained, training.optimizer_state, config.optim.optimizer)
    weights = checkpoint_bytes(facts.num_parameters, "none")
    disk_bytes = kept * checkpoint + 2 * weights
    if measurement is None:
        return Prediction(None, None, disk_bytes)
    seconds = None
    if measurement.seconds_per_clip:
        trained = min(training.batch_size, facts.num_train_clips) * training.max_steps
        evaluations = 1 + training.max_steps // training.eval_steps if training.eval_strategy == "steps" else (
            1 + training.num_train_epochs)  # fmt: skip
        if training.eval_strategy == "no":
            evaluations = 0
        clips = trained + evaluations * facts.num_eval_clips * FORWARD_SHARE
        seconds = measurement.seconds_per_clip * clips / facts.num_processes
    memory = measurement.bytes_needed(training.micro_batch_size, config.model.gradient_checkpointing)
    return Prediction(seconds, memory, disk_bytes)


def in_words(value: Any) -> str:
    """A setting's value as people write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return " ".join(str(one) for one in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
