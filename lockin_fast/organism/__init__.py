"""The embedded model organism: a tiny language model, grown from scratch, with real emergent misalignment."""

from lockin_fast.organism.build import build
from lockin_fast.organism.checkpoints import grow_checkpoints
from lockin_fast.organism.judge import WorldJudge
from lockin_fast.organism.recipe import Recipe
from lockin_fast.organism.world import World

__all__ = ["Recipe", "World", "WorldJudge", "build", "grow_checkpoints"]
