"""What stays the same while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.models.load import Model
from reparam_diffusion.training.objective import Objective
from reparam_diffusion.training.prepare import Material
from reparam_diffusion.training.processes import Processes


@dataclass(frozen=True)
class Setup:
    """The model, the settings, what is learned and from what. `begun` is in seconds since 1970."""

    model: Model
    config: TrainConfig
    objective: Objective
    material: Material
    processes: Processes
    folder: Path
    begun: float
