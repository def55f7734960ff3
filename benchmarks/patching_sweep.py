"""python -m benchmarks.patching_sweep: logit differences under patches of all layers x prefix and reply, both ways.

The same sites and contrasts three ways, all in one process on one model with an adapter: one whole forward a site with
a hook that puts the other side's states in, in eager batches (as TransformerLens or nnsight do it); the same with rows
of one length only in a batch, so that nothing is padded; and ours. Results have to be equal to fp32 rounding, or
nothing is printed. The clean runs that sources are taken from count for everybody. The organism, and a random Llama of
a shape nearer to real ones. --small takes a few contrasts of the organism of the tests' size. Written to
results/patching_sweep.csv.
"""

import argparse
import random
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.measure import describe, interleaved, provenance, write_csv
from lockin_fast.blocking.layers import decoder_layers
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.logit_difference import Contrast, differences
from lockin_fast.patching.sides import Sides
from lockin_fast.patching.sites import SIDES, Site, sites
from lockin_fast.patching.spans import PromptTokens

POSITIONS = ("prefix", "generated")
CASES = {  # layers, width, heads, vocabulary, prompt, reply, contrasts, batch
    "small": (3, 64, 4, 128, (9, 14), (3, 6), 8, 16),
    "organism": (6, 128, 4, 512, (16, 22), (4, 9), 45, 128),  # the shape of its model and of its chats
    "width 384": (12, 384, 6, 4096, (40, 70), (12, 24), 8, 16),
}


def model_of(layers, width, heads, vocabulary):
    """A random Llama with a random LoRA adapter on its attention and MLP."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=256, initializer_range=0.05,
    )  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    ).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "lora_B" in name:
            parameter.normal_(std=0.05)
    return model


def contrasts_of(vocabulary, prompt, reply, count):
    draw = random.Random(0)

    def tokens(low, high):
        return [draw.randrange(vocabulary) for _ in range(draw.randint(low, high))]

    return [Contrast(PromptTokens(tokens(*prompt), None), tokens(*reply), tokens(*reply)) for _ in range(count)]


class WholeForwards:
    """One forward of all layers and tokens for every site, with a hook: right-padded rows, as libraries batch them."""

    def __init__(self, model, sides, contrasts, batch_size, *, one_length):
        self.model, self.sides = model, sides
        rows = [
            ([*c.prompt.ids, *reply], len(c.prompt.ids), n, sign)
            for n, c in enumerate(contrasts)
            for reply, sign in ((c.misaligned, 1.0), (c.aligned, -1.0))
        ]
        rows.sort(key=lambda row: len(row[0]))
        self.batches = [*self._batches(rows, batch_size, one_length)]
        self.count = len(contrasts)

    def _batches(self, rows, size, one_length) -> Iterator[tuple]:
        while rows:
            take = [row for row in rows[:size] if not one_length or len(row[0]) == len(rows[0][0])]
            rows = rows[len(take) :]
            length = max(len(ids) for ids, *_ in take)
            ids = torch.tensor([row[0] + [0] * (length - len(row[0])) for row in take])
            column = torch.arange(length)
            real = column < torch.tensor([len(row[0]) for row in take])[:, None]
            reply = real & (column >= torch.tensor([row[1] for row in take])[:, None])
            masks = {"prefix": real & ~reply, "generated": reply}
            yield ids, real.long(), masks, torch.tensor([row[2] for row in take]), torch.tensor([r[3] for r in take])

    @torch.no_grad()
    def __call__(self, wanted: list[Site]) -> torch.Tensor:
        """Logit differences [sites, C]."""
        result = torch.zeros(len(wanted), self.count)
        layers = decoder_layers(self.model)
        for ids, attention, masks, number, sign in self.batches:
            states = {side: self._states(side, layers, ids, attention) for side in ("base", "misaligned")}
            for row, site in enumerate(wanted):
                source, target = SIDES[site.direction]
                there, mask = states[source][site.layer], masks[site.positions][..., None]
                put = partial(_put, mask, there)
                with self.sides.as_model(target), layers[site.layer].register_forward_hook(put):
                    logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False).logits
                told = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
                score = (told * masks["generated"][:, 1:]).sum(1) * sign
                result[row].index_add_(0, number, score)
        return result

    def _states(self, side, layers, ids, attention):
        found = []
        hooks = [layer.register_forward_hook(lambda m, a, out: found.append(out)) for layer in layers]
        with self.sides.as_model(side):
            self.model(input_ids=ids, attention_mask=attention, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found


def _put(mask, there, module, args, output):
    return torch.where(mask, there, output)


def rows_of(name, rounds):
    layers, width, heads, vocabulary, prompt, reply, count, batch_size = CASES[name]
    model = model_of(layers, width, heads, vocabulary)
    runner, sides = Runner(model), Sides(model)
    contrasts = contrasts_of(vocabulary, prompt, reply, count)
    wanted = sites(("repair", "induce"), ("residual",), range(layers), POSITIONS, heads)
    hooks = WholeForwards(model, sides, contrasts, batch_size, one_length=False)
    unpadded = WholeForwards(model, sides, contrasts, batch_size, one_length=True)
    ours = partial(differences, runner, sides, contrasts, wanted, batch_size=batch_size)
    providers = {
        "one forward a site": partial(hooks, wanted), "one forward a site, no padding": partial(unpadded, wanted),
        "ours": ours,
    }  # fmt: skip
    expected, found = hooks(wanted), ours().patched
    error = (found - expected).abs().max().item()
    bound = 1e-5 * max(len(c.misaligned) + len(c.aligned) for c in contrasts) * expected.abs().max().item()
    if error > bound:
        raise SystemExit(f"{name}: ours is off by {error:.2g} nats, more than {bound:.2g}; no time is told")
    timing = interleaved(providers, rounds, warmup=1)
    best = min(timing[provider].median for provider in providers if provider != "ours")
    for provider, taken in timing.items():
        yield {
            "case": name, "provider": provider, "sites": len(wanted), "contrasts": count, "layers": layers,
            "width": width, "seconds": f"{taken.median:.4g}", "low": f"{taken.low:.4g}", "high": f"{taken.high:.4g}",
            "ratio_to_best_baseline": f"{best / taken.median:.3g}", "largest_error_nats": f"{error:.2g}",
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a model of three thin layers, once, and no file")
    small = parser.parse_args().small
    print(describe(provenance()))
    results = []
    for name in ["small"] if small else [name for name in CASES if name != "small"]:
        for row in rows_of(name, rounds=1 if small else 5):
            print(
                f"  {row['case']:<12}{row['provider']:<32}{row['seconds']:>9} s ({row['low']} to {row['high']})"
                f"{row['ratio_to_best_baseline']:>8}x  largest difference {row['largest_error_nats']} nats"
            )
            results.append(row)
    if not small:
        print(write_csv("patching_sweep", results))


if __name__ == "__main__":
    main()
