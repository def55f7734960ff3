"""load_sae: which format, which options, how much memory."""

import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import lockin_fast
from lockin_fast.sae import load_sae
from lockin_fast.sae.formats import Format
from lockin_fast.sae.load import READERS

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("saelens_standard", "saelens"),
        ("saelens_standard/cfg.json", "saelens"),
        ("saelens_standard/sae_weights.safetensors", "saelens"),
        ("dl_batchtopk", "dictionary_learning"),
        ("dl_batchtopk/ae.pt", "dictionary_learning"),
        ("goodfire_pth", "goodfire"),
        ("goodfire_pth/sae-l19.pth", "goodfire"),
        ("goodfire_pt/sae-l50.pt", "goodfire"),
        ("gemma_scope_1", "gemma_scope"),
        ("gemma_scope_1_compressed/params.npz", "gemma_scope"),
        ("gemma_scope_2", "gemma_scope"),
        ("gemma_scope_2/params.safetensors", "gemma_scope"),
        ("gemma_scope_2/config.json", "gemma_scope"),
        ("llama_scope", "llama_scope"),
        ("llama_scope/hyperparams.json", "llama_scope"),
        ("llama_scope/checkpoints/final.safetensors", "llama_scope"),
        ("sparsify_topk", "sparsify"),
        ("sparsify_topk/cfg.json", "sparsify"),
        ("sparsify_topk/sae.safetensors", "sparsify"),
        ("qwen_scope_L0_7", "qwen_scope"),
        ("qwen_scope_L0_7/layer3.sae.pt", "qwen_scope"),
    ],
)
def test_format_is_found_from_the_files(path, found):
    sae = load_sae(str(GOLDEN / path))
    assert sae.metadata["format"] == found
    assert torch.equal(sae.weight, load_sae(GOLDEN / path, format=found).weight)


def test_exported_by_the_package():
    assert lockin_fast.load_sae is load_sae


def test_two_formats_in_one_directory_need_a_choice(tmp_path):
    for case in ("saelens_standard", "dl_batchtopk"):
        shutil.copytree(GOLDEN / case, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"holds more than one SAE \(saelens, dictionary_learning\)"):
        load_sae(tmp_path)
    assert load_sae(tmp_path, format="dictionary_learning").activation == "batchtopk"


def test_dtype_and_metadata():
    sae = load_sae(GOLDEN / "saelens_jumprelu", latents=[3, 4], dtype=torch.bfloat16, device="cpu")
    assert sae.dtype == torch.bfloat16 and sae.bias.dtype == sae.threshold.dtype == torch.float32
    assert sae.metadata["hook_name"] == "blocks.2.hook_resid_post" and sae.metadata["model_name"] == "tiny"
    assert load_sae(GOLDEN / "saelens_standard_bf16").dtype == torch.bfloat16
    assert load_sae(GOLDEN / "saelens_old_standard").metadata["hook_layer"] == 2
    assert load_sae(GOLDEN / "dl_topk").metadata["hook_layer"] == 2


def test_never_fitted_threshold_is_a_plain_relu():
    assert load_sae(GOLDEN / "dl_batchtopk_unfitted").threshold is None
    assert load_sae(GOLDEN / "dl_batchtopk").threshold.unique().numel() == 1


@pytest.mark.parametrize("case", ["saelens_jumprelu", "saelens_gated", "dl_gated", "dl_batchtopk", "goodfire_pth"])
def test_folding_decoder_norms_changes_units_only(case):
    stored, folded = load_sae(GOLDEN / case), load_sae(GOLDEN / case, fold_decoder_norm=True)
    assert folded.metadata["decoder_norm_folded"] and not stored.metadata["decoder_norm_folded"]
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(5))
    norms = stored.decoder.norm(dim=1)
    torch.testing.assert_close(folded.decoder.norm(dim=1), torch.ones(48))
    torch.testing.assert_close(folded.encode(x), stored.encode(x) * norms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded.decode(folded.encode(x)), stored.decode(stored.encode(x)), rtol=1e-5, atol=1e-4)


