"""The loop on tiny models: golden steps, equal gradients however a step is cut, events, resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import GOLDEN, golden_gpt, make_config
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import DefaultFlowCallback, EarlyStoppingCallback, TrainerCallback

from tortoise_hf.callbacks.checkpointing import CheckpointCallback
from tortoise_hf.callbacks.lr_schedule import LRScheduleCallback
from tortoise_hf.callbacks.run_log import RunLogCallback
from tortoise_hf.checkpoint import newest_sound_checkpoint, restore_callbacks
from tortoise_hf.config import Config
from tortoise_hf.data.collate import Collator, Example
from tortoise_hf.data.loader import EvalBatches, TrainBatches
from tortoise_hf.data.sampler import StepSampler
from tortoise_hf.errors import UserError
from tortoise_hf.loop import train
from tortoise_hf.optim import build_lr_scheduler, build_optimizer
from tortoise_hf.plan import Facts, resolve
from tortoise_hf.run import Run, start_or_resume
from tortoise_hf.step import optimizer_step


class RandomExamples(Dataset):
    """Clips of unequal length made of random ids."""

    def __init__(self, num_clips: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.examples = [
            Example(
                text_ids=rng.integers(3, 255, rng.integers(3, 12)),
                mel_codes=rng.integers(0, 256, rng.integers(4, 30)),
                conditioning_mel=rng.standard_normal((2, 80, 20), dtype=np.float32),
                index=index,
            )
            for index in range(num_clips)
        ]
        self.lengths = [len(e.text_ids) + len(e.mel_codes) for e in self.examples]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, draw):
        example = copy.copy(self.examples[draw.index])
        example.weight = draw.weight
        return example


def make_batches(cfg: Config, examples: RandomExamples, model) -> tuple[TrainBatches, EvalBatches]:
    collate = Collator.for_model(model.config, cfg.data.padding)
    training = cfg.training
    sampler = StepSampler(examples.lengths, training.batch_size, training.micro_batch_size, seed=training.seed)
    eval_sampler = StepSampler(examples.lengths, len(examples), training.eval_batch_size)
    return TrainBatches(examples, sampler, collate), EvalBatches(examples, eval_sampler, collate)


def run_training(cfg, num_clips=10, max_steps=6, extra=(), resume=False, model=None):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = model or golden_gpt(dropout=0.1)
    Path(cfg.training.output_dir).mkdir(exist_ok=True)
    train_batches, eval_batches = make_batches(cfg, RandomExamples(num_clips), model)
    optimizer = build_optimizer(model, cfg.optim)
    scheduler = build_lr_scheduler(optimizer, cfg.optim, max_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    callbacks = [
        DefaultFlowCallback(),
        LRScheduleCallback(),
        CheckpointCallback(accelerator, keep_last=cfg.training.save_total_limit),
        RunLogCallback(),
        *extra,
    ]
    output_dir = Path(cfg.training.output_dir)
    checkpoint = newest_sound_checkpoint(output_dir) if resume else None
    run = Run(output_dir, max_steps, "data", num_clips, checkpoint, None)
    state = start_or_resume(cfg, run, accelerator, model, optimizer, scheduler, callbacks)
    state = train(cfg, accelerator, model, optimizer, scheduler, train_batches, eval_batches, callbacks, state)
    return state, model


# --- one optimizer step ---------------------------------------------------------------------------------------------


def test_three_steps_equal_the_reference_trainers(tmp_path):
    golden, inputs = load_file(GOLDEN / "train_step.safetensors"), load_file(GOLDEN / "gpt.safetensors")
    with safe_open(GOLDEN / "train_step.safetensors", "pt") as file:
        log = json.loads(file.metadata()["log"])
    cfg = make_config(
        tmp_path, data__padding="stop", optim__lr_schedule="multistep", optim__milestones=(1,), training__batch_size=2
    )
    accelerator, model = Accelerator(cpu=True), golden_gpt()
    collate = Collator.for_model(model.config, "stop")
    micro_batches = []
    for row in range(2):
        num_samples = int(inputs["in.wav_lengths"][row])
        micro_batches.append(
            collate(
                [
                    Example(
                        text_ids=inputs["in.text"][row, : int(inputs["in.text_lengths"][row])].numpy(),
                        mel_codes=inputs["in.mel_codes"][row, : num_samples // 1024 + 1].numpy(),
                        conditioning_mel=inputs["in.cond_mels"][row].numpy(),
                        index=row,
                    )
                ]
            )
        )
    optimizer = build_optimizer(model, cfg.optim)
    scheduler = build_lr_scheduler(optimizer, cfg.optim, max_steps=3)
    gradients = {}
    for record in log:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(record["lr"], rel=1e-12)
        optimizer.register_step_pre_hook(
            lambda *_: gradients.update((n, p.grad.clone()) for n, p in model.named_parameters())
        )
        result = optimizer_step(cfg, accelerator, model, optimizer, micro_batches)
        scheduler.step()
        if record["step"] == 1:
            for key in (key for key in golden if key.startswith("out.clipped_grad_step1.")):
                torch.testing.assert_close(
                    gradients[key.removeprefix("out.clipped_grad_step1.")], golden[key], atol=2e-5, rtol=0
                )
        norms = [record["grad_norm_decay"], record["grad_norm_no_decay"]]
        assert result.grad_norms.tolist() == pytest.approx(norms, abs=1e-3)
        assert not result.skipped
    weights = dict(model.named_parameters())
    compared = [key for key in golden if key.startswith("out.after3.")]
    assert len(compared) >= 8
    for key in compared:
        torch.testing.assert_close(weights[key.removeprefix("out.after3.")], golden[key], atol=2e-5, rtol=0)


def step_gradients(cfg, micro_batch_size, num_clips=8):
    accelerator, model = Accelerator(cpu=True), golden_gpt()
    examples = RandomExamples(num_clips)
    sampler = StepSampler(examples.lengths, num_clips, micro_batch_size)
    batches = TrainBatches(examples, sampler, Collator.for_model(model.config, cfg.data.padding))
    optimizer = build_optimizer(model, cfg.optim)
    gradients = {}
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update((n, p.grad.clone()) for n, p in model.named_parameters())
    )
    result = optimizer_step(cfg, accelerator, model, optimizer, next(batches.steps()))
    return gradients, result.loss_values


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """8 clips of unequal length at once, 2 × 4, 3 micro-batches of unequal size, one by one: the same gradient."""
    cfg = make_config(tmp_path, optim__max_grad_norm=1e9)
    whole, values = step_gradients(cfg, 8)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3
    for micro_batch_size in (4, 3, 1):
        parts, part_values = step_gradients(cfg, micro_batch_size)
        torch.testing.assert_close(part_values, values, rtol=1e-6, atol=1e-6)
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-4)


def test_reference_padding_depends_on_the_cut(tmp_path):
    """What `padding: mask` is for: with the reference's padding the same clips give another gradient when cut."""
    cfg = make_config(tmp_path, data__padding="stop", optim__max_grad_norm=1e9)
    whole, _ = step_gradients(cfg, 8)
    parts, _ = step_gradients(cfg, 1)
    assert any(not torch.allclose(parts[name], whole[name], atol=1e-4) for name in whole)


