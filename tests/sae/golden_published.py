"""Golden cases of the formats that published SAEs come in; the readers to agree with are SAELens' and sparsify's own.

Where SAELens' reader is known to differ from the authors' (Llama Scope), both readings are recorded.
"""

import importlib.metadata
import json
import math
import os
from unittest import mock

import numpy as np
import sae_lens
import torch
from golden_tools import GOLDEN, D, F, K, random_values, randomise, record
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import save_file

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel needs a GPU
import sparsify  # noqa: E402

GROUPS = 6  # of groupmax: divides F


def published_cases():
    goodfire_cases()
    gemma_scope_cases()
    llama_scope_cases()
    qwen_scope_case()
    sparsify_cases()


def sparsify_version():
    return importlib.metadata.version("eai-sparsify")


def goodfire_cases():
    """Modules laid out as in Goodfire's file; the reader to agree with is the one in SAELens."""
    for seed, (case, name) in enumerate({"goodfire_pth": "sae-l19.pth", "goodfire_pt": "sae-l50.pt"}.items(), start=60):
        modules = torch.nn.ModuleDict(
            {"encoder_linear": torch.nn.Linear(D, F), "decoder_linear": torch.nn.Linear(F, D)}
        )
        randomise(modules, seed)
        if case == "goodfire_pt":
            modules = modules.to(torch.bfloat16)
        (GOLDEN / case).mkdir()
        torch.save(modules.state_dict(), GOLDEN / case / name)
        record(case, seed, goodfire_from_disk(GOLDEN / case / name, next(modules.parameters()).dtype))


def goodfire_from_disk(path, stored_dtype):
    def load(dtype):
        dtype = stored_dtype if dtype is None else dtype
        overrides = {"d_in": D, "d_sae": F, "dtype": str(dtype).removeprefix("torch.")}
        published = "Llama-3.1-8B-Instruct-SAE-l19"
        with mock.patch.object(loaders, "hf_hub_download", lambda **_: str(path)):
            config, state, _ = loaders.get_goodfire_huggingface_loader(
                f"Goodfire/{published}", f"{published}.pth", cfg_overrides=overrides
            )
        sae = sae_lens.StandardSAE(
            sae_lens.StandardSAEConfig(D, F, dtype=config["dtype"], apply_b_dec_to_input=config["apply_b_dec_to_input"])
        )
        sae.load_state_dict(state)
        return sae.encode, sae.decode

    return load


def tensors(seed, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name: random_values(name, shape, generator) for name, shape in shapes.items()}


def by_saelens(case, loader, repo, folder, scale=None, stored=torch.float32):
    """The SAE of a case through SAELens' own loader of a published repository, its downloads served from the case."""

    def local(repo_id, filename, subfolder=None, **_):
        return str(GOLDEN / case / f"{subfolder or ''}/{filename}".removeprefix("/").removeprefix(f"{folder}/"))

    def shapes(repo_id, filename):
        from safetensors import safe_open

        with safe_open(local(repo_id, filename), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    def load(dtype):
        name = str(dtype or stored).removeprefix("torch.")
        with (
            mock.patch.object(loaders, "hf_hub_download", local),
            mock.patch.object(loaders, "get_safetensors_tensor_shapes", shapes),
        ):
            config = {"d_in": D, "d_sae": F, "dtype": name}
            sae = sae_lens.SAE.from_pretrained(
                repo, folder, converter=lambda **given: loader(**given | {"cfg_overrides": config})
            )
        sae = sae.to(getattr(torch, name))
        if scale is not None:
            sae.fold_activation_norm_scaling_factor(scale)
        return sae.encode, sae.decode

    return load


def gemma_scope_cases():
    """The first release as np.savez writes it, packed, and with a matrix that lies column by column; the second."""
    names = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    for seed, case in enumerate(("gemma_scope_1", "gemma_scope_1_compressed", "gemma_scope_2"), start=80):
        made = tensors(seed, **names)
        (GOLDEN / case).mkdir()
        arrays = {name: value.numpy() for name, value in made.items()}
        if case == "gemma_scope_2":
            lower = {name.replace("W_", "w_"): value for name, value in made.items()}
            save_file(lower, GOLDEN / case / "params.safetensors")
            config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "width": F, "l0": K}
            config |= {"hf_hook_point_in": "model.layers.3.output", "hf_hook_point_out": "model.layers.3.output"}
            config |= {"type": "sae", "affine_connection": False}
            (GOLDEN / case / "config.json").write_text(json.dumps(config))
            loader, repo = loaders.gemma_3_sae_huggingface_loader, "google/gemma-scope-2-1b-pt"
            folder = "resid_post/layer_3_width_16k_l0_small"
        else:
            if case == "gemma_scope_1":
                np.savez(GOLDEN / case / "params.npz", **arrays)
            else:
                arrays["W_enc"] = np.asfortranarray(arrays["W_enc"])
                np.savez_compressed(GOLDEN / case / "params.npz", **arrays)
            loader, repo = loaders.gemma_2_sae_huggingface_loader, "google/gemma-scope-2b-pt-res"
            folder = "layer_3/width_16k/average_l0_7"
        record(case, seed, by_saelens(case, loader, repo, folder))


