"""The measured series as a Parquet table."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from lockin_fast.lockin.series import Values
from lockin_fast.rundir import write_bytes


def write_series(path: Path, steps: Sequence[int], names: Sequence[str], series: Mapping[str, Values]) -> None:
    """Write one row for every checkpoint: step (int64), checkpoint (text), and a float64 column for each metric.

    A failed evaluation is null. Needs pyarrow.
    """
    import pyarrow
    from pyarrow import parquet

    columns = {"step": pyarrow.array(steps, pyarrow.int64()), "checkpoint": pyarrow.array(names, pyarrow.string())}
    columns |= {name: pyarrow.array(values, pyarrow.float64()) for name, values in series.items()}
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content)
    write_bytes(path, content.getvalue())
