"""N LoRA adapters of one shape as one block of parameters, put onto a frozen base model and taken off again."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lockin_fast.lora import LoraSettings, adapted_modules, borrowed_with_lora, check_lora, save_adapter
from lockin_fast.stacked.linear import Factors, StackedLinear, Window, check_base

PREFIX = "base_model.model."  # of PEFT's names for the modules of the base model
WEIGHTS = "adapter_model.safetensors"


class AdapterStack:
    """N adapters on the same modules of a model: `weights` and `grads` [N, P], a row an adapter.

    A row holds A [r, in], then B transposed [r, out], of every adapted linear layer in the model's order, all in fp32:
    one optimiser step, one norm or one file is one operation on the block. The adapters' modules are put in place by
    `installed`; `window` says which adapters the rows of a forward belong to.

    Raises ValueError for a layer that is neither nn.Linear nor 4-bit, and for a model that drops at random: the
    adapters of a stack would not see what each would see alone.
    """

    def __init__(self, model: nn.Module, lora: LoraSettings, weights: Tensor, names: Sequence[str]):
        self.model, self.lora, self.names = model, lora, tuple(names)
        for name in self.names:
            check_base(name, model.get_submodule(name))
        _check_plain(model, lora)
        self.window = Window(0, len(weights))
        self._set(weights)

    @classmethod
    def fresh(cls, model: nn.Module, lora: LoraSettings, seeds: Sequence[int]) -> "AdapterStack":
        """Adapter n as PEFT makes it in a run of its own with seeds[n]; equal seeds are drawn once."""
        check_lora(model, lora)
        drawn = {}
        for seed in dict.fromkeys(seeds):
            with borrowed_with_lora(model, lora, seed) as peft_model:
                layers = _peft_layers(peft_model)
                drawn[seed] = torch.cat([_row(layer.lora_A.default.weight, layer.lora_B.default.weight)
                                         for layer in layers.values()])  # fmt: skip
        return cls(model, lora, torch.stack([drawn[seed] for seed in seeds]), list(layers))

    @classmethod
    def load(cls, model: nn.Module, folders: Sequence[Path]) -> "AdapterStack":
        """The adapters of these PEFT folders. Raises ValueError, naming the folder, unless all have one shape."""
        from safetensors.torch import load_file

        settings = {folder: _lora_of(folder) for folder in folders}
        lora = check_same_lora(settings)
        check_lora(model, lora)
        with borrowed_with_lora(model, lora, 0) as peft_model:
            names = list(_peft_layers(peft_model))
        rows = []
        for folder in folders:
            tensors = load_file(Path(folder) / WEIGHTS)
            try:
                rows.append(torch.cat([
                    _row(*(tensors[f"{PREFIX}{name}.lora_{side}.weight"] for side in "AB")) for name in names
                ]))  # fmt: skip
            except KeyError as error:
                raise ValueError(f"{folder}: its adapter has no {error}; was it trained on this model?") from None
        return cls(model, lora, torch.stack(rows).to(model.device), names)

    def __len__(self) -> int:
        return len(self.weights)

    def _set(self, weights: Tensor) -> None:
        self.weights, self.grads = weights.detach(), torch.zeros_like(weights)
        self._factors, start = [], 0
        for name in self.names:
            base = self.model.get_submodule(name)
            stop = start + self.lora.r * (base.in_features + base.out_features)
            block = slice(start, stop)
            self._factors.append(Factors(self.weights[:, block], self.grads[:, block], self.lora.r, base.in_features))
            start = stop
        if start != weights.shape[1]:
            raise ValueError(f"weights: got {weights.shape[1]} an adapter, expected {start} for {self.lora}")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The adapters on the model, whose own parameters are frozen meanwhile; it is as it was afterwards."""
        grads = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        modes = [(module, module.training) for module in self.model.modules()]
        scale, bases = self.lora.alpha / (self.lora.r**0.5 if self.lora.use_rslora else self.lora.r), {}
        try:
            for parameter, _ in grads:
                parameter.requires_grad_(False)
            for name, factors in zip(self.names, self._factors, strict=True):
                bases[name] = self.model.get_submodule(name)
                layer = StackedLinear(bases[name], factors, scale, self.window)
                self.model.set_submodule(name, layer.train(bases[name].training))
            yield
        finally:
            for name, base in bases.items():
                self.model.set_submodule(name, base)
            for parameter, requires_grad in grads:
                parameter.requires_grad_(requires_grad)
            for module, training in modes:
                module.training = training

    def take(self, adapters: Sequence[int]) -> "AdapterStack":
        """A stack of these adapters, with weights of its own. Not while installed."""
        return AdapterStack(self.model, self.lora, self.weights[list(adapters)], self.names)


