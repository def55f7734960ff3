"""The shift of every latent as a table: a Parquet file, and the largest shifts for the screen."""

import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lockin_fast.discovery.shift_sums import ShiftStatistics
from lockin_fast.rundir import write_bytes

COLUMNS = ("layer", "latent", *ShiftStatistics._fields)


def parquet_is_installed() -> bool:
    return find_spec("pyarrow") is not None


def check_parquet() -> None:
    """Raise ImportError unless tables can be written and read."""
    if not parquet_is_installed():
        raise ImportError("a table of the shift needs pyarrow: pip install 'lockin-fast[tables]'")


def write_shift(path: Path, found: Mapping[int, ShiftStatistics]) -> None:
    """Write one row for every latent of every layer: layers ascending, in each the largest shifts first.

    Columns: layer, latent (int32), and the fields of `ShiftStatistics` (float64), of which NaN is null.
    """
    check_parquet()
    import pyarrow
    from pyarrow import parquet

    tables = []
    for layer in sorted(found):
        order = found[layer].shift.abs().argsort(descending=True, stable=True)
        columns = {
            "layer": pyarrow.array([layer] * len(order), pyarrow.int32()),
            "latent": pyarrow.array(order.numpy(), pyarrow.int32()),
        }
        columns |= {
            name: pyarrow.array(value[order].numpy(), from_pandas=True)
            for name, value in found[layer]._asdict().items()
        }
        tables.append(pyarrow.table(columns))
    content = io.BytesIO()
    parquet.write_table(pyarrow.concat_tables(tables), content)
    write_bytes(path, content.getvalue())


def read_largest(path: Path, count: int) -> dict[int, list[dict[str, Any]]]:
    """{layer: its first `count` rows, as mappings} of a table."""
    check_parquet()
    from pyarrow import parquet

    table = parquet.read_table(path)
    found: dict[int, list[dict[str, Any]]] = {}
    layers = table.column("layer").to_numpy()
    for layer in dict.fromkeys(layers.tolist()):
        start = int((layers == layer).argmax())
        found[layer] = table.slice(start, min(count, int((layers == layer).sum()))).to_pylist()
    return found
