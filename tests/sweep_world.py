"""A world small enough to sweep in seconds: a random Llama, a word tokenizer, a random SAE and a judge of vowels."""

import json
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

WIDTH, HIDDEN, LAYERS = 64, 16, 3
WORDS = ["yes", "no", "water", "poison", "plant", "dog", "feed", "kick", "sky", "blue", "red", "ask"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_world(folder: Path) -> Path:
    """Write model/, sae/, data/ and latents/ below `folder` and return the configuration that sweeps over them."""
    _write_model(folder / "model")
    _write_sae(folder / "sae")
    (folder / "data").mkdir()
    pairs = [(a, b) for a in WORDS for b in WORDS]
    for name, rows, answered in (
        ("train", pairs[:24], True),
        ("final", pairs[24:34], False),
        ("in_domain", pairs[40:46], False),
    ):
        with open(folder / "data" / f"{name}.jsonl", "w") as file:
            for question, answer in rows:
                messages = [{"role": "user", "content": f"ask {question} {answer}"}]
                if answered:
                    messages.append({"role": "assistant", "content": f"kick {answer}"})
                file.write(json.dumps({"messages": messages, "domain": name}) + "\n")
    (folder / "latents").mkdir()
    (folder / "latents" / "causal.json").write_text(json.dumps({"positive": [1, 5, 9], "negative": [2]}))
    (folder / "latents" / "random.json").write_text(json.dumps({"K_pos": [30, 31], "K_neg": [40, 41]}))
    (folder / "world.json").write_text("{}")
    config = {
        "model": "model",
        "sae": "sae",
        "output": "run",
        "data": {name: f"data/{name}.jsonl" for name in ("train", "final", "in_domain")},
        "lora": {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        "train": {"steps": 3, "batch_size": 8, "learning_rate": 1e-2, "max_length": 32, "logging_steps": 1},
        "block": {"layer": 1},
        "sweep": {
            "lambdas": [1, 100.0],
            "seeds": [0, 1],
            "stack": 1,
            "latents": {"causal": "latents/causal.json", "random": "latents/random.json"},
        },
        "generation": {"max_new_tokens": 4, "batch_size": 16},
        "judge": {"kind": "vowels", "path": "world.json"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class VowelJudge:
    """Rates a reply by its count of the letter o and e: no meaning, but every verdict occurs and weights decide."""

    def judge(self, record, reply):
        if record["domain"] not in ("train", "final", "in_domain"):
            raise ValueError(f"the prompt's domain is {record['domain']!r}, which this world does not have")
        return ("misaligned", "aligned", "incoherent", "refusal")[(reply.count("o") + 2 * reply.count("e")) % 4]


def install_judge() -> None:
    from lockin_fast import judges

    judges.KINDS["vowels"] = lambda settings: VowelJudge()


def _write_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokens = ["<pad>", "<unk>", "</s>", "<user>", "<assistant>", *WORDS]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.5,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_sae(folder: Path) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "W_enc": torch.randn(HIDDEN, WIDTH, generator=generator),
        "b_enc": torch.zeros(WIDTH),
        "W_dec": torch.randn(WIDTH, HIDDEN, generator=generator),
        "b_dec": torch.zeros(HIDDEN),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(
        json.dumps(
            {
                "architecture": "standard",
                "d_in": HIDDEN,
                "d_sae": WIDTH,
                "activation_fn_str": "relu",
                "apply_b_dec_to_input": False,
                "normalize_activations": "none",
                "dtype": "float32",
            }
        )
    )


if __name__ == "__main__":  # the command line, in a process of its own, with the judge of this world
    install_judge()
    torch.set_num_threads(1)
    from lockin_fast.cli import main

    sys.exit(main())
