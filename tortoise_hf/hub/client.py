"""How this package talks to the Hub: which failures pass by themselves, what the others mean, what a token may do."""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tortoise_hf.config import HubConfig
from tortoise_hf.errors import UserError
from tortoise_hf.retries import retries_in_one_line

logger = logging.getLogger(__name__)

VOICE_MARKER = "export.json"
"""File by which a repository is known to hold a voice of this program."""
CHECKPOINT_MARKER = "run.json"
"""The same for a repository of resumable checkpoints."""
ATTEMPTS = 6
"""Tries of a push, besides those the Hub's client makes for single requests."""
LONGEST_WAIT = 120.0
"""Seconds between two tries at most, unless the Hub names a time."""
_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN."

Result = TypeVar("Result")


def chain(error: BaseException | None) -> Iterable[BaseException]:
    """An exception and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """HTTP status the Hub answered with; None if it gave no answer."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def is_unreachable(error: BaseException) -> bool:
    """Whether the Hub could not be asked at all."""
    # By name: which HTTP library lies underneath changes between the client's versions.
    return any(re.search(r"Connect|OfflineMode|Timeout|Protocol|NetworkError", type(e).__name__) for e in chain(error))


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, UserError | HFValidationError):
        return False
    status = status_of(error)
    if status is not None:
        return status in _PASSING
    # Without an answer: connections, and what hf_xet (RuntimeError) and sockets (OSError) raise.
    return is_unreachable(error) or isinstance(error, RuntimeError | OSError)


def is_full(error: BaseException) -> bool:
    """Whether the disk has no more room, a quota is used up, or a file would be larger than allowed."""
    numbers = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    for one in chain(error):
        told = re.search(r"\(os error (\d+)\)", str(one))  # how hf_xet passes it on
        if getattr(one, "errno", None) in numbers or (told and int(told[1]) in numbers):
            return True
    return False


def explain(error: BaseException, repo_id: str, revision: str | None = None) -> str:
    """What an error of the Hub's client means and what to do about it, in a sentence or two."""
    status = status_of(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no name of a repository on the Hub; expected owner/name."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page on the Hub, then log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}; leave it out for the newest state."
    if isinstance(error, RepositoryNotFoundError):
        private = "" if get_token() else " If it is private: " + _LOGIN[0].lower() + _LOGIN[1:]
        return f"{repo_id} is not on the Hub, or not for this account. Check the spelling.{private}"
    if status == 401:
        return f"The Hub doesn't accept the token. {_LOGIN}"
    if status == 403:
        return f"The token may not do that in {repo_id}. Take one with write access: hf.co/settings/tokens."
    if status == 429:
        return f"The Hub allows no more requests for the moment (429) while asking for {repo_id}; try again later."
    if is_unreachable(error):
        return f"The Hub could not be reached for {repo_id} ({first_line(error)})."
    if status is None:
        return f"Files of {repo_id} could not be transferred ({first_line(error)})."
    return f"The Hub's answer for {repo_id}: {first_line(error)}."


def first_line(error: BaseException) -> str:
    """Type and first line of an error's message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}".rstrip(".")


def retry(
    do: Callable[[], Result], repo_id: str, attempts: int = ATTEMPTS, wait: Callable[[float], object] | None = None
) -> Result:
    """Call `do` until it succeeds, waiting longer each time, or as long as the Hub says.

    Args:
        do: may be called again after it failed half-way.
        repo_id: what it is about, for messages.
        attempts: calls at most.
        wait: sleeps so many seconds; a true result ends the attempts.

    Raises:
        UserError: what the last failure means, in words.
    """
    wait = time.sleep if wait is None else wait
    for attempt in range(1, attempts + 1):
        try:
            return do()
        except Exception as error:  # whatever the client's HTTP library raises
            if attempt == attempts or not is_passing(error):
                if is_passing(error) or isinstance(error, UserError | HfHubHTTPError | HFValidationError):
                    raise UserError(explain(error, repo_id)) from error
                raise
            seconds = _wait_seconds(error, attempt)
            logger.info("%s: %s; trying again in %.0f s", repo_id, first_line(error), seconds)
            if wait(seconds):
                raise UserError(explain(error, repo_id)) from error
    raise AssertionError("not reached")


def _wait_seconds(error: BaseException, attempt: int) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    named = re.search(r"\bt=(\d+)", headers.get("RateLimit", "")) or re.match(r"(\d+)", headers.get("Retry-After", ""))
    if named:
        return 1.0 + min(600, int(named[1]))
    return min(LONGEST_WAIT, 2.0**attempt) * random.Random().uniform(0.8, 1.2)  # its own: the run's stay untouched


@retries_in_one_line()
def check_access(cfg: HubConfig, endpoint: str | None = None) -> str | None:
    """Before the first step: whether the pushes a config asks for can work.

    Returns: a warning where the Hub can't be asked now; None if all is well.

    Raises:
        UserError: no consent, no token, one that can't write there, or a repository that holds something else.
    """
    if cfg.repo_id is None and cfg.checkpoint_repo_id is None:
        return None
    if cfg.repo_id is not None:
        require_consent(cfg)
    if not get_token():
        raise UserError(f"hub.repo_id is set, but there is no token for the Hub. {_LOGIN}")
    api = HfApi(endpoint=endpoint)
    wanted = {cfg.repo_id: VOICE_MARKER, cfg.checkpoint_repo_id: CHECKPOINT_MARKER}
    try:
        account = api.whoami()
        for repo_id, marker in wanted.items():
            if repo_id is not None:
                _check_token(account, repo_id)
                check_repository(api, repo_id, marker)
    except UserError:
        raise
    except Exception as error:  # whatever the client's HTTP library raises
        repo_id = cfg.repo_id or cfg.checkpoint_repo_id
        if is_passing(error):
            return f"Warning: {explain(error, repo_id)} The run begins all the same and pushes when it can."
        raise UserError(explain(error, repo_id)) from error
    return None


def require_consent(cfg: HubConfig) -> None:
    """Refuse to publish a voice whose owner wasn't named.

    Raises: UserError.
    """
    if not (cfg.consent or "").strip():
        raise UserError(
            "hub.consent is not set. A voice belongs to a person: say whose it is and that they agree, for instance "
            "--hub.consent 'My own voice.' or 'Jane Doe, who agreed in writing.' (for scripts/push.py: --consent); the "
            "card will say so."
        )


def _check_token(account: dict, repo_id: str) -> None:
    token = account.get("auth", {}).get("accessToken", {})
    scopes = [scope for entry in token.get("fineGrained", {}).get("scoped", []) for scope in entry["permissions"]]
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and "repo.write" not in scopes):
        raise UserError(
            f"The Hub's token of {account['name']} can't write, so nothing could be pushed to {repo_id}. Make one with "
            "write access at hf.co/settings/tokens and log in with it."
        )
    names = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if repo_id.split("/")[0] not in names:
        raise UserError(
            f"{repo_id} belongs to {repo_id.split('/')[0]}, and the token to {account['name']}; repositories can be "
            f"made under {' or '.join(names)}."
        )


def check_repository(api: HfApi, repo_id: str, marker: str, repo_type: str = "model") -> None:
    """Refuse to write into a repository that holds something else than what is pushed; one that isn't there is fine.

    Raises: UserError.
    """
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        return
    files = [sibling.rfilename for sibling in info.siblings or []]
    if marker not in files and set(files) - {".gitattributes", "README.md"}:
        raise UserError(
            f"{repo_id} is taken: it holds {len(files)} files and no {marker}, so it was not made by this program. "
            "Choose another name, or empty it."
        )
