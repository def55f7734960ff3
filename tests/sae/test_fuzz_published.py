"""Configs that lie, archives that are no archives, and foreign parts in the formats of published SAEs."""

import zipfile

import numpy as np
import pytest
import torch
from fuzzing import GOLDEN, copy_of, edit_config, edit_tensors, refuses
from safetensors.torch import load_file, save_file

from lockin_fast.sae import load_sae


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_in": 17}, ["d_in is 17", "has 16"]),
        ({"num_latents": 64}, ["num_latents is 64", "has 48 latents"]),
        ({"expansion_factor": 4}, ["expansion_factor 4 times d_in is 64", "has 48 latents"]),
        ({"expansion_factor": "3"}, ["must be integers", "'3'"]),
        ({"k": 49}, ["k must be an integer from 1 to 48, got 49"]),
        ({"k": ...}, ["k must be an integer", "None"]),
        ({"activation": "batchtopk"}, ["activation 'batchtopk' is not supported", "groupmax"]),
        ({"activation": "groupmax"}, ["groupmax needs k to divide the 48 latents, got k=7"]),
        ({"skip_connection": True}, ["skip_connection is set"]),
    ],
)
def test_sparsify_config(changes, words, tmp_path):
    directory = copy_of("sparsify_topk", tmp_path)
    edit_config(directory, **changes)
    refuses(directory, "cfg.json", *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": 17}, ["d_model is 17", "has 16"]),
        ({"d_sae": ...}, ["d_sae is None", "has 48"]),
        ({"act_fn": "topk"}, ["act_fn is 'topk'; only 'jumprelu' is supported"]),
        ({"norm_activation": "token-wise"}, ["norm_activation is 'token-wise'"]),
        ({"apply_decoder_bias_to_pre_encoder": True}, ["apply_decoder_bias_to_pre_encoder is True"]),
        ({"jump_relu_threshold": -1}, ["jump_relu_threshold must be a number above 0, got -1"]),
        ({"jump_relu_threshold": True}, ["jump_relu_threshold must be a number above 0, got True"]),
        ({"dataset_average_activation_norm": 17.1}, ["must hold 'in' and 'out', got 17.1"]),
        ({"dataset_average_activation_norm": {"in": float("nan")}}, ["dataset_average_activation_norm.in", "nan"]),
        ({"dataset_average_activation_norm": {"in": 64.0, "out": 3.4}}, ["64.0 and 3.4", "transcoder"]),
    ],
)
def test_llama_scope_config(changes, words, tmp_path):
    directory = copy_of("llama_scope", tmp_path)
    edit_config(directory, "hyperparams.json", **changes)
    refuses(directory, "hyperparams.json", *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "topk"}, ["architecture 'topk' is not supported"]),
        ({"type": "crosscoder"}, ["type 'crosscoder' is not supported"]),
        ({"width": 16384}, ["width is 16384", "has 48"]),
        ({"affine_connection": True}, ["affine_connection is set"]),
    ],
)
def test_gemma_scope_config(changes, words, tmp_path):
    directory = copy_of("gemma_scope_2", tmp_path)
    edit_config(directory, "config.json", **changes)
    refuses(directory, "config.json", *words)


def test_gemma_scope_without_its_config(tmp_path):
    directory = copy_of("gemma_scope_2", tmp_path)
    (directory / "config.json").unlink()
    assert torch.equal(load_sae(directory).weight, load_sae(GOLDEN / "gemma_scope_2").weight)


def test_gemma_scope_with_foreign_tensors(tmp_path):
    directory = copy_of("gemma_scope_2", tmp_path)
    tensors = load_file(directory / "params.safetensors")
    save_file(tensors | {"affine_skip_connection": torch.eye(16)}, directory / "params.safetensors")
    refuses(directory, "params.safetensors", "affine_skip_connection is stored")
    save_file(tensors | {"scaling_factor": torch.ones(48)}, directory / "params.safetensors")
    assert load_sae(directory).width == 48
    save_file(tensors | {"scaling_factor": torch.full((48,), 2.0)}, directory / "params.safetensors")
    refuses(directory, "params.safetensors", "scaling_factor other than 1")


def test_an_sae_of_the_embeddings_is_refused(tmp_path):
    directory = copy_of("gemma_scope_1", tmp_path / "embedding" / "width_4k")
    refuses(directory, "params.npz", "SAE of the embeddings")


def test_arrays_that_hide_python_objects_are_not_unpickled(tmp_path):
    class Loud:
        def __reduce__(self):
            return pytest.fail, ("executed",)

    np.savez(tmp_path / "params.npz", W_enc=np.array([Loud()], dtype=object))
    refuses(tmp_path, "params.npz", "'W_enc.npy'", "object")


def test_archives_whose_arrays_do_not_fit(tmp_path):
    path = tmp_path / "params.npz"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000, 1000), }"
    arrays = {
        "1000000 numbers in 8 bytes": (
            b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8),
            "takes 8",
        ),
        "no header": (b"nothing", "W_enc.npy"),
        "header of nonsense": (b"\x93NUMPY\x01\x00\x04\x00{[(!", "W_enc.npy"),
    }
    for content, word in arrays.values():
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("W_enc.npy", content)
        refuses(tmp_path, "params.npz", word)
    np.savez(path, W_enc=np.zeros((16, 48), ">f4"))
    refuses(tmp_path, "params.npz")


def test_qwen_scope_with_more_than_its_tensors_is_not_taken_for_one(tmp_path):
    directory = copy_of("qwen_scope_L0_7", tmp_path)
    tensors = torch.load(directory / "layer3.sae.pt", weights_only=True)
    torch.save(tensors | {"threshold": torch.zeros(48)}, directory / "layer3.sae.pt")
    refuses(directory, "no SAE recognised; found", "layer3.sae.pt")
    edit_tensors(directory, threshold=None, W_dec=lambda tensor: tensor.T.contiguous())
    refuses(directory, "layer3.sae.pt", "'W_dec' must have shape [16, 48], got [48, 16]")


def test_a_folder_of_layers_needs_a_choice(tmp_path):
    directory = copy_of("qwen_scope_L0_7", tmp_path)
    (directory / "layer4.sae.pt").write_bytes((directory / "layer3.sae.pt").read_bytes())
    refuses(directory, "no SAE recognised; found expected.safetensors, layer3.sae.pt, layer4.sae.pt")
    refuses(directory, "expected one layerN.sae.pt, found 2; give the file of the layer", format="qwen_scope")
    assert load_sae(directory / "layer4.sae.pt").metadata["hook_layer"] == 4


def test_options_that_contradict_a_format():
    for case in ("gemma_scope_1", "llama_scope", "qwen_scope_L0_7", "sparsify_topk"):
        refuses(GOLDEN / case, "input_scale=2.0 does not apply", input_scale=2.0)
    for case in ("qwen_scope_L0_7", "sparsify_topk", "sparsify_groupmax"):
        refuses(GOLDEN / case, "would change which latents the", fold_decoder_norm=True)
    refuses(GOLDEN / "llama_scope", "OpenMOSS", format="llama_scope_openmoss", fold_decoder_norm=False)
