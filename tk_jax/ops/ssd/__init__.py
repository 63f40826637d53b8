"""The state-space dual of Mamba-2."""

from tk_jax.ops.ssd.api import ssd, ssd_step
from tk_jax.ops.ssd.reference import ssd_reference

__all__ = ["ssd", "ssd_reference", "ssd_step"]
