"""Several processes, through accelerate: which one this is, and the mean of the gradients over all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are. Number 0 writes the files."""

    rank: int = 0
    ranks: int = 1
    device: torch.device | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """One flat all-reduce, none with one process. Adapters are no parameters of the UNet: DDP has no place."""
        if self.ranks == 1:
            return
        from accelerate.utils import reduce

        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat: Tensor = reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
        start = 0
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = flat[start : start + grad.numel()].view_as(grad).clone()
            start += grad.numel()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.ranks > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def agree(self, answer: str) -> str:
        """The first process's answer, for all of them."""
        if self.ranks == 1:
            return answer
        from accelerate.utils import broadcast_object_list

        box = [answer]
        broadcast_object_list(box)
        return box[0]


def join_processes(device: torch.device) -> Processes:
    """Join the others when started by `accelerate launch` or torchrun, else stand alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes(device=device)
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return Processes(state.process_index, state.num_processes, state.device)
