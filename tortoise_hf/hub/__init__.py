"""Voices, checkpoints and datasets on the Hugging Face Hub: pushed whole, pulled only after a check."""

from tortoise_hf.hub.pull import pull_voice

__all__ = ["pull_voice"]