@contextmanager
def exporting(model: nn.Module, lora: LoraSettings) -> Iterator[Callable[[Tensor, Path], None]]:
    """Yields save(row [P], folder), which writes one adapter of a stack as `save_adapter` writes that of a single run.

    PEFT writes one of these settings; what it says beside the weights is then the same for all, and so is their file
    but for the weights. save raises FloatingPointError for weights that are not finite.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        with borrowed_with_lora(model, lora, 0) as peft_model:
            save_adapter(peft_model, made)
            layers = {
                module_name: (layer.lora_A.default.weight, layer.lora_B.default.weight)
                for module_name, layer in _peft_layers(peft_model).items()
            }
        with safe_open(made / WEIGHTS, framework="pt") as file:
            header = file.metadata()

        def save(row: Tensor, folder: Path) -> None:
            if not row.isfinite().all():
                raise FloatingPointError("the adapter's weights are not finite; lower the learning rate or lambda")
            tensors, start = {}, 0
            for module_name, factors in layers.items():
                middle, stop = start + factors[0].numel(), start + factors[0].numel() + factors[1].numel()
                parts = row[start:middle].view_as(factors[0]), row[middle:stop].view_as(factors[1].T).T
                for side, part, like in zip("AB", parts, factors, strict=True):
                    tensors[f"{PREFIX}{module_name}.lora_{side}.weight"] = part.to(like.dtype).contiguous().cpu()
                start = stop
            shutil.copytree(made, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS))
            save_file(tensors, folder / WEIGHTS, metadata=header)

        yield save


def _peft_layers(peft_model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers by the names that their base layers have in the base model, in the model's order."""
    return {
        name.removeprefix(PREFIX): module for name, module in peft_model.named_modules() if hasattr(module, "lora_A")
    }


def _row(down: Tensor, up: Tensor) -> Tensor:
    """One layer's part of a row: A [r, in] and B [out, r] as PEFT has them -> [r * (in + out)] in fp32."""
    return torch.cat([down.detach().float().flatten(), up.detach().float().T.flatten()])


def _lora_of(folder: Path) -> LoraSettings:
    """The settings of a PEFT folder's adapter. Raises ValueError for one that is no plain LoRA."""
    file = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as an adapter's configuration: {error}") from error
    plain = {
        "peft_type": "LORA", "use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "target_parameters": None, "fan_in_fan_out": False,
    }  # fmt: skip
    for key, value in plain.items():
        if (config.get(key) or value) != value:
            raise ValueError(f"{file}: {key} is {config[key]!r}; a stack takes plain LoRA adapters ({key}: {value!r})")
    layers = config.get("layers_to_transform")
    return LoraSettings(
        r=config["r"],
        alpha=config["lora_alpha"],
        target_modules=tuple(sorted(config["target_modules"])),
        layers=None if layers is None else tuple(layers),
        use_rslora=config.get("use_rslora", False),
    )


def check_same_lora(settings: Mapping[object, LoraSettings]) -> LoraSettings:
    """The settings that all of a stack have. Raises ValueError naming the first that differ, and in what."""
    (first, lora), *others = settings.items()
    for name, other in others:
        for field in dataclasses.fields(lora):
            mine, theirs = getattr(lora, field.name), getattr(other, field.name)
            if mine != theirs:
                raise ValueError(
                    f"lora.{field.name}: {first} has {mine!r}, {name} has {theirs!r}; the adapters of one stack "
                    "share rank, scale and modules: stack those that are alike"
                )
    return lora


def check_stackable(model: nn.Module, lora: LoraSettings) -> None:
    """Raise ValueError unless adapters of these settings can be stacked on the model."""
    _check_plain(model, lora)
    for name, module in adapted_modules(model, lora):
        check_base(name, module)


def _check_plain(model: nn.Module, lora: LoraSettings) -> None:
    """Raise ValueError for DoRA, and for dropout in the adapters or the model."""
    if lora.use_dora:
        raise ValueError("lora.use_dora: a stack trains LoRA adapters; train one adapter at a time (sweep.stack: 1)")
    config = getattr(model, "config", None)
    found = {
        "lora.dropout": lora.dropout,
        "the model's attention_dropout": getattr(config, "attention_dropout", 0.0) or 0.0,
        "a dropout layer of the model": max((m.p for m in model.modules() if isinstance(m, nn.Dropout)), default=0.0),
    }
    for name, rate in found.items():
        if rate > 0:
            raise ValueError(
                f"{name} is {rate:g}: the adapters of a stack would not drop what each drops in a run of its own; set "
                "it to 0, or train one adapter at a time (sweep.stack: 1)"
            )
