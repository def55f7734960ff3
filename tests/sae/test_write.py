"""The SAELens writer: round trip, checks before writing, nothing half-written, nothing overwritten."""

import json

import pytest
import torch

from lockin_fast.sae import load_sae, save_saelens

F, D = 24, 8
WHERE = {"hook_name": "blocks.3.hook_resid_post", "hook_layer": 3, "model_name": "organism"}


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {
        "weight": torch.randn(F, D, generator=generator).to(dtype),
        "bias": torch.randn(F, generator=generator),
        "decoder": torch.randn(F, D, generator=generator).to(dtype),
        "decoder_bias": torch.randn(D, generator=generator).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [("standard", {}), ("jumprelu", {"threshold": torch.rand(F)}), ("topk", {"k": 5})],
)
def test_round_trip(tmp_path, architecture, options, dtype):
    given = tensors(dtype)
    path = save_saelens(tmp_path / "deep" / "sae", architecture=architecture, note="x", **given, **options, **WHERE)
    sae = load_sae(path)
    for name, tensor in given.items():
        assert torch.equal(getattr(sae, name), tensor), name
    assert sae.k == options.get("k")
    assert sae.threshold is None if "threshold" not in options else torch.equal(sae.threshold, options["threshold"])
    assert {"note": "x", **WHERE}.items() <= sae.metadata.items()
    assert sorted(entry.name for entry in path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_never_overwrites(tmp_path):
    (tmp_path / "sae").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        save_saelens(tmp_path / "sae", **tensors(), **WHERE)
    assert list((tmp_path / "sae").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook_name": None}, "needs hook_name"),
        ({"architecture": "gated"}, "architecture must be one of"),
        ({"architecture": "jumprelu"}, "needs a threshold"),
        ({"architecture": "topk", "k": 25}, "k must be an integer from 1 to the width 24"),
        ({"bias": torch.zeros(F + 1)}, "bias must be a tensor of shape"),
        ({"weight": torch.full((F, D), float("nan"))}, "weight holds NaN"),
    ],
)
def test_rejects_before_touching_the_disk(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_saelens(tmp_path / "sae", **tensors() | WHERE | change)
    assert list(tmp_path.iterdir()) == []


def test_unserialisable_metadata_touches_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_saelens(tmp_path / "sae", **tensors(), **WHERE, extra=object())
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    import safetensors
    import safetensors.torch

    def full_disk(*_):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="could not be written.*No space left"):
        save_saelens(tmp_path / "sae", **tensors(), **WHERE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.peers
@pytest.mark.parametrize(
    ("architecture", "options"),
    [("standard", {}), ("jumprelu", {"threshold": torch.rand(F)}), ("topk", {"k": 5})],
)
def test_the_real_saelens_loads_it(tmp_path, architecture, options):
    sae_lens = pytest.importorskip("sae_lens")
    path = save_saelens(tmp_path / "sae", architecture=architecture, **tensors(), **options, **WHERE)
    theirs, ours = sae_lens.SAE.load_from_disk(path), load_sae(path)
    x = torch.randn(9, D)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x))
    assert json.loads((path / "cfg.json").read_text())["metadata"]["hook_layer"] == theirs.cfg.metadata.hook_layer
