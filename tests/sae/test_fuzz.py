"""Damaged, hostile and inconsistent files: one clear line that names the file and the field, and nothing executed."""

import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import GOLDEN, WEIGHTS_FILE, copy_of, edit_config, edit_tensors, refuses
from safetensors.torch import load_file, save_file

from lockin_fast.sae import load_sae


@pytest.fixture
def copy(tmp_path):
    return lambda case: copy_of(case, tmp_path)


def set_nan(tensor):
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    tensor.view(-1)[5] = float("nan")
    return tensor


def test_path_does_not_exist(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere", "no such file or directory", error=FileNotFoundError)
    refuses(tmp_path / "nowhere.safetensors", "nowhere", error=FileNotFoundError)


def test_empty_and_foreign_directories(tmp_path):
    refuses(tmp_path, str(tmp_path), "found nothing", "saelens", "dictionary_learning", "goodfire")
    (tmp_path / "model.gguf").write_bytes(b"")
    refuses(tmp_path, "found model.gguf", "gemma_scope", "llama_scope", "sparsify", "qwen_scope")
    refuses(tmp_path, "expected one .pth or .pt file, found 0", format="goodfire")
    refuses(tmp_path, "cfg.json", error=FileNotFoundError, format="saelens")
    refuses(tmp_path, "ae.pt", error=FileNotFoundError, format="dictionary_learning")
    (tmp_path / "notes.txt").write_text("")
    refuses(tmp_path / "notes.txt", "no SAE recognised")


def test_wrong_options():
    refuses(GOLDEN / "goodfire_pth", "format must be one of", "'gguf'", format="gguf")
    refuses(GOLDEN / "goodfire_pth", "dtype must be one of", dtype=torch.int8)
    refuses(GOLDEN / "goodfire_pth", "dtype must be one of", dtype="bfloat16")
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        refuses(GOLDEN / "saelens_standard_expected_average", "input_scale must be positive", input_scale=scale)
    for case in WEIGHTS_FILE:
        refuses(GOLDEN / case, "index 48 is out of range for an SAE of 48 latents", latents=[1, 48])
        refuses(GOLDEN / case, "index -1 is out of range", latents=[-1])
        refuses(GOLDEN / case, "index 3 occurs more than once", latents=[3, 2, 3])


@pytest.mark.parametrize("case", WEIGHTS_FILE)
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, 0.9, -1])
def test_truncated(case, keep, copy):
    directory = copy(case)
    path = directory / WEIGHTS_FILE[case]
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    refuses(directory, path.name)


