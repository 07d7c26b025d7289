"""A worker whose second process breaks off at its fifth step with an error of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from fake_worker import fake_train

from reparam_diffusion import events as e
from reparam_diffusion.jobs import worker
from reparam_diffusion.training.processes import rank_of


def failing_train(*arguments: Any, **named: Any) -> Iterator[e.Event]:
    """The pretence of training, until the second process fails."""
    for event in fake_train(*arguments, **named):
        yield event
        if rank_of() == 1 and isinstance(event, e.Step) and event.step == 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


if __name__ == "__main__":
    sys.exit(worker.main(train=failing_train))
