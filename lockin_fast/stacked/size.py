"""How many rows of a stack go through the model at once, and how many adapters make a stack."""

from torch import nn

from lockin_fast.blocking.layers import text_config
from lockin_fast.train import TrainSettings

FORWARD_BYTES = 192 * 2**20  # of activations a forward may keep, also where the user's micro-batch keeps less
GENERATION_BYTES = 96 * 2**20
MOST_ADAPTERS = 16  # beyond, rows of more adapters take turns and nothing is gained


def rows_of_a_forward(model: nn.Module, longest: int, settings: TrainSettings) -> int:
    """Rows of all adapters together in one forward: as many as the user's micro-batch has, for that is what fits, or

    what keeps 192 MB of activations at the longest row, whichever is more. Small models gain by the latter: it is where
    a forward's fixed costs no longer count; for large ones it is less than a row.
    """
    config = text_config(model)
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    cheap = cheap_rows(config.num_hidden_layers, config.hidden_size, wide, longest)
    return max(settings.micro_batch_size or settings.batch_size, cheap)


def cheap_rows(layers: int, width: int, wide: int, longest: int) -> int:
    """Rows that keep no more than FORWARD_BYTES, in a model of these sizes (wide: of the MLP)."""
    kept = 4 * layers * (16 * width + 5 * wide)  # bytes a token, for the backward
    return FORWARD_BYTES // (kept * longest)


def rows_of_a_generation(model: nn.Module, length: int, batch_size: int) -> int:
    """Rows that are answered at once: `batch_size`, or what has 96 MB of keys and values at this length, if more."""
    config = text_config(model)
    cached = 4 * 2 * config.num_hidden_layers * config.hidden_size * length
    return max(batch_size, GENERATION_BYTES // cached)


def rows_of_an_adapter(adapters: int, rows: int, settings: TrainSettings) -> int:
    """Rows of each adapter in one forward of `rows`: the largest divisor of the batch that fits, at least 1."""
    return max(n for n in range(1, settings.batch_size + 1)
               if settings.batch_size % n == 0 and (n == 1 or n * adapters <= rows))  # fmt: skip


def adapters_of_a_stack(model: nn.Module, longest: int, settings: TrainSettings) -> int:
    """How many adapters train together when nothing is said: as many as have a row in one forward, 16 at most."""
    return min(MOST_ADAPTERS, rows_of_a_forward(model, longest, settings))
