"""The heads of Ray clusters, as their tender knows them: none is waited for long, a silent one is asked rarely."""

from __future__ import annotations

import time
from typing import Any

from reparam_diffusion.errors import UserError

ANSWER = 5.0  # seconds to wait for an answer
AGAIN = 1.0  # seconds until a head that has just fallen silent is asked again
RARELY = 60.0  # seconds between two questions to one that has been silent for long

Client = Any
"""ray's JobSubmissionClient. Any: ray is optional."""


class Head:
    """One cluster's head: its client, and since when it has been silent."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client: Client = None
        self._silent_since: float | None = None
        self._ask_at = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it may be asked now: always while it answers, else after as long a pause as it has been silent."""
        return time.monotonic() >= self._ask_at

    def client(self) -> Client:
        """What talks to it. Raises OSError where nobody answers, UserError where somebody else does."""
        if self._client is None:
            self._client = connect(self.address)
        return self._client

    def has_answered(self) -> None:
        """Ask it as often as you like."""
        self._silent_since, self._ask_at = None, 0.0

    def was_silent(self) -> None:
        """Give it time. A new connection is made then: what stands there may be another program."""
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        self._ask_at = now + min(RARELY, max(AGAIN, now - self._silent_since))
        self._client = None


def connect(address: str) -> Client:
    """A client that waits for no answer longer than ANSWER. Raises OSError or UserError as `Head.client` says."""
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise UserError(
            "Ray is not installed whole.", "Its job API is missing.", "Run: pip install -r requirements-extras.txt"
        ) from None

    class Impatient(JobSubmissionClient):
        """Ray's own client waits for ever for a head that takes a question and never answers."""

        def _do_request(self, method: str, endpoint: str, **rest: Any) -> Any:  # Any: as in ray
            return super()._do_request(method, endpoint, timeout=ANSWER, **rest)

    try:
        return Impatient(address)
    except RuntimeError as error:
        raise UserError(
            f"What answers at {address} is no Ray dashboard.",
            str(error).splitlines()[0][:200],
            "Correct launch.address, then resume.",
        ) from None
