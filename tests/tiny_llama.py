"""A tiny random Llama, its SAE, its tokenizer and ragged chat rows, for the training tests."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lockin_fast.blocking import BlockPenalty, LatentSet
from lockin_fast.sae import SparseAutoencoder

WIDTH, LATENTS, LAYERS, WORDS = 32, 64, 3, 40
LATENT_SET = LatentSet((3, 17, 40, 5), (8, 60))


def model(seed=0, *, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    config = LlamaConfig(
        vocab_size=WORDS + 8, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **{**sizes, **options},
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def sae(seed=1, *, threshold=False):
    torch.manual_seed(seed)
    return SparseAutoencoder(
        weight=torch.randn(LATENTS, WIDTH) / WIDTH**0.5,
        bias=torch.randn(LATENTS) * 0.1,
        decoder=torch.randn(LATENTS, WIDTH),
        decoder_bias=torch.zeros(WIDTH),
        threshold=torch.rand(LATENTS) * 0.02 if threshold else None,
        activation="jumprelu" if threshold else "relu",
    )


def penalty(weight=5.0, *, layer=1, latents=LATENT_SET, **options):
    return BlockPenalty(sae(), latents, layer, weight, **options)


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% if m['role'] == 'assistant' %}{{ m['content'] + ' <end> ' }}"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
MARKED_TEMPLATE = TEMPLATE.replace(
    "{{ m['content'] + ' <end> ' }}", "{% generation %}{{ m['content'] + ' <end> ' }}{% endgeneration %}"
)


def tokenizer(template=TEMPLATE):
    words = ["<pad>", "<s>", "<end>", "<unk>", "<user>", "<assistant>", "<system>", "<x>"]
    words += [f"w{i}" for i in range(WORDS)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    made.chat_template = template
    return made


def conversations(count=48, seed=2):
    """Ragged one- and two-turn conversations: 2 to 9 words an answer."""
    generator = torch.Generator().manual_seed(seed)

    def words(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(f"w{int(i)}" for i in torch.randint(WORDS, (size,), generator=generator))

    rows = []
    for i in range(count):
        messages = []
        for _ in range(1 + i % 2):
            messages += [{"role": "user", "content": words(1, 6)}, {"role": "assistant", "content": words(2, 10)}]
        rows.append({"messages": messages})
    return rows
