"""Sweeps of the block penalty: lambdas x latent sets x seeds."""

from lockin_fast.sweep.plan import plan
from lockin_fast.sweep.run import run_sweep

__all__ = ["plan", "run_sweep"]
