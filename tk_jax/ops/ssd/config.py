"""Settings of the state-space dual: what is computed and how."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SsdOptions:
    """What is computed."""

    dt_softplus: bool
    dt_min: float
    dt_max: float


@dataclasses.dataclass(frozen=True)
class SsdConfig:
    """How it is computed."""

    chunk: int = 64  # tokens of one step
