"""Scripts in processes of their own: what they say, and how they are stopped."""

import os
import signal
import sys
import threading
import time

import pytest

from tortoise_hf.notebook.program import Program, find_script, interrupts_go_to, launch_command


def start(tmp_path, code):
    return Program([sys.executable, "-u", "-c", code], dict(os.environ), tmp_path / "logs" / "program.log")


def test_what_it_says_is_kept(tmp_path):
    program = start(
        tmp_path, "print('one'); print('10 %\\r90 %\\rdone'); import sys; print('ä', file=sys.stderr, end='')"
    )
    looks = []
    assert program.wait(lambda: looks.append(1)) == 0
    assert list(program.lines) == ["one", "done", "ä"]
    assert program.last == "ä"
    assert looks
    assert (tmp_path / "logs" / "program.log").read_text(encoding="utf-8") == "one\ndone\nä\n"


def test_a_progress_bar_is_one_line(tmp_path):
    program = start(tmp_path, "import time\nfor n in range(3): print(f'\\r{n} of 3', end=''); time.sleep(.2)")
    seen = set()
    program.wait(lambda: seen.add(program.last))
    assert list(program.lines) == ["2 of 3"]
    assert program.tail() == "2 of 3"
    assert program.error() == ""


def test_a_failure_is_its_exit_code(tmp_path):
    program = start(tmp_path, "print('hello'); print('error: so it is:\\n  one\\n  two'); raise SystemExit(3)")
    assert program.wait(lambda: None) == 3
    assert program.tail(2) == "  one\n  two"
    assert program.error() == "error: so it is:\n  one\n  two"


PATIENT = """
import signal, time
count = 0
def note(*_):
    global count
    count += 1
    print(f"signal {count}", flush=True)
signal.signal(signal.SIGINT, note)
print("ready", flush=True)
while count < 1: time.sleep(0.01)
time.sleep(0.5)
print(f"end after {count}", flush=True)
"""


def test_interrupt_reaches_it_once_and_not_the_cell(tmp_path):
    program = start(tmp_path, PATIENT)

    def press():
        while "ready" not in program.lines:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    presser = threading.Thread(target=press)
    presser.start()
    with interrupts_go_to(program):
        assert program.wait(lambda: None) == 0
    presser.join()
    assert program.tail() == "ready\nsignal 1\nend after 1"
    assert program.interrupts == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_it_ends_only_when_all_its_processes_have(tmp_path):
    """A launcher that is interrupted may be gone before those it launched have saved."""
    late = "import time; time.sleep(1); print('late')"
    program = start(tmp_path, f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {late!r}])")
    program.wait(lambda: None)
    assert list(program.lines) == ["late"]
    program.interrupt()  # whoever is gone needs no signal
    assert program.interrupts == 1


def test_scripts_are_found(repository):
    assert find_script("train.py") == repository / "scripts" / "train.py"
    with pytest.raises(ValueError, match=r"no_such\.py is neither in"):
        find_script("no_such.py")


def test_one_card_needs_no_launcher_and_two_do(repository):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    script = repository / "scripts" / "train.py"
    command, env = launch_command(script, ["--config", "x.yaml"], 1, "fp16")
    assert command == [sys.executable, str(script), "--config", "x.yaml"]
    assert env["ACCELERATE_MIXED_PRECISION"] == "fp16"
    command, _ = launch_command(script, ["--config", "x.yaml"], 2, "bf16")
    args = launch_command_parser().parse_args(command[3:])
    args = _validate_launch_command(args)[0]
    assert (args.num_processes, args.mixed_precision, args.multi_gpu) == (2, "bf16", True)
    assert args.training_script_args == ["--config", "x.yaml"]
