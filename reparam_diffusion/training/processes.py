"""Several processes, through accelerate: which one this is, what they agree on, the mean of their gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn

from reparam_diffusion.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)
"""How long processes wait for one that is silent. One that ends is noticed at once: its connection closes."""
_GO_ON = "go on"


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are, on all machines and on this one. Number 0 writes the files."""

    rank: int = 0
    ranks: int = 1
    device: torch.device | None = None
    local_rank: int = 0
    local_ranks: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """One flat all-reduce, none with one process. Adapters are no parameters of the UNet: DDP has no place."""
        if self.ranks == 1:
            return
        from accelerate.utils import reduce

        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        own = torch.cat([grad.flatten() for grad in grads])
        with _told():
            flat: Tensor = reduce(own, "mean")
        start = 0
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = flat[start : start + grad.numel()].view_as(grad).clone()
            start += grad.numel()

    def mean(self, number: float) -> float:
        """The mean of a number over all processes, the same in each of them."""
        if self.ranks == 1:
            return number
        box = torch.tensor([number], dtype=torch.float64)
        with _told():
            torch.distributed.all_reduce(box)
        return float(box) / self.ranks

    def agree(self, answer: str) -> str:
        """The first process's answer, for all of them."""
        if self.ranks == 1:
            return answer
        box = [answer]
        with _told():
            torch.distributed.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def have_all(self, answer: bool) -> bool:
        """Whether the answer is yes in every process."""
        return self.mean(float(answer)) == 1.0

    def only_main(self, work: Iterator[T]) -> Iterator[T]:
        """Work of the first process while the others wait; they hear of each piece of it, so that none gives up."""
        if self.is_main:
            for piece in work:
                yield piece
                self.agree("")
            self.agree(_GO_ON)
        else:
            self.wait_for_main()

    def wait_for_main(self) -> str:
        """Until the first process says something; what it says."""
        while not (said := self.agree("")):
            pass
        return said


def is_first() -> bool:
    """Whether this process is the first of those that were launched together, or the only one."""
    return rank_of() == 0


def rank_of() -> int:
    """This process's number, as `accelerate launch` or torchrun gave it; 0 when it stands alone."""
    return int(os.environ.get("RANK", "0")) if _count() > 1 else 0


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def are_many() -> bool:
    """Whether this process was launched together with others."""
    return _count() > 1


def join_processes(device: torch.device) -> Processes:
    """Join the others when started by `accelerate launch` or torchrun, else stand alone. Joining twice is joining once.

    What is agreed on goes through the processor (gloo), gradients on GPUs through NCCL.
    """
    if not are_many():
        return Processes(device=device)
    from accelerate import PartialState

    on_cpu = device.type == "cpu"
    backend = {} if on_cpu else {"backend": "cuda:nccl,cpu:gloo"}
    with _told():
        state = PartialState(cpu=on_cpu, timeout=PATIENCE, **backend)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    own = torch.device("cpu") if on_cpu else state.device
    return Processes(state.process_index, state.num_processes, own, state.local_process_index, here)


def leave_processes() -> None:
    """Take leave of the others when all is done."""
    if are_many() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class PeerLost(UserError):
    """Another process of this run has ended, so this one cannot go on."""


_LOST = ("connection", "closed by peer", "broken pipe", "socket", "timed out", "timeout", "remote process")
"""What torch's backends (gloo, NCCL, the store) say when the other side is gone."""


def is_peer_lost(error: RuntimeError) -> bool:
    """Whether an error of talking to the other processes means that one of them is gone, and not a fault here."""
    distributed = torch.distributed
    if isinstance(error, distributed.DistNetworkError | distributed.DistStoreError):
        return True
    text = str(error).lower()
    is_backend = isinstance(error, distributed.DistError) or "gloo" in text or "nccl" in text
    return is_backend and any(words in text for words in _LOST)


@contextmanager
def _told() -> Iterator[None]:
    """Turn the loss of another process into a PeerLost; every other error is this process's own and stays."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_lost(error):
            raise
        raise PeerLost(
            "Another process of this run has ended, and training needs all of them.",
            "It left no reason; it may have been killed or have run out of memory. The log may say more.",
            "Resume goes on from the last checkpoint.",
        ) from error
