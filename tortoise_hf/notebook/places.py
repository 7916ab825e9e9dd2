"""What Colab and Kaggle have and other machines don't: Drive, uploads, secrets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tortoise_hf.errors import UserError

DRIVE = Path("/content/drive")
UPLOAD = "upload"
TOKEN_NAME = "HF_TOKEN"


def find_place(place: str) -> str:
    """Where a folder, archive or dataset can be read: Drive is mounted and a file is asked for if that is meant.

    Args:
        place: a path, owner/name on the Hub, or "upload".

    Raises: UserError: if Drive or uploads aren't to be had here.
    """
    place = place.strip()
    if place == UPLOAD:
        return upload()
    mount_drive_for(place)
    return place


def mount_drive_for(place: str | Path) -> None:
    """Mount Google Drive if a path lies in it.

    Raises: UserError: if this isn't Colab.
    """
    path = Path(place)
    if DRIVE not in (path, *path.parents) or DRIVE.is_mount() or path.exists():
        return
    try:
        from google.colab import drive
    except ImportError:
        raise UserError(f"{place} lies on Google Drive, which only Colab can mount; name a folder here.") from None
    drive.mount(str(DRIVE))


def upload() -> str:
    """Ask for a file in Colab; its path.

    Raises: UserError: if this isn't Colab, or nothing was chosen.
    """
    try:
        from google.colab import files
    except ImportError:
        raise UserError("Only Colab uploads from a cell; put the archive beside the notebook and name it.") from None
    names = list(files.upload())
    if len(names) != 1:
        raise UserError(f"{len(names)} files were uploaded; choose one, an archive (.zip, .tar.gz) of your recordings.")
    return names[0]


def find_token() -> None:
    """Find a token for the Hub and put it where the scripts find it, which can't ask Colab or Kaggle themselves.

    It is one that is logged in, in HF_TOKEN, or among the secrets.

    Raises: UserError: if there is none.
    """
    from huggingface_hub import get_token

    token = get_token() or _secret()
    if not token:
        raise UserError(
            f"There is no token for the Hub. Make one with write access at hf.co/settings/tokens and store it as the "
            f"secret {TOKEN_NAME}: in Colab with the key on the left, on Kaggle in the menu Add-ons. Elsewhere run "
            "`hf auth login` in a terminal. Never write it into a cell."
        )
    os.environ[TOKEN_NAME] = token


def _secret() -> str | None:
    if "google.colab" in sys.modules:
        from google.colab import userdata

        try:
            return userdata.get(TOKEN_NAME)
        except (userdata.SecretNotFoundError, userdata.NotebookAccessError):
            return None
    try:
        from kaggle_secrets import UserSecretsClient
    except ImportError:
        return None
    try:
        return UserSecretsClient().get_secret(TOKEN_NAME)
    except Exception:  # its errors have changed names between versions; each means that there is no such secret
        return None
