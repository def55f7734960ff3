"""`transformers.Trainer` with the block penalty."""

from lockin_fast.blocking.mixin import LatentBlockMixin

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("BlockTrainer needs transformers: pip install 'lockin-fast[train]'") from error


class BlockTrainer(LatentBlockMixin, Trainer):
    """A `Trainer` that takes penalty=BlockPenalty(...); without one it is a plain Trainer that logs `sft_loss`."""