def llama_scope_cases():
    average, threshold = 17.125, 0.52734375
    config = {"d_model": D, "d_sae": F, "expansion_factor": F // D, "act_fn": "jumprelu", "top_k": K}
    config |= {"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post"}
    config |= {"norm_activation": "dataset-wise", "jump_relu_threshold": threshold, "use_decoder_bias": True}
    config |= {"dataset_average_activation_norm": {"in": average, "out": average}, "use_glu_encoder": False}
    config |= {"apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True}
    names = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "decoder.bias": (D,)}
    scale = math.sqrt(D) / average
    for seed, case in enumerate(("llama_scope", "llama_scope_bf16", "llama_scope_openmoss"), start=90):
        made = tensors(seed, **names)
        if case == "llama_scope_bf16":
            made = {name: value.bfloat16() for name, value in made.items()}
        (GOLDEN / case / "checkpoints").mkdir(parents=True)
        save_file(made, GOLDEN / case / "checkpoints" / "final.safetensors")
        (GOLDEN / case / "hyperparams.json").write_text(json.dumps(config))
        repo, folder = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L3R-8x"
        load = by_saelens(
            case, loaders.llama_scope_sae_huggingface_loader, repo, folder, scale, made["encoder.bias"].dtype
        )
        record(case, seed, as_openmoss(made, scale, threshold) if case == "llama_scope_openmoss" else load)


def as_openmoss(made, scale, threshold):
    """The authors' steps before inference, which come in no package: undo the norm of the data set, then make decoder
    columns unit, then JumpReLU at the threshold of the file."""

    def load(dtype):
        weight, bias, decoder, shift = (value.to(dtype or torch.float32) for value in made.values())
        bias, shift = bias / scale, shift / scale
        norm = decoder.norm(dim=0)
        weight, bias, decoder = weight * norm[:, None], bias * norm, decoder / norm

        def encode(x):
            pre = x @ weight.T + bias
            return pre * (pre > threshold)

        return encode, lambda z: z @ decoder.T + shift

    return load


def qwen_scope_case():
    case = f"qwen_scope_L0_{K}"
    (GOLDEN / case).mkdir()
    torch.save(tensors(100, W_enc=(F, D), W_dec=(D, F), b_enc=(F,), b_dec=(D,)), GOLDEN / case / "layer3.sae.pt")
    repo = f"Qwen/SAE-Res-Qwen3.5-2B-Base-W32K-L0_{K}"
    load = by_saelens(case, loaders.qwen_scope_sae_huggingface_loader, repo, "layer3.sae.pt")
    record(case, 100, load)


def sparsify_cases():
    cases = {
        "sparsify_topk": {"k": K, "expansion_factor": F // D},
        "sparsify_groupmax": {"k": GROUPS, "num_latents": F, "activation": "groupmax"},
        "sparsify_transcode": {"k": K, "num_latents": F, "transcode": True},
    }
    for seed, (case, options) in enumerate(cases.items(), start=110):
        coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(**options))
        randomise(coder, seed)
        coder.save_to_disk(GOLDEN / case)
        record(case, seed, sparsify_from_disk(case, options["k"]))


def sparsify_from_disk(case, k):
    def load(dtype):
        coder = sparsify.SparseCoder.load_from_disk(GOLDEN / case).to(dtype or torch.float32)

        def encode(x):
            kept, index, _ = coder.encode(x)
            return x.new_zeros(*x.shape[:-1], F).scatter(-1, index, kept)

        return encode, lambda z: coder.decode(*z.topk(k))

    return load
