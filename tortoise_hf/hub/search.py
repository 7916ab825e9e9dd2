"""Find voices on the Hub."""

from __future__ import annotations

from huggingface_hub import HfApi, ModelInfo

from tortoise_hf.errors import UserError
from tortoise_hf.hub.card import LIBRARY
from tortoise_hf.hub.client import explain
from tortoise_hf.retries import retries_in_one_line


@retries_in_one_line()
def search_voices(text: str | None = None, limit: int = 50, endpoint: str | None = None) -> list[ModelInfo]:
    """Repositories with this program's tag, the most downloaded first.

    Args:
        text: part of the name; None takes all.
        limit: how many at most.
        endpoint: the Hub's address; default as HF_ENDPOINT says.

    Raises:
        UserError: if the Hub can't be asked.
    """
    try:
        return list(HfApi(endpoint=endpoint).list_models(filter=LIBRARY, search=text, sort="downloads", limit=limit))
    except Exception as error:  # whatever the client's HTTP library raises
        raise UserError(explain(error, "voices")) from error
