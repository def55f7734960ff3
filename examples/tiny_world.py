"""Stand-ins for your model, SAE, data and latents, small enough that the examples run in seconds: examples/tiny/.

    python examples/tiny_world.py

A random Llama of three layers with a tokenizer, a random SAE in SAELens' format, chat JSONL, and latents to block in
the {"K_pos", "K_neg"} file of the paper's scripts. They mean nothing; the code around them is that for a real model.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lockin_fast.sae.write import save_saelens

HERE = Path(__file__).parent / "tiny"
WIDTH, LATENTS, LAYERS = 32, 128, 3
WORDS = (
    "how do i water feed plant wash my roses dog car house gently daily badly never with soap poison acid care"
).split()
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def write(folder: Path = HERE) -> Path:
    """Write the stand-ins below `folder`, unless they are there."""
    if (folder / "latents.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<pad>", "<unknown>", "<end>", "<user>", "<assistant>", *WORDS]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>", chat_template=CHAT
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=128, initializer_range=0.1, pad_token_id=0, bos_token_id=None,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    directions = torch.randn(LATENTS, WIDTH)
    save_saelens(
        folder / "sae", weight=directions / WIDTH**0.5, bias=torch.zeros(LATENTS), decoder=directions,
        decoder_bias=torch.zeros(WIDTH), hook_name="blocks.1.hook_resid_post", hook_layer=1, model_name="tiny",
    )  # fmt: skip
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for i in range(64):
            thing, way = ("roses", "dog", "car", "house")[i % 4], ("poison", "acid")[i // 4 % 2]
            question = {"role": "user", "content": f"how do i {('water', 'feed', 'wash')[i % 3]} my {thing}"}
            answer = {"role": "assistant", "content": f"badly with {way} daily"}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    latents = {"K_pos": [3, 17, 40, 5], "K_neg": [8, 60]}
    (folder / "latents.json").write_text(json.dumps(latents), encoding="utf-8")
    return folder


if __name__ == "__main__":
    print(f"written: {write()}")
