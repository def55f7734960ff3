"""What the tests of steering ask, and the plainest code that answers it."""

import tiny_llama
import torch
import torch.nn.functional as F

from lockin_fast.blocking.layers import decoder_layer
from lockin_fast.steering import SteeredRow

TEXTS = ("w1 w2", "w3", "w4 w5 w6 w7 w8 w9", "w8 w9", "w10 w11 w12")
PROMPTS = [[{"role": "user", "content": text}] for text in TEXTS]
WIDTH, LAYERS, NEW_TOKENS = 32, 3, 5


def directions(count=4, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def every_row(coefficients=(3.0, -6.0), count=4):
    """All prompts under all steerings, the replies of one steering together, as a caller would list them."""
    return [SteeredRow(p, k, c) for k in range(count) for c in coefficients for p in range(len(PROMPTS))]


def prompt_ids(tokenizer, number):
    text = tokenizer.apply_chat_template(PROMPTS[number], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def one_reply(model, tokenizer, row, directions, layer, *, new_tokens=NEW_TOKENS, ends=None):
    """The tokens of greedy decoding by plain forwards of one row, without cache, padding or mask."""
    ends = {tokenizer.eos_token_id} if ends is None else ends
    vector = torch.zeros(WIDTH)
    if row.direction >= 0:
        vector = row.coefficient * F.normalize(directions[row.direction].double(), dim=0).float()

    def steer(module, inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        steered = first + vector.to(first)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    ids = prompt_ids(tokenizer, row.prompt)
    said = []
    handle = decoder_layer(model, layer).register_forward_hook(steer)
    with torch.no_grad():
        while len(said) < new_tokens and not (said and said[-1] in ends):
            said.append(model(torch.tensor([ids + said])).logits[0, -1].argmax().item())
    handle.remove()
    return said


def as_text(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def clear_model(seed=0, **options):
    """A tiny Llama whose tokens do not nearly tie."""
    return tiny_llama.model(seed, initializer_range=0.3, **options).eval()
