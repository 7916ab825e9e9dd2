"""A script of this package in a process of its own: it has the GPU to itself, gives all of it back, and can be stopped.

The notebook's Interrupt reaches it once, as Ctrl-C would; it then finishes its step, saves and ends. If the notebook's
own process dies, it does the same.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import tortoise_hf
from tortoise_hf.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.5
LINES_KEPT = 200


def find_script(name: str) -> Path:
    """A script of this package: of the checkout the package lies in, or where a wheel put them.

    Raises: UserError: if it isn't there.
    """
    places = [
        Path(tortoise_hf.__file__).resolve().parents[1] / "scripts",
        Path(sysconfig.get_path("data")) / "share" / "tortoise_hf" / "scripts",
    ]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise UserError(f"{name} is neither in {' nor in '.join(map(str, places))}; install tortoise_hf again.")


def launch_command(
    script: Path, arguments: Sequence[str], num_processes: int, precision: str
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a script that trains: alone in its process, or one process per GPU."""
    # The variable also tells the script that it was launched, so that it ends with its parent.
    env = os.environ | {"ACCELERATE_MIXED_PRECISION": precision, "PYTHONUNBUFFERED": "1"}
    if num_processes == 1:
        return [sys.executable, str(script), *arguments], env
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    launcher += ["--num_machines", "1", "--dynamo_backend", "no", "--num_processes", str(num_processes)]
    return [*launcher, "--mixed_precision", precision, str(script), *arguments], env


class Program:
    """A running script; `lines` are the last it said, redrawn ones only as they are now."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log_path: Path) -> None:
        """Start it.

        Args:
            command: program and arguments.
            env: its environment.
            log_path: file that gets everything it says; what is in it stays.
        """
        self.lines: deque[str] = deque(maxlen=LINES_KEPT)
        self.last = ""
        """The line it is at, perhaps a progress bar."""
        self.interrupts = 0
        """How often it was told to stop."""
        # Its own session: a kernel that is interrupted signals all of its group, and the script shall hear it once.
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._reader = threading.Thread(target=self._read, args=(log_path.open("a", encoding="utf-8"),), daemon=True)
        self._reader.start()

    def interrupt(self) -> None:
        """What Ctrl-C does; a second one ends it at once."""
        self.interrupts += 1
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, look: Callable[[], Any]) -> int:
        """Wait for it, calling `look` now and then; its exit code."""
        while self._reader.is_alive():  # until nobody holds its output open: a launcher may end before its processes
            self._reader.join(SECONDS_BETWEEN_LOOKS)
            look()
        return self.process.wait()

    def tail(self, count: int = 15) -> str:
        """The last lines it said."""
        return "\n".join(list(self.lines)[-count:])

    def error(self) -> str:
        """The sentence it ended with, which may take several lines; empty if there was none."""
        lines = list(self.lines)
        starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        return "\n".join(lines[starts[0] :]) if starts else ""

    def _read(self, log: IO[str]) -> None:
        with log:
            rest = b""
            while chunk := self.process.stdout.read1(65_536):
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    self._say(line, log)
                if rest:
                    self.last = _shown(rest)
            if rest:
                self._say(rest, log)

    def _say(self, line: bytes, log: IO[str]) -> None:
        text = _shown(line)
        self.last = text or self.last
        self.lines.append(text)
        log.write(text + "\n")
        log.flush()


@contextmanager
def interrupts_go_to(program: Program) -> Iterator[None]:
    """Within it, the notebook's Interrupt stops the program instead of the cell."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: program.interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _shown(line: bytes) -> str:
    """A line as a terminal would show it in the end: what stands behind the last carriage return."""
    text = line.decode("utf-8", errors="replace").rstrip("\r")
    return text.rsplit("\r", 1)[-1].rstrip()
