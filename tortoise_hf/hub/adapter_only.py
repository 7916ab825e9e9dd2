"""Push an adapter without the weights that it belongs to: where others find these, and what a repository then holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open

from tortoise_hf.adapter_files import ADAPTER_DIR, BASE, WEIGHTS, name_base, read_adapter_config
from tortoise_hf.errors import UserError
from tortoise_hf.hub.card import AdapterFacts
from tortoise_hf.hub.pull import is_hub_name
from tortoise_hf.models.base_folder import RELEASED_BASE, RELEASED_REPO

_WHOLE = ("model.safetensors", "generation_config.json", "*_gpt.pth", "dvae/*")
"""Files of an export that come with the base, or from merging."""


def check_shareable_base(base: str) -> None:
    """Refuse `hub.adapter_only` where nobody else could have the base.

    Args:
        base: `model.base`.

    Raises: UserError.
    """
    if base != RELEASED_BASE and not is_hub_name(base):
        raise UserError(
            f"hub.adapter_only is true, and model.base {base} is on this machine alone, so nobody could use the "
            "adapter. Push the base first (scripts/push.py) and name it as --model.base owner/name, or set "
            "hub.adapter_only to false and push whole weights."
        )


def find_shareable_base(settings: Mapping[str, Any], lineage: Sequence[str]) -> tuple[str, str | None]:
    """Repository and commit in which others find the weights that a run's adapter belongs to.

    Args:
        settings: of the run.
        lineage: see `BaseFiles.lineage`.

    Returns: no commit for the released weights; they are known by their fingerprint alone.

    Raises:
        UserError: if the run trained no adapter, or its base isn't on the Hub.
    """
    if settings.get("lora", {}).get("rank", 0) == 0:
        raise UserError(
            "hub.adapter_only is true, but the run trained all weights (lora.rank 0), so there is no adapter to push; "
            "leave it out (for scripts/push.py: --adapter_only)."
        )
    base = settings["model"]["base"]
    check_shareable_base(base)
    if base == RELEASED_BASE:
        return RELEASED_REPO, None
    name, _, commit = (lineage[0] if lineage else "").partition("@")
    if name != base.split("@")[0] or re.fullmatch("[0-9a-f]{40}", commit) is None:
        raise UserError(
            f"hub.adapter_only is true, but it isn't known from which commit of {base} the run started; set it to "
            "false and push whole weights."
        )
    return name, commit


def place_of(name: str) -> str | None:
    """Where a file of an export goes in a repository of the adapter alone; None for those that stay here."""
    if any(PurePosixPath(name).match(pattern) for pattern in _WHOLE):
        return None
    return name.removeprefix(f"{ADAPTER_DIR}/")


def point_to_base(voice: Path, base: str, revision: str | None) -> AdapterFacts:
    """Let an adapter's config name its base, see `find_shareable_base`; gives what the card says of both."""
    name_base(voice, base, revision)
    with safe_open(voice / WEIGHTS, "pt") as file:
        fingerprint = file.metadata()[BASE]
    return AdapterFacts(read_adapter_config(voice).rank, (voice / WEIGHTS).stat().st_size, base, revision, fingerprint)
