import io
import os
import signal
import subprocess
import sys
import time

import pytest
from accelerate import Accelerator
from conftest import make_config
from test_loop import run_training
from transformers import TrainerCallback

from tortoise_hf.callbacks.interrupt import InterruptCallback
from tortoise_hf.errors import Interrupted


class RaiseSignal(TrainerCallback):
    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_leaves(tmp_path, number, exit_code, capsys):
    cfg = make_config(tmp_path, training__eval_strategy="no", training__save_steps=100)
    before = signal.getsignal(number)
    owed = []
    interrupt = InterruptCallback(
        Accelerator(cpu=True), lambda: owed.append((tmp_path / "run" / "checkpoint-3").is_dir())
    )
    with pytest.raises(Interrupted) as stop:
        run_training(cfg, max_steps=50, extra=[interrupt, RaiseSignal(number, step=3)])
    assert owed == [True], "what waits to be pushed goes out when the step is saved, and before the run is left"
    assert stop.value.exit_code == exit_code
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    assert signal.getsignal(number) is before
    assert "then saving" in capsys.readouterr().out


def test_signals_are_given_back_at_the_end(tmp_path):
    cfg = make_config(tmp_path, training__eval_strategy="no")
    before = signal.getsignal(signal.SIGINT)
    run_training(cfg, max_steps=1, extra=[InterruptCallback(Accelerator(cpu=True))])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("error", [RuntimeError("reentrant call inside <_io.BufferedWriter>"), BrokenPipeError()])
def test_a_signal_in_the_middle_of_a_print_stops_the_run_as_well(error, monkeypatch, capfd):
    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    callback = InterruptCallback(Accelerator(cpu=True))
    monkeypatch.setattr(sys, "stdout", Busy())
    callback._note(signal.SIGINT, None)
    monkeypatch.undo()
    assert callback.received == signal.SIGINT
    assert ("Finishing this step" in capfd.readouterr().err) == isinstance(error, RuntimeError)


def test_a_second_signal_leaves_at_once():
    program = (
        "import time; from accelerate import Accelerator\n"
        "from tortoise_hf.callbacks.interrupt import InterruptCallback\n"
        "InterruptCallback(Accelerator(cpu=True)).on_train_begin(None, None, None)\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGINT)
        time.sleep(1.3)
        assert process.poll() is None  # the first one waits for the step
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=10) == 130
    finally:
        process.kill()
