"""Stage 1 of a discovery at full width: the shift of every latent, against encoding everything through sae-lens.

    python -m benchmarks.stage1 [--small] [--rounds 3] [--dtype bfloat16 float32]

A random Llama of 4 layers, 2,048 wide, and the same with low-rank changes read 44 ragged prompts once; every provider
then gets the same hidden states, in the model's dtype, and the same SAE of 65,536 latents in fp32, and returns mean
over prompts, standard error and firing rates of every latent. sae-lens runs as users write it (batches of prompts as
they come, padded, all tokens encoded), one prompt after the other, and on the real tokens of a batch alone. Reported:
seconds (median and quartiles, providers interleaved), their ratio to ours, memory beyond what was there, and how far
the shift is from that in fp64, in standard errors over prompts.
"""

import argparse
from functools import partial

import torch

from benchmarks import peers
from benchmarks.measure import describe, interleaved, peak_memory, provenance, write_csv
from lockin_fast.blocking.reference import Reference
from lockin_fast.discovery.shift_sums import ShiftSums
from lockin_fast.ops.segment_stats import segment_stats

PROMPTS, BATCH, SHORTEST, LONGEST = 44, 16, 16, 112
FULL, SMALL = {"width": 2048, "latents": 65536}, {"width": 128, "latents": 1024}
LAYERS, ACTIVE = 4, 2.0  # the bias leaves a latent active beyond so many standard deviations: 2.3% of the time
MOVED = 0.02  # entries of a change, times sqrt(d): some percent of those of the matrices
EXACT_LATENTS = 1024  # at a time, in fp64
TARGET = 4.0