def test_the_two_readings_of_llama_scope_differ_in_unit_and_gate_only():
    theirs = load_sae(GOLDEN / "llama_scope_openmoss", format="llama_scope_openmoss")
    ours = load_sae(GOLDEN / "llama_scope_openmoss")
    assert (theirs.metadata["reading"], ours.metadata["reading"]) == ("openmoss", "saelens")
    assert theirs.metadata["decoder_norm_folded"] and not ours.metadata["decoder_norm_folded"]
    scale = 4 / 17.125  # sqrt(d) over the average norm in hyperparams.json
    unit = load_sae(GOLDEN / "llama_scope_openmoss", fold_decoder_norm=True).decoder.norm(dim=1) * scale
    torch.testing.assert_close(unit, torch.ones(48))
    norms = ours.decoder.norm(dim=1)  # of decoder rows in the stream's scale: n / s
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(theirs.encode_latents(x), ours.encode_latents(x) * norms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.decoder.norm(dim=1), torch.ones(48))
    assert not torch.allclose(theirs.threshold, ours.threshold * norms)


def test_k_of_qwen_scope_is_in_the_path_or_unknown(tmp_path):
    assert load_sae(GOLDEN / "qwen_scope_L0_7").k == 7
    shutil.copy(GOLDEN / "qwen_scope_L0_7" / "layer3.sae.pt", tmp_path / "layer3.sae.pt")
    sae = load_sae(tmp_path / "layer3.sae.pt")
    assert sae.k is None and sae.metadata["hook_layer"] == 3
    with pytest.raises(ValueError, match="k of the top-k is not in the checkpoint"):
        sae.encode(torch.zeros(1, 16))


def test_plain_autoencoder_is_folded_as_its_library_does_unless_told_otherwise():
    folded, stored = (load_sae(GOLDEN / "dl_autoencoder", fold_decoder_norm=fold) for fold in (None, False))
    assert folded.metadata["decoder_norm_folded"] and not stored.metadata["decoder_norm_folded"]
    raw = torch.load(GOLDEN / "dl_autoencoder" / "ae.pt", weights_only=True)
    assert torch.equal(stored.weight, raw["encoder.weight"]) and not torch.equal(folded.weight, stored.weight)


@pytest.mark.parametrize(
    ("case", "fold"), [("saelens_topk", True), ("saelens_topk_rescaled", False), ("dl_topk", True)]
)
def test_folding_that_would_change_a_topk_is_refused(case, fold):
    with pytest.raises(ValueError, match="would change which latents the top-k selects"):
        load_sae(GOLDEN / case, fold_decoder_norm=fold)


def test_expected_average_needs_its_scalar():
    with pytest.raises(ValueError, match="cfg.json: normalize_activations is 'expected_average_only_in'.*input_scale"):
        load_sae(GOLDEN / "saelens_standard_expected_average")
    for case in ("saelens_standard", "dl_topk", "goodfire_pth"):
        with pytest.raises(ValueError, match="input_scale=2.0 does not apply"):
            load_sae(GOLDEN / case, input_scale=2.0)


def test_finetuning_scale_multiplies_the_decoder_only(tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(GOLDEN / "saelens_old_standard", tmp_path / "sae")
    weights, config = tmp_path / "sae" / "sae_weights.safetensors", tmp_path / "sae" / "cfg.json"
    factor = torch.rand(48) + 0.5
    save_file(load_file(weights) | {"scaling_factor": factor}, weights)
    with pytest.raises(ValueError, match="scaling_factor is stored, but finetuning_scaling_factor is not set"):
        load_sae(tmp_path / "sae")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"finetuning_scaling_factor": True}))
    plain, scaled = load_sae(GOLDEN / "saelens_old_standard"), load_sae(tmp_path / "sae")
    assert torch.equal(plain.weight, scaled.weight) and torch.equal(plain.bias, scaled.bias)
    torch.testing.assert_close(scaled.decoder, plain.decoder * factor[:, None])


