"""Imported first by the scripts: without the packages they need, a sentence instead of a traceback."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("tortoise_hf") is None:
    _folder = Path(__file__).resolve().parents[1]
    _activate = _folder / ".venv" / "bin" / "activate"
    _advice = (
        f"Activate the environment first: . {_activate}"
        if _activate.is_file()
        else (f"In {_folder} run: python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e .")
    )
    raise SystemExit(f"error: tortoise_hf is not installed for {sys.executable}. {_advice}")
