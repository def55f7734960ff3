"""Make tests/sae/golden: small random SAEs written, loaded and run by the original libraries themselves.

    make peers
    .venv-peers/bin/python tests/sae/make_golden.py

Each case is a directory as the library writes it, plus ``expected.safetensors``: activations ``x``, the library's own
code ``z`` in the file's dtype and ``z_fp64`` with the same weights in fp64, and the reconstructions ``x_hat``,
``x_hat_fp64``. Inputs are drawn so that no latent lies on its gate, which rounding could tip either way.
"""

import json
import shutil
import sys
import types
from pathlib import Path
from unittest import mock

import sae_lens
import torch
from golden_published import published_cases, sparsify_version
from golden_tools import GOLDEN, D, F, K, randomise, record

# dictionary_learning imports these for activation buffers and training logs; its SAE classes do not use them.
for name in ("nnsight", "nnsight.intervention", "zstandard", "wandb", "circuitsvis", "umap"):
    try:
        __import__(name)
    except ImportError:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = lambda attribute: mock.MagicMock()

import dictionary_learning  # noqa: E402
from dictionary_learning import dictionary as dl  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))
from lockin_fast.sae import save_saelens  # noqa: E402

INPUT_SCALE = 0.37


def saelens_from_disk(case, input_scale=None):
    def load(dtype):
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        sae = sae_lens.SAE.load_from_disk(GOLDEN / case, dtype=name)
        if input_scale is not None:
            sae.fold_activation_norm_scaling_factor(input_scale)
        return sae.encode, sae.decode

    return load


def metadata():
    return {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post"}


def saelens_cases():
    classes = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
    }
    cases = {
        "saelens_standard": ("standard", {}),
        "saelens_standard_no_b_dec": ("standard", {"apply_b_dec_to_input": False}),
        "saelens_standard_bf16": ("standard", {"dtype": "bfloat16"}),
        "saelens_standard_constant_norm": ("standard", {"normalize_activations": "constant_norm_rescale"}),
        "saelens_standard_expected_average": ("standard", {"normalize_activations": "expected_average_only_in"}),
        "saelens_jumprelu": ("jumprelu", {}),
        "saelens_jumprelu_layer_norm": ("jumprelu", {"normalize_activations": "layer_norm"}),
        "saelens_gated": ("gated", {}),
        "saelens_topk": ("topk", {"k": K}),
        "saelens_topk_rescaled": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    }
    for seed, (case, (architecture, options)) in enumerate(cases.items()):
        sae_class, config_class = classes[architecture]
        config = config_class(d_in=D, d_sae=F, metadata=sae_lens.saes.sae.SAEMetadata(**metadata()), **options)
        sae = sae_class(config)
        randomise(sae, seed)
        sae.save_model(GOLDEN / case)
        scale = INPUT_SCALE if options.get("normalize_activations") == "expected_average_only_in" else None
        record(case, seed, saelens_from_disk(case, scale))


def saelens_batchtopk_cases():
    """The training checkpoint (architecture batchtopk) and the inference SAE (jumprelu) of the same weights."""
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=True)
    sae = sae_lens.BatchTopKTrainingSAE(config)
    randomise(sae, 20)
    sae.topk_threshold.fill_(0.8)
    sae.save_inference_model(GOLDEN / "saelens_batchtopk_inference")
    sae.save_model(GOLDEN / "saelens_batchtopk_training")
    record("saelens_batchtopk_inference", 20, saelens_from_disk("saelens_batchtopk_inference"))
    expected = "expected.safetensors"
    shutil.copy(GOLDEN / "saelens_batchtopk_inference" / expected, GOLDEN / "saelens_batchtopk_training" / expected)


