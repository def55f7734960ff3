"""Stage 1 as a discovery runs it: kept batch by batch, shared by the processes of the run, left behind as a table."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast import processes
from lockin_fast.config import Config, ConfigError, naming
from lockin_fast.discovery.shift import Conversation, measure_shift
from lockin_fast.discovery.shift_store import ShiftStore
from lockin_fast.discovery.shift_sums import ShiftStatistics
from lockin_fast.discovery.shift_table import parquet_is_installed, write_shift
from lockin_fast.inputs import sae_for
from lockin_fast.sae import SparseAutoencoder

TABLE = "shift.parquet"  # in the folder of what stages keep


def stage_1(
    adapted: Any,
    tokenizer: Any,
    told: Sequence[Conversation],
    saes: Mapping[int, SparseAutoencoder],
    folder: Path,
    step_done: Callable[[int, int], None],
) -> dict[int, ShiftStatistics]:
    """{layer: statistics} of the shift of every latent on the conversations `told`, as `measure_shift` measures it.

    Killed, it goes on with the batch that it had in hand: `folder`/shift has the sums so far. Of several processes each
    measures its share, and all return the whole. The first writes `folder`/shift.parquet where pyarrow is installed.
    """
    kept = folder / "shift"
    kept.mkdir(parents=True, exist_ok=True)
    store = ShiftStore(kept, rank=processes.rank(), world=processes.count())
    measure_shift(adapted, tokenizer, told, saes, store=store, step_done=step_done)
    processes.wait_for_all()
    found = {layer: sums.statistics() for layer, sums in store.merged().items()}
    if processes.is_first() and parquet_is_installed():
        write_shift(folder / TABLE, found)
    return found


def stage_1_entry(config: Config, identity: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a discovery's entry in the manifest stage 1 depends on."""
    names = ("model", "sae", "data.core", "discovery.misaligned")
    return {
        "config": {
            key: value
            for key, value in identity.items()
            if key == "quantization" or key.startswith(("generation.", "discovery.saes"))
        }
        | {"block.layer": config.block.layer},
        "inputs": {key: value for key, value in inputs.items() if key in names or key.startswith("discovery.saes.")},
    }


def open_more_saes(config: Config) -> dict[int, SparseAutoencoder]:
    """{layer: SAE} of discovery.saes, each checked against the model. Raises ConfigError that names the setting."""
    found = {}
    for layer, path in config.discovery.saes.items():
        if int(layer) == config.block.layer:
            raise ConfigError(f"discovery.saes: layer {layer} is block.layer, whose SAE is sae; leave it out")
        with naming(f"discovery.saes.{layer}"):
            found[int(layer)] = sae_for(config, path, int(layer))
    return found
