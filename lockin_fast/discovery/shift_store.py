"""What a stage 1 that is killed has done: the sums over prompts so far, in one file of each process."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lockin_fast.discovery.shift_sums import ShiftSums
from lockin_fast.rundir import RunError, write_bytes


@dataclass
class ShiftStore:
    """The files of one stage 1; without a folder nothing is kept.

    folder: where the processes that share the work keep their files, which exists. key: what the sums depend on beside
    the text, the batches and the SAEs' widths. rank, world: which of how many processes this is; it does the batches
    rank, rank + world, ...

    A file holds the sums over the batches that it names, no matter how many there are: 64 bytes a latent. It is
    replaced after every batch, whole or not at all, so a kill costs the batch in hand. The processes may be others
    after it: what any file names is not done again.
    """

    folder: Path | None = None
    key: str = ""
    rank: int = 0
    world: int = 1
    _digest: str = field(default="", init=False)
    _batches: int = field(default=0, init=False)
    _done: list[int] = field(default_factory=list, init=False)

    def share(self, batches: int) -> range:
        """The numbers of this process' batches."""
        return range(self.rank, batches, self.world)

    def open(
        self, rows: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], widths: Mapping[int, int]
    ) -> tuple[list[int], dict[int, ShiftSums]]:
        """Batches of this process that are still to be done, and its sums so far, {layer: sums}.

        Raises RunError where a file is of another text, other batches, SAEs or key, or damaged.
        """
        told = json.dumps([self.key, rows, batches, sorted(widths.items())])
        self._digest, self._batches = hashlib.sha256(told.encode()).hexdigest(), len(batches)
        kept = self._read()
        self._done, sums = kept.get(self._file.name, ([], {n: ShiftSums.zeros(width) for n, width in widths.items()}))
        anywhere = {number for done, _ in kept.values() for number in done}
        return [number for number in self.share(len(batches)) if number not in anywhere], dict(sums)

    def keep(self, batch: int, sums: Mapping[int, ShiftSums]) -> None:
        """Keep the sums, of which `batch` is the last."""
        self._done.append(batch)
        if self.folder is None:
            return
        tensors = {
            f"{layer}.{f.name}": getattr(of_layer, f.name) for layer, of_layer in sums.items() for f in fields(of_layer)
        }
        tensors["batches"] = torch.tensor(self._done, dtype=torch.int64, device="cpu")
        write_bytes(self._file, save(tensors, metadata={"digest": self._digest}))

    def merged(self) -> dict[int, ShiftSums]:
        """The sums of all processes. Raises RunError where batches are missing."""
        kept = self._read()
        done = {number for numbers, _ in kept.values() for number in numbers}
        if missing := set(range(self._batches)) - done:
            raise RunError(
                f"output: {self.folder} lacks {len(missing)} of {self._batches} batches of stage 1; run the same "
                "command again, with as many processes"
            )
        parts = [sums for _, (_, sums) in sorted(kept.items())]
        whole = dict(parts[0])
        for part in parts[1:]:
            whole = {layer: of_layer + part[layer] for layer, of_layer in whole.items()}
        return whole

    @property
    def _file(self) -> Path:
        return (self.folder or Path()) / f"rank-{self.rank:04d}.safetensors"

    def _read(self) -> dict[str, tuple[list[int], dict[int, ShiftSums]]]:
        """{file name: (batches, sums)} of all processes."""
        found = {}
        for path in sorted(self.folder.glob("rank-*.safetensors")) if self.folder else ():
            try:
                with safe_open(path, framework="pt") as file:
                    digest = (file.metadata() or {}).get("digest")
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
            except (SafetensorError, OSError) as error:
                raise RunError(f"output: {path} is damaged ({error}); remove it and run the command again") from error
            if digest != self._digest:
                raise RunError(
                    f"output: {path} is of another stage 1: other prompts or replies, model, SAEs or batch size; give "
                    "another folder, or remove it"
                )
            layers = {int(name.partition(".")[0]) for name in tensors if name != "batches"}
            sums = {n: ShiftSums(*(tensors[f"{n}.{f.name}"] for f in fields(ShiftSums))) for n in sorted(layers)}
            found[path.name] = tensors["batches"].tolist(), sums
        return found