def random_model(width, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": LAYERS}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_attention_heads=width // 64, **sizes)).to(dtype).eval()


def fine_tune(model):
    """Add to every matrix of the layers a random one of rank 16 that moves the residual stream by some percent."""
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            a, b = torch.randn(16, parameter.shape[1]), torch.randn(parameter.shape[0], 16)
            parameter += (MOVED / (16 * parameter.shape[1]) ** 0.5 * (b @ a)).to(parameter.dtype)


@torch.no_grad()
def activations(width, dtype):
    """[(h [B, S, d], h_base, lengths)] of the last layer, batch by batch, padded on the right."""
    model = random_model(width, dtype)
    stream = Reference(model, LAYERS - 1, adapters=False)
    lengths = torch.linspace(LONGEST, SHORTEST, PROMPTS).long()[torch.randperm(PROMPTS)].tolist()  # as they come
    of_batches = [lengths[start : start + BATCH] for start in range(0, PROMPTS, BATCH)]
    arguments = []
    for of_batch in of_batches:
        real = torch.arange(max(of_batch)) < torch.tensor(of_batch)[:, None]
        arguments.append({"input_ids": torch.randint(1024, real.shape), "attention_mask": real.long()})
    base = [stream.hidden_state((), given) for given in arguments]
    fine_tune(model)
    tuned = [stream.hidden_state((), given) for given in arguments]
    return list(zip(tuned, base, of_batches, strict=True))


def real_tokens(h, lengths):
    return torch.cat([row[:length] for row, length in zip(h, lengths, strict=True)])


def random_rows(batches, latents):
    """Encoder rows of unit length, and the bias that leaves each active for some of the tokens."""
    h = torch.cat([real_tokens(h, lengths) for _, h, lengths in batches]).float()
    weight = torch.nn.functional.normalize(torch.randn(latents, h.shape[1]), dim=1)
    return weight, torch.full((latents,), -ACTIVE * h.std().item())


def ours(batches, weight, bias):
    sums = ShiftSums.zeros(len(bias))
    for h, h_ref, lengths in batches:
        streams = (real_tokens(h, lengths), real_tokens(h_ref, lengths))
        sums += ShiftSums.of(segment_stats(streams[0], weight, bias, lengths, h_ref=streams[1]), lengths)
    found = sums.statistics()
    return found.shift, found.error, found.rate_base, found.rate_tuned


class Dense:
    """What a user keeps of latents that are all there: sums of prompts' means, and counts."""

    def __init__(self, latents):
        self.means, self.squares = (torch.zeros(latents, dtype=torch.float64) for _ in range(2))
        self.active, self.active_base = (torch.zeros(latents, dtype=torch.int64) for _ in range(2))
        self.prompts = self.tokens = 0

    def add(self, means, z, z_base, tokens):
        """means [B, F] of the prompts; z, z_base [..., F] of their tokens, zero where there is none."""
        means = means.double()
        self.means += means.sum(0)
        self.squares += means.square().sum(0)
        self.active += (z > 0).flatten(0, -2).sum(0)
        self.active_base += (z_base > 0).flatten(0, -2).sum(0)
        self.prompts += len(means)
        self.tokens += tokens

    def result(self):
        mean = self.means / self.prompts
        error = ((self.squares / self.prompts - mean.square()) / (self.prompts - 1)).clamp_min(0).sqrt()
        return mean, error, self.active_base.double() / self.tokens, self.active.double() / self.tokens


def padded(encode, latents, batches):
    """All tokens of a padded batch are encoded, and padding taken out by a mask."""
    sums = Dense(latents)
    for h, h_ref, lengths in batches:
        real = (torch.arange(h.shape[1]) < torch.tensor(lengths)[:, None])[..., None]
        z, z_base = (encode(x.float()) * real for x in (h, h_ref))
        sums.add((z - z_base).sum(1) / torch.tensor(lengths)[:, None], z, z_base, sum(lengths))
    return sums.result()


def one_by_one(encode, latents, batches):
    sums = Dense(latents)
    for h, h_ref, lengths in batches:
        for row, row_ref, length in zip(h, h_ref, lengths, strict=True):
            z, z_base = (encode(x[:length].float()) for x in (row, row_ref))
            sums.add((z - z_base).mean(0)[None], z, z_base, length)
    return sums.result()


def packed(encode, latents, batches):
    """The real tokens of a batch, and no others."""
    sums = Dense(latents)
    for h, h_ref, lengths in batches:
        z, z_base = (encode(real_tokens(x, lengths).float()) for x in (h, h_ref))
        means = torch.stack([part.mean(0) for part in (z - z_base).split(lengths)])
        sums.add(means, z, z_base, sum(lengths))
    return sums.result()


def exact(batches, weight, bias):
    """The shift and its error in fp64, some latents at a time."""
    found = []
    for w, b in zip(weight.split(EXACT_LATENTS), bias.split(EXACT_LATENTS), strict=True):
        w, b = w.double(), b.double()
        found.append(packed(lambda x, w=w, b=b: torch.relu(x.double() @ w.t() + b), len(b), batches)[:2])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def providers(batches, weight, bias):
    """sae-lens in every way where it is installed, else plain torch; plain torch at its best in any case."""
    relu = torch.no_grad()(lambda x: torch.relu(torch.nn.functional.linear(x, weight, bias)))
    name, encode = "sae-lens", peers.sae_encoders(weight, bias).get("sae-lens")
    if encode is None:
        name, encode = "torch fp32", relu
    steps = {
        f"{name}, padded batches": partial(padded, encode, len(bias), batches),
        f"{name}, one prompt after the other": partial(one_by_one, encode, len(bias), batches),
        f"{name}, real tokens of a batch": partial(packed, encode, len(bias), batches),
        "torch fp32, real tokens of a batch": partial(packed, relu, len(bias), batches),
    }
    return steps | {"segment_stats": partial(ours, batches, weight, bias)}


def measure(dtype, size, rounds):
    torch.manual_seed(0)
    width, latents = size["width"], size["latents"]
    batches = activations(width, dtype)
    weight, bias = random_rows(batches, latents)
    steps = providers(batches, weight, bias)
    shift, error = exact(batches, weight, bias)
    found, memory = {}, {}
    for name, step in steps.items():  # which warms up, too
        memory[name] = peak_memory(lambda name=name, step=step: found.update({name: step()[0]}))
    timings = interleaved(steps, rounds, 0)
    baselines = {name: timing.median for name, timing in timings.items() if name != "segment_stats"}
    rows = []
    for name, timing in timings.items():
        apart = ((found[name] - shift).abs() / error)[error > 0]
        rows.append(
            {
                "dtype": str(dtype)[6:],
                "provider": name,
                "shape": f"prompts={PROMPTS} tokens={sum(sum(n) for *_, n in batches)} d={width} F={latents}",
                "seconds": timing.median,
                "low": timing.low,
                "high": timing.high,
                "rounds": timing.runs,
                "extra_mb": memory[name] / 1e6,
                "ratio_to_ours": timing.median / timings["segment_stats"].median,
                "error_median": apart.median().item(),
                "error_999": apart.quantile(0.999).item(),
                "error_max": apart.max().item(),
                "latents_moved": len(apart),
            }
        )
    best = min(baselines, key=baselines.get)
    rows.sort(key=lambda row: -row["seconds"])
    for row in rows:
        apart = f"{row['error_median']:.1e} / {row['error_999']:.1e} / {row['error_max']:.1e} standard errors"
        print(
            f"  {row['provider']:<40}{row['seconds']:>8.3f} s ({row['low']:.3f}-{row['high']:.3f})"
            f"{row['ratio_to_ours']:>7.2f}x{row['extra_mb']:>9.1f} MB   {apart}"
        )
    print(f"  best baseline: {best}; target {TARGET:g}x against sae-lens; errors: median / 99.9% / largest")
    return rows


def main(arguments=None):
    made = argparse.ArgumentParser(prog="benchmarks.stage1", description=__doc__)
    made.add_argument("--small", action="store_true", help="a small model and SAE: does it run?")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    options = made.parse_args(arguments)
    print(describe(provenance()))
    rows = []
    for dtype in options.dtype:
        print(f" hidden states in {dtype}")
        rows += measure(getattr(torch, dtype), SMALL if options.small else FULL, options.rounds)
    if not options.small:
        print(f" written to {write_csv('stage1', rows)}")


if __name__ == "__main__":
    main()
