"""Sweeps of the block penalty: lambdas x latent sets x seeds."""

from lockin_fast.sweep.run import plan, run_sweep

__all__ = ["plan", "run_sweep"]
