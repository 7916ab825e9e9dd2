"""What the notebook's cells call: look at the machine, install, check recordings, plan, train, export, share, speak.

Nothing but the standard library is imported until a function is called, because the first cells run before anything is
installed.
"""

from __future__ import annotations

from tortoise_hf.notebook.machine import show_machine
from tortoise_hf.notebook.project import Project
from tortoise_hf.notebook.requirements import install

__all__ = ["Project", "install", "show_machine"]