def test_checkpoint_folder_finds_the_config_above_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(GOLDEN / "dl_topk" / "ae.pt", tmp_path / "checkpoints" / "ae_100.pt")
    with pytest.raises(ValueError, match="AutoEncoderTopK and BatchTopKSAE store the same tensors"):
        load_sae(tmp_path / "checkpoints" / "ae_100.pt")
    shutil.copy(GOLDEN / "dl_topk" / "config.json", tmp_path)
    assert load_sae(tmp_path / "checkpoints" / "ae_100.pt").activation == "topk"


@pytest.mark.parametrize("case", ["dl_autoencoder", "dl_autoencoder_new", "dl_gated", "dl_jumprelu", "dl_matryoshka"])
def test_class_is_known_without_a_config_where_its_tensors_tell(case, tmp_path):
    shutil.copy(GOLDEN / case / "ae.pt", tmp_path)
    bare, told = load_sae(tmp_path), load_sae(GOLDEN / case)
    assert bare.metadata["architecture"] == told.metadata["architecture"]
    assert torch.equal(bare.weight, told.weight) and torch.equal(bare.bias, told.bias)


WIDTH, D_MODEL = 1 << 16, 1024


def _sparse_saelens(directory):
    """An SAE of 2 x 256 MiB whose file is a hole: zeros that take no disk."""
    offset, header = 0, {}
    shapes = {"W_enc": [D_MODEL, WIDTH], "b_enc": [WIDTH], "W_dec": [WIDTH, D_MODEL], "b_dec": [D_MODEL]}
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    with open(directory / "sae_weights.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    (directory / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": D_MODEL, "d_sae": WIDTH}))
    return directory


def _pickled_goodfire(directory):
    torch.save(
        {
            "encoder_linear.weight": torch.zeros(WIDTH, D_MODEL, dtype=torch.bfloat16),
            "encoder_linear.bias": torch.zeros(WIDTH, dtype=torch.bfloat16),
            "decoder_linear.weight": torch.zeros(D_MODEL, WIDTH, dtype=torch.bfloat16),
            "decoder_linear.bias": torch.zeros(D_MODEL, dtype=torch.bfloat16),
        },
        directory / "sae.pth",
    )
    return directory / "sae.pth"


def _numpy(directory, save):
    save(
        directory / "params.npz",
        W_enc=np.zeros((D_MODEL, WIDTH), np.float16),
        b_enc=np.zeros(WIDTH, np.float16),
        W_dec=np.zeros((D_MODEL, WIDTH), np.float16).T,  # column by column
        b_dec=np.zeros(D_MODEL, np.float16),
        threshold=np.zeros(WIDTH, np.float16),
    )
    return directory / "params.npz"


def _numpy_stored(directory):
    return _numpy(directory, np.savez)


def _numpy_packed(directory):
    return _numpy(directory, np.savez_compressed)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read peak memory")
@pytest.mark.parametrize(
    "make",
    [
        _sparse_saelens,
        _pickled_goodfire,
        _numpy_stored,
        pytest.param(_numpy_packed, marks=pytest.mark.slow),  # packing 256 MiB takes seconds
    ],
)
def test_twenty_latents_cost_a_block_not_the_matrix(make, tmp_path):
    """Peak resident memory, mapped file pages included, while 20 rows of a large SAE are read."""
    path = make(tmp_path)
    whole = sum(file.stat().st_size for file in tmp_path.iterdir())
    script = textwrap.dedent(
        f"""
        from lockin_fast.sae import load_sae
        import safetensors.torch

        def memory(field):
            for line in open("/proc/self/status"):
                if line.startswith(field):
                    return int(line.split()[1]) * 1024

        before = memory("VmRSS")
        sae = load_sae({str(path)!r}, latents=range(0, 60000, 3000))
        assert sae.weight.shape == (20, {D_MODEL}) and sae.width == {WIDTH}
        print(memory("VmHWM") - before)
        """
    )
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    growth = int(run.stdout)
    assert whole > 250 << 20 or make is _numpy_packed
    assert growth < 80 << 20, f"{growth >> 20} MiB for 20 latents of a {whole >> 20} MiB file"


def test_every_format_that_can_be_asked_for_has_a_reader():
    assert list(get_args(Format)) == list(READERS)
