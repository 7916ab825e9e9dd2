"""What a run computes on."""

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import imports

from tortoise_hf.machine import describe, start_accelerator


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