@pytest.mark.parametrize("case", WEIGHTS_FILE)
def test_flipped_bytes_never_crash(case, copy):
    """Damage the format does not notice may give other numbers; anything it notices is a clear error."""
    directory = copy(case)
    path = directory / WEIGHTS_FILE[case]
    whole, generator = path.read_bytes(), random.Random(7)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[generator.randrange(min(len(whole), 1500))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load_sae(directory)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and str(directory) in str(error)
            refused += 1
    assert refused


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("name", ["ae.pt", "sae.pth"])
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_hostile_pickle_is_not_executed(name, save, tmp_path):
    target = str(tmp_path / "executed")
    (tmp_path / "sae").mkdir()
    save({"encoder_linear.weight": torch.zeros(3, 2), "extra": Hostile(target)}, tmp_path / "sae" / name)
    refuses(tmp_path / "sae", name)
    refuses(tmp_path / "sae" / name, name)
    assert not os.path.exists(target)


def test_pickles_that_are_no_state_dict(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "ae.pt")
    refuses(tmp_path, "ae.pt", "expected a state dict, got list")
    torch.save({"config": {"lr": 0.1}, "note": "x"}, tmp_path / "ae.pt")
    refuses(tmp_path, "ae.pt", "not a dictionary_learning SAE")
    torch.save({1: torch.zeros(3), "W_enc": torch.zeros(2, 3)}, tmp_path / "ae.pt")
    refuses(tmp_path, "ae.pt")


@pytest.mark.parametrize(
    ("case", "name"),
    [("saelens_jumprelu", name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")]
    + [("dl_batchtopk", name) for name in ("encoder__weight", "encoder__bias", "decoder__weight", "b_dec")]
    + [("goodfire_pth", f"{part}_linear__{kind}") for part in ("encoder", "decoder") for kind in ("weight", "bias")]
    + [("gemma_scope_1", name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")]
    + [("gemma_scope_2", name) for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")]
    + [("llama_scope", f"{part}__{kind}") for part in ("encoder", "decoder") for kind in ("weight", "bias")]
    + [("qwen_scope_L0_7", name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")]
    + [("sparsify_topk", name) for name in ("encoder__weight", "encoder__bias", "W_dec", "b_dec")],
)
def test_missing_wrong_and_nan_tensors(case, name, copy):
    directory = copy(case)
    stored = name.replace("__", ".")
    file = edit_tensors(directory, **{name: set_nan})
    refuses(directory, file, repr(stored), "NaN or Inf")
    edit_tensors(directory, **{name: lambda tensor: torch.zeros(*tensor.shape, dtype=torch.int32)})
    refuses(directory, file, repr(stored), "torch.int32")
    edit_tensors(directory, **{name: lambda tensor: torch.zeros(*tensor.shape, 2)})
    refuses(directory, file, repr(stored), "dimension(s)")
    edit_tensors(directory, **{name: lambda tensor: torch.zeros([size + 1 for size in tensor.shape[:-1]])})
    refuses(directory, file)
    edit_tensors(directory, **{name: None})
    # A pickle without a tensor that it is known by is no longer known; a W_ may be a w_ as well.
    unknown = stored == "encoder_linear.weight" or case == "qwen_scope_L0_7"
    refuses(directory, *([] if unknown else [file, f"{stored[1:]}'", "missing"]))


def test_transposed_matrices_are_noticed(copy):
    directory = copy("goodfire_pth")
    file = edit_tensors(directory, decoder_linear__weight=lambda tensor: tensor.T.contiguous())
    refuses(directory, file, "'decoder_linear.weight'", "must have shape [16, 48], got [48, 16]")


def test_nan_outside_the_chosen_latents_is_not_read(copy):
    directory = copy("goodfire_pth")
    edit_tensors(directory, encoder_linear__weight=set_nan)
    refuses(directory, "latent 0")
    refuses(directory, "latent 0", latents=[4, 0])
    assert load_sae(directory, latents=[4, 1]).weight.isfinite().all()


def test_values_that_overflow_when_folded_are_named(copy):
    directory = Path(shutil.copytree(GOLDEN / "saelens_gated", copy("saelens_jumprelu").parent / "gated"))
    tensors = load_file(directory / "sae_weights.safetensors")
    save_file(tensors | {"r_mag": torch.full((48,), 200.0)}, directory / "sae_weights.safetensors")
    refuses(directory, str(directory), "folded in", "holds NaN or Inf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "matching_pursuit"}, ["architecture 'matching_pursuit' is not supported", "standard"]),
        ({"architecture": ["standard"]}, ["architecture ['standard'] is not supported"]),
        ({"architecture": "gated"}, ["tensor 'b_mag' is missing"]),
        ({"architecture": "topk"}, ["k must be an integer from 1 to 48, got None"]),
        ({"architecture": "topk", "k": 49}, ["k must be an integer from 1 to 48, got 49"]),
        ({"architecture": "topk", "k": 2.5}, ["k must be an integer", "2.5"]),
        ({"architecture": "topk", "k": float("inf")}, ["k must be an integer"]),
        ({"architecture": "batchtopk", "k": 4}, ["'topk_threshold' must be a single number"]),
        ({"normalize_activations": "covariance_whitening"}, ["normalize_activations 'covariance_whitening'"]),
        ({"activation_fn_str": "tanh-relu"}, ["activation_fn 'tanh-relu' is not supported"]),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": [3]}, ["activation_fn"]),
        ({"apply_b_dec_to_input": "yes"}, ["apply_b_dec_to_input must be true or false, got 'yes'"]),
        ({"d_in": 17}, ["d_in is 17", "has 16"]),
        ({"d_sae": 64}, ["d_sae is 64", "has 48"]),
        ({"d_sae": ...}, ["d_sae is None"]),
    ],
)
def test_saelens_config(changes, words, copy):
    directory = copy("saelens_jumprelu")
    edit_config(directory, **changes)
    where = "sae_weights.safetensors" if "missing" in words[0] or "single" in words[0] else "cfg.json"
    refuses(directory, where, *words)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff"])
def test_config_that_is_no_json_object(text, copy):
    directory = copy("saelens_jumprelu")
    (directory / "cfg.json").write_bytes(text.encode("latin-1"))
    refuses(directory, "cfg.json", "JSON")


def test_saelens_files_missing(copy):
    directory = copy("saelens_jumprelu")
    (directory / "cfg.json").unlink()
    refuses(directory, "cfg.json", error=FileNotFoundError)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"dict_class": "CrossCoder"}, ["dict_class 'CrossCoder' is not supported", "BatchTopKSAE"]),
        ({"dict_class": ["BatchTopKSAE"]}, ["dict_class ['BatchTopKSAE'] is not supported"]),
        ({"dict_class": "JumpReluAutoEncoder"}, ["tensor 'W_enc' is missing"]),
        ({"dict_class": "BatchTopKSAE", "k": 3}, ["k is 7 here but 3 in"]),
        ([1], ["trainer must be an object"]),
    ],
)
def test_dictionary_learning_config(trainer, words, copy):
    directory = copy("dl_batchtopk")
    edit_config(directory, "config.json", trainer=trainer)
    refuses(directory, *words)


def test_wrapped_checkpoint_with_an_impossible_factor(tmp_path):
    content = torch.load(GOLDEN / "dl_wrapped" / "ae.pt", weights_only=True)
    shutil.copy(GOLDEN / "dl_wrapped" / "config.json", tmp_path)
    for factor in (0.0, -2.0, float("nan"), float("inf")):
        torch.save(content | {"norm_factor": factor}, tmp_path / "ae.pt")
        refuses(tmp_path, "ae.pt", "norm_factor must be positive and finite")


def test_scalar_threshold_of_the_wrong_kind(copy):
    directory = copy("dl_batchtopk")
    file = edit_tensors(directory, threshold=lambda _: torch.zeros(48))
    refuses(directory, file, "'threshold' must be a single number")
    edit_tensors(directory, threshold=lambda _: torch.tensor(float("nan")))
    refuses(directory, file, "threshold")
