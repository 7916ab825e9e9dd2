"""The peer as a fixture: builds or finds its environment."""

from __future__ import annotations

import pytest

from .environment import Unavailable, peer_environment
from .runner import PeerRunner


@pytest.fixture(scope="session")
def peer():
    try:
        return PeerRunner(peer_environment())
    except Unavailable as reason:
        pytest.skip(f"tortoise-tts can't be installed here: {reason}")
