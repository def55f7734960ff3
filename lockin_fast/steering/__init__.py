"""Steered generation: replies of a model along many directions, sharing all that steering does not change."""

from lockin_fast.steering.generator import SteeredGenerator, generate_steered
from lockin_fast.steering.hook import generate_by_hook, steered
from lockin_fast.steering.rows import SteeredRow, Work

__all__ = ["SteeredGenerator", "SteeredRow", "Work", "generate_by_hook", "generate_steered", "steered"]
