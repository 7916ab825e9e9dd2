"""What a run computes on."""

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import imports

from tortoise_hf.errors import UserError
from tortoise_hf.machine import compile_blocks, describe, start_accelerator


def test_on_a_mac_the_processor_is_taken_and_the_reason_told(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert imports.is_mps_available()  # accelerate would take it
        accelerator = start_accelerator(0)
        assert accelerator.device.type == "cpu"
        assert "Apple's GPU is not used" in describe(accelerator)
    finally:
        monkeypatch.undo()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert "Apple" not in describe(start_accelerator(0))


def test_a_setting_accelerate_does_not_know_is_told_in_a_sentence(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "foo")
    with pytest.raises(UserError, match=r"'FOO' is not a valid DynamoBackend.*correct the flags"):
        start_accelerator(0)


@pytest.mark.parametrize("precision", ["fp99", "FP16"])
def test_a_precision_that_there_is_not_is_told_in_a_sentence(monkeypatch, precision):
    """Accelerate would compute in full precision and say nothing."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(UserError, match=f"told mixed precision {precision}, expected one of no, fp16, bf16; correct"):
        start_accelerator(0)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_has_no_blocks_is_not_compiled_and_says_so(monkeypatch, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    accelerator = start_accelerator(0)
    compile_blocks(accelerator, ())
    assert "Compiled in the first steps: nothing" in capsys.readouterr().out
    model = torch.nn.Linear(2, 2)
    assert accelerator.prepare(model) is model
    AcceleratorState._reset_state(reset_partial_state=True)
