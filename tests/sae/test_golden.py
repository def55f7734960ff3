"""Every reader and the writer against the original libraries' own encode and decode (tests/sae/make_golden.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lockin_fast.sae import load_sae, save_saelens

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
ACTIVATION = {
    "saelens_gated": "gated",
    "saelens_topk": "topk",
    "saelens_topk_rescaled": "topk",
    "saelens_old_topk": "topk",
    "saelens_jumprelu": "jumprelu",
    "saelens_batchtopk_inference": "jumprelu",
    "saelens_batchtopk_training": "batchtopk",
    "dl_gated": "gated",
    "dl_jumprelu": "jumprelu",
    "dl_topk": "topk",
    "dl_batchtopk": "batchtopk",
    "dl_batchtopk_unfitted": "batchtopk",
    "dl_matryoshka": "batchtopk",
    "dl_wrapped": "batchtopk",
    "goodfire_pth": "relu",
    "saelens_standard": "relu",
    "gemma_scope_1": "jumprelu",
    "gemma_scope_1_compressed": "jumprelu",
    "gemma_scope_2": "jumprelu",
    "llama_scope": "jumprelu",
    "llama_scope_bf16": "jumprelu",
    "llama_scope_openmoss": "jumprelu",
    "qwen_scope_L0_7": "topk",
    "sparsify_topk": "topk",
    "sparsify_groupmax": "groupmax",
    "sparsify_transcode": "topk",
}


def load(case, **options):
    if case == "saelens_standard_expected_average":
        options["input_scale"] = json.loads((GOLDEN / "versions.json").read_text())["input_scale"]
    if case == "llama_scope_openmoss":
        options["format"] = case
    return load_sae(GOLDEN / case, **options)


def expected(case):
    return load_file(GOLDEN / case / "expected.safetensors")


def assert_as_close(actual, oracle, peer, dtype):
    """At most twice the error of the library's own run in the file's dtype, plus four ulps of the largest value."""
    ulps = 4 * torch.finfo(dtype).eps * oracle.abs().max()
    bound = 2 * (peer.double() - oracle).abs().max() + ulps
    error = (actual.double() - oracle).abs()
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= bound, f"{worst}: got {actual[worst]}, expected {oracle[worst]}, bound {bound:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_encode(case):
    sae, golden = load(case), expected(case)
    z = sae.encode(golden["x"])
    assert z.dtype == torch.float32
    assert torch.equal(z > 0, golden["z_fp64"] > 0)
    # The activations are fp32 whatever the file's dtype, so the fp32 ulp bounds the rest; but a scale that is folded
    # into bf16 rows rounds them once more, here as in the library.
    as_the_library = golden["z"].dtype == torch.float32 or case == "llama_scope_bf16"
    peer = golden["z"] if as_the_library else golden["z_fp64"].float()
    assert_as_close(z, golden["z_fp64"], peer, torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_decode(case):
    sae, golden = load(case), expected(case)
    x_hat = sae.decode(golden["z_fp64"].float(), golden["x"])
    assert_as_close(x_hat, golden["x_hat_fp64"], golden["x_hat"], sae.dtype)


@pytest.mark.parametrize("case", CASES)
def test_chosen_latents_are_the_rows_of_the_whole(case):
    latents = [41, 0, 7, 6, 47]
    whole, part = load(case), load(case, latents=latents)
    assert part.latents.tolist() == latents and part.width == 48 and whole.latents is None
    for chosen in (part, whole.rows(latents)):
        for name in ("weight", "bias", "decoder"):
            assert torch.equal(getattr(chosen, name), getattr(whole, name)[latents]), name
        assert (chosen.threshold is None) == (whole.threshold is None)
        if whole.threshold is not None:
            assert torch.equal(chosen.threshold, whole.threshold[latents])
        assert chosen.weight.is_contiguous() and chosen.weight.shape == (5, 16)


@pytest.mark.parametrize("case", CASES)
def test_dense_code_is_what_the_gate_selects_from(case):
    sae, golden = load(case), expected(case)
    dense, gated = sae.encode_latents(golden["x"]), sae.encode(golden["x"])
    assert torch.equal(gated[gated > 0], dense[gated > 0])
    assert torch.equal(sae.encode_latents(golden["x"], gated=True), gated)
    plain = ACTIVATION.get(case, sae.activation) == "relu" or case == "dl_batchtopk_unfitted"
    assert (dense > 0).sum() > (gated > 0).sum() or plain
    if plain:
        assert torch.equal(dense, gated)


@pytest.mark.parametrize("case", sorted(ACTIVATION))
def test_activation_and_k(case):
    sae = load(case)
    assert sae.activation == ACTIVATION[case]
    assert sae.k == {"topk": 7, "batchtopk": 7, "groupmax": 6}.get(sae.activation)


@pytest.mark.parametrize("case", ["written_jumprelu", "written_topk"])
def test_writer_still_writes_what_saelens_loaded(case, tmp_path):
    golden = GOLDEN / case
    sae, config = load_sae(golden), json.loads((golden / "cfg.json").read_text())
    metadata = {key: value for key, value in config["metadata"].items() if key != "sae_lens_version"}
    save_saelens(
        tmp_path / "sae",
        weight=sae.weight,
        bias=sae.bias,
        decoder=sae.decoder,
        decoder_bias=sae.decoder_bias,
        architecture=config["architecture"],
        threshold=sae.threshold,
        k=sae.k,
        **metadata,
    )
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text()) == config
    assert (tmp_path / "sae" / "sae_weights.safetensors").read_bytes() == (
        golden / "sae_weights.safetensors"
    ).read_bytes()