def saelens_old_cases():
    """Flat configs as versions 2 to 5 wrote them, read back by today's library."""
    flat = {
        "model_name": "tiny",
        "hook_point": "blocks.2.hook_resid_post",
        "hook_point_layer": 2,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "sae_lens_training_version": "3.11.0",
        "finetuning_scaling_factor": False,
    }
    cases = {
        "saelens_old_standard": ("saelens_standard", {"activation_fn_str": "relu", "normalize_activations": "none"}),
        "saelens_old_topk": (
            "saelens_topk",
            {
                "architecture": "standard",
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": K},
                "normalize_activations": False,
            },
        ),
    }
    for seed, (case, (weights, fields)) in enumerate(cases.items(), start=30):
        (GOLDEN / case).mkdir()
        (GOLDEN / case / "cfg.json").write_text(json.dumps(flat | fields))
        shutil.copy(GOLDEN / weights / "sae_weights.safetensors", GOLDEN / case)
        record(case, seed, saelens_from_disk(case))


def written_cases():
    """Written by this project, loaded and run by SAELens."""
    shared = metadata() | {"hook_layer": 2, "decoder_bias": torch.randn(D)}
    for seed, (architecture, options) in enumerate(
        {"jumprelu": {"threshold": torch.rand(F)}, "topk": {"k": K}}.items()
    ):
        case = f"written_{architecture}"
        rows = {"weight": torch.randn(F, D), "bias": torch.randn(F), "decoder": torch.randn(F, D)}
        save_saelens(GOLDEN / case, architecture=architecture, **rows, **options, **shared)
        record(case, 70 + seed, saelens_from_disk(case))


def dictionary_learning_cases():
    cases = {
        "dl_autoencoder": (dl.AutoEncoder, (D, F), {}),
        "dl_autoencoder_new": (dl.AutoEncoderNew, (D, F), {}),
        "dl_gated": (dl.GatedAutoEncoder, (D, F), {}),
        "dl_jumprelu": (dl.JumpReluAutoEncoder, (D, F), {}),
        "dl_topk": (AutoEncoderTopK, (D, F, K), {"k": K}),
        "dl_batchtopk": (BatchTopKSAE, (D, F, K), {"k": K, "threshold": 0.6}),
        "dl_batchtopk_unfitted": (BatchTopKSAE, (D, F, K), {"k": K, "threshold": -1.0}),
        "dl_matryoshka": (MatryoshkaBatchTopKSAE, (D, F, K, [16, 32]), {"k": K, "threshold": 0.6}),
        "dl_wrapped": (BatchTopKSAE, (D, F, K), {"k": K, "threshold": 0.6, "norm_factor": 3.7}),
    }
    for seed, (case, (dictionary_class, arguments, options)) in enumerate(cases.items(), start=40):
        torch.manual_seed(seed)
        autoencoder = dictionary_class(*arguments)
        randomise(autoencoder, seed)
        if "threshold" in options:
            autoencoder.threshold.fill_(options["threshold"])
        (GOLDEN / case).mkdir()
        trainer = {"dict_class": dictionary_class.__name__, "lm_name": "tiny", "layer": 2, "activation_dim": D}
        trainer |= {"dict_size": F} | ({"k": K} if "k" in options else {})
        (GOLDEN / case / "config.json").write_text(json.dumps({"trainer": trainer}, indent=4))
        state = autoencoder.state_dict()
        factor = options.get("norm_factor")
        torch.save(state if factor is None else {"ae": state, "norm_factor": factor}, GOLDEN / case / "ae.pt")
        record(case, seed, dictionary_from_disk(case, dictionary_class, arguments, factor))


def dictionary_from_disk(case, dictionary_class, arguments, factor):
    def load(dtype):
        if factor is None:
            autoencoder = dictionary_class.from_pretrained(GOLDEN / case / "ae.pt")
        else:
            autoencoder = dictionary_class(*arguments)
            autoencoder.load_state_dict(torch.load(GOLDEN / case / "ae.pt")["ae"])
            autoencoder.scale_biases(factor)
        autoencoder = autoencoder if dtype is None else autoencoder.to(dtype)
        return autoencoder.encode, autoencoder.decode

    return load


def main():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    saelens_cases()
    saelens_batchtopk_cases()
    saelens_old_cases()
    torch.manual_seed(0)
    written_cases()
    dictionary_learning_cases()
    published_cases()
    versions = {
        "sae-lens": sae_lens.__version__,
        "dictionary-learning": dictionary_learning.__version__,
        "eai-sparsify": sparsify_version(),
        "torch": torch.__version__,
        "input_scale": INPUT_SCALE,
    }
    (GOLDEN / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