# --- the loop -------------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    def __init__(self):
        self.events = []
        self.best_during_evaluate = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.events.append(("epoch_begin", state.global_step))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.events.append(("epoch_end", state.global_step))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        assert kwargs["model"].config.to_json_string()  # what the TensorBoard callback asks of it
        assert set(metrics) == {"eval_loss", "eval_mel_loss", "eval_text_loss"}
        self.events.append(("evaluate", state.global_step))
        self.best_during_evaluate.append((metrics["eval_loss"], state.best_metric))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert all(isinstance(value, (int, float)) for value in logs.values())
        self.events.append(("log", state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("train_end", state.global_step))

    def steps_of(self, event):
        return [step for name, step in self.events if name == event]


def test_events_come_on_exactly_the_steps_named(tmp_path):
    recorder = Recorder()
    cfg = make_config(tmp_path, training__eval_steps=4, training__save_steps=3, training__logging_steps=2)
    state, _ = run_training(cfg, num_clips=10, max_steps=7, extra=[recorder])  # 3 steps an epoch
    assert state.global_step == 7
    assert recorder.steps_of("evaluate") == [0, 4, 7]  # before the first step, on cadence, at the end
    assert {3, 6} <= set(recorder.steps_of("save"))
    assert recorder.steps_of("epoch_begin") == [0, 3, 6]
    assert recorder.steps_of("epoch_end") == [3, 6]
    assert recorder.steps_of("train_end") == [7]
    assert (tmp_path / "run" / "checkpoint-7" / "model.safetensors").is_file()
    first, second = recorder.best_during_evaluate[1:]
    assert first[1] is None  # during on_evaluate best_metric is still the one before
    assert second[1] == first[0]
    assert state.best_metric == min(first[0], second[0])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log == state.log_history
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 4, 6, 7]
    assert all(entry["clips_per_second"] > 0 for entry in log if "loss" in entry)


def test_epoch_strategies(tmp_path):
    recorder = Recorder()
    cfg = make_config(tmp_path, training__eval_strategy="epoch", training__save_strategy="epoch")
    run_training(cfg, num_clips=10, max_steps=6, extra=[recorder])
    assert recorder.steps_of("evaluate") == [0, 3, 6]
    assert set(recorder.steps_of("save")) == {3, 6}


