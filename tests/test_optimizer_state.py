import pytest
import torch
from accelerate import Accelerator
from conftest import golden_gpt
from transformers import TrainerState

from tortoise_hf.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tortoise_hf.config import OptimConfig
from tortoise_hf.optim import build_lr_scheduler, build_optimizer
from tortoise_hf.optimizer_state import BLOCK, checkpoint_bytes, pack, quantise, unpack


def stepped(model, num_steps=3):
    cfg = OptimConfig(lr_schedule="constant", warmup_steps=0)
    optimizer = build_optimizer(model, cfg)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator) ** 4
        optimizer.step()
    return optimizer, build_lr_scheduler(optimizer, cfg, 10)


@pytest.mark.parametrize("shape", [(64, 100), (5000,), (3, 4, 999)])
def test_eight_bits_come_back_close(shape):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(shape, generator=generator) * 10 ** (6 * torch.rand(shape, generator=generator) - 6)
    square = mean.square()
    packed = pack({"state": {0: {"exp_avg": mean, "exp_avg_sq": square, "step": torch.tensor(3.0)}}}, "8bit")
    assert packed["state"][0]["exp_avg"]["codes"].dtype == torch.uint8
    values = unpack(packed)["state"][0]
    assert values["step"] == 3
    largest = quantise(mean, True)["scales"].repeat_interleave(BLOCK)[: mean.numel()].view(shape)
    assert ((values["exp_avg"] - mean).abs() <= largest / 100).all()
    assert (values["exp_avg_sq"] >= square * 0.9999).all()  # never smaller, so no step of AdamW grows
    assert (values["exp_avg_sq"][square > 1e-3 * square.max()] <= 1.2 * square[square > 1e-3 * square.max()]).all()


def test_zeros_stay_zero_and_small_tensors_stay_as_they_are():
    zeros = unpack(pack({"state": {0: {"exp_avg": torch.zeros(5000), "exp_avg_sq": torch.zeros(5000)}}}, "8bit"))
    assert not any(value.any() for value in zeros["state"][0].values())
    small = torch.randn(100)
    assert quantise(small, True) is small


@pytest.mark.parametrize("kind", ["full", "8bit", "none"])
def test_a_checkpoint_of_each_kind(tmp_path, kind, capsys):
    """Its size is what was announced, and the next step goes where it would have gone (nearly, or starting anew)."""
    accelerator, model = Accelerator(cpu=True), golden_gpt()
    optimizer, scheduler = stepped(model)
    parts = (accelerator, model, optimizer, scheduler)
    path = save_checkpoint(tmp_path, *parts, TrainerState(global_step=3), kind)
    num_weights = sum(p.numel() for p in model.parameters())
    written = sum(file.stat().st_size for file in path.iterdir())
    # Small tensors, names and random states weigh more in a model as small as this one.
    assert checkpoint_bytes(num_weights, kind) * 0.99 < written < checkpoint_bytes(num_weights, kind) * 1.4
    expected = {i: dict(values) for i, values in optimizer.state_dict()["state"].items()}
    fresh_model = golden_gpt()
    fresh, fresh_scheduler = stepped(fresh_model, num_steps=1)
    load_checkpoint(Checkpoint(path, 3), accelerator, fresh_model, fresh, fresh_scheduler)
    states = fresh.state_dict()["state"]
    assert ("holds no optimizer state" in capsys.readouterr().out) == (kind == "none")
    if kind == "none":
        assert not states
    for index, values in states.items():
        largest = float(expected[index]["exp_avg"].abs().max())
        tolerance = 0 if kind == "full" else largest / 60
        torch.testing.assert_close(values["exp_avg"], expected[index]["exp_avg"], atol=tolerance, rtol=0)
    for p, q in zip(model.parameters(), fresh_model.parameters(), strict=True):
        assert torch.equal(p, q)
        p.grad, q.grad = torch.full_like(p, 0.1), torch.full_like(q, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    fresh.step()
    moves = torch.cat([(p - b).detach().flatten() for p, b in zip(model.parameters(), before, strict=True)])
    fresh_moves = torch.cat([(q - b).detach().flatten() for q, b in zip(fresh_model.parameters(), before, strict=True)])
    apart = float((moves - fresh_moves).norm() / moves.norm())
    assert apart == 0 if kind == "full" else apart < (0.1 if kind == "8bit" else 2)