def test_a_last_step_found_best_after_it_was_saved_counts_as_the_best(tmp_path):
    cfg = make_config(tmp_path, training__eval_strategy="epoch", training__save_steps=1, optim__lr_schedule="constant")
    state, _ = run_training(cfg, num_clips=10, max_steps=4)  # 3 steps an epoch: the last evaluation comes after all
    assert state.best_global_step == 4
    assert state.best_model_checkpoint == "checkpoint-4"
    saved = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["best_global_step"] == 4


def test_logging_by_epoch_still_shows_the_first_step(tmp_path):
    recorder = Recorder()
    cfg = make_config(tmp_path, training__logging_strategy="epoch", training__eval_strategy="no")
    state, _ = run_training(cfg, num_clips=10, max_steps=7, extra=[recorder])  # 3 steps an epoch
    assert [entry["step"] for entry in state.log_history] == [1, 3, 6, 7]


def test_logging_by_epoch_where_a_step_is_an_epoch(tmp_path):
    cfg = make_config(tmp_path, training__logging_strategy="epoch", training__eval_strategy="no")
    state, _ = run_training(cfg, num_clips=4, max_steps=3)
    assert [entry["step"] for entry in state.log_history] == [1, 2, 3]


@pytest.mark.parametrize(("every", "steps"), [(0.25, [5, 10, 15, 20]), (0.3, [6, 12, 18, 20])])
def test_a_share_of_the_run_is_a_cadence(tmp_path, every, steps):
    recorder = Recorder()
    open_cfg = make_config(tmp_path, training__eval_steps=every, training__max_steps=20)
    cfg = resolve(open_cfg, Facts(10, 10, 1.0)).config
    run_training(cfg, num_clips=10, max_steps=20, extra=[recorder])
    assert recorder.steps_of("evaluate") == [0, *steps]


def test_strategy_no_still_saves_the_end(tmp_path):
    recorder = Recorder()
    cfg = make_config(tmp_path, training__eval_strategy="no", training__save_strategy="no")
    run_training(cfg, max_steps=3, extra=[recorder])
    assert recorder.steps_of("evaluate") == []
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_training_learns(tmp_path):
    cfg = make_config(tmp_path, training__eval_steps=20, optim__lr_schedule="constant")
    state, _ = run_training(cfg, num_clips=4, max_steps=40)
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_resumed_equals_unbroken(tmp_path):
    """Weights, log and learning rate after 3 + 4 steps are those of 7, dropout and mid-epoch position included."""
    whole_cfg = make_config(tmp_path / "a", training__save_steps=3, training__eval_steps=100)
    broken_cfg = make_config(tmp_path / "b", training__save_steps=3, training__eval_steps=100)
    for cfg in (whole_cfg, broken_cfg):
        Path(cfg.training.output_dir).parent.mkdir()
    whole_state, whole = run_training(whole_cfg, num_clips=9, max_steps=7)

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(broken_cfg, num_clips=9, max_steps=7, extra=[Killed()])
    state, resumed = run_training(broken_cfg, num_clips=9, max_steps=7, resume=True)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    timing = {"clips_per_second", "tokens_per_second", "eta_seconds"}

    def without_timing(history):
        return [{k: v for k, v in entry.items() if k not in timing} for entry in history]

    assert without_timing(state.log_history) == without_timing(whole_state.log_history)


def test_early_stopping_ends_the_run_and_remembers_across_a_resume(tmp_path):
    cfg = make_config(tmp_path, training__eval_steps=1, optim__learning_rate=0.5)  # far too high: it only gets worse
    early = EarlyStoppingCallback(early_stopping_patience=2)
    state, _ = run_training(cfg, max_steps=30, extra=[early])
    assert state.global_step < 30
    saved = json.loads((tmp_path / "run" / f"checkpoint-{state.global_step}" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"] == {"early_stopping_patience_counter": 2}
    again = EarlyStoppingCallback(early_stopping_patience=2)
    state.stateful_callbacks = saved["stateful_callbacks"]
    restore_callbacks(state, [again])
    assert again.early_stopping_patience_counter == 2


def test_nan_gradients_leave_the_weights_alone_and_then_stop_the_run(tmp_path, capsys):
    model = golden_gpt()
    with torch.no_grad():
        model.mel_head.bias[3] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters()}
    cfg = make_config(tmp_path, training__eval_strategy="no")
    with pytest.raises(UserError, match="10 steps in a row"):
        run_training(cfg, max_steps=50, model=model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) or p.isnan().any(), name
    assert "the loss was NaN or infinite, the weights stay as they are. Clips: example " in capsys.readouterr().out


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path):
    from tortoise_hf.eval_loss import evaluate

    model, results = golden_gpt(), []
    for eval_batch_size in (1, 4, 16):
        cfg = make_config(tmp_path, training__eval_batch_size=eval_batch_size)
        _, eval_batches = make_batches(cfg, RandomExamples(10), model)
        results.append(evaluate(Accelerator(cpu=True), model, eval_batches, cfg.optim))
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=1e-6)
