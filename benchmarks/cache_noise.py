"""python -m benchmarks.cache_noise: what a cached reference costs in noise, and up to which lambda it serves.

The spurious loss lambda * sum_k p_k sigma_k^2 / 2 of 20 latents, per penalised token, and the lambda at which it
reaches the limit of 0.01, on hidden states of the model organism (grown first where no cache holds it, three minutes),
its weights in fp32 and in bf16: as they are, and with two channels 60 times larger, as large models have them, which
its SAE reads as if they were not. The 20 latents are those with the largest mean. Ways to store the reference: latents
in fp32, of a pool of 20, 250 or all, where only another batching's rounding is noise; hidden states in bf16; hidden
states in NF4, with 0 to 16 outlier channels kept aside. Written to results/cache_noise.csv.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import describe, provenance, write_csv
from lockin_fast import load_sae, outlier_channels, quantize_nf4
from lockin_fast.cache.noise import MAX_SPURIOUS_LOSS, NoiseFloor

LATENTS, LAMBDA, LOUD = 20, 13e3, 2
OUTLIERS = (0, 2, 4, 8, 16)


def organism():
    """(model in fp32 and in bf16 by name, rows, layer, sae)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lockin_fast.chat import ChatDataset
    from lockin_fast.organism import build

    with tempfile.TemporaryDirectory() as folder:
        home = build(Path(folder) / "organism")
        tokenizer = AutoTokenizer.from_pretrained(home / "model")
        models = {
            name: AutoModelForCausalLM.from_pretrained(home / "model", dtype=dtype).eval()
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
        rows = ChatDataset(home / "data" / "train.jsonl", tokenizer)
        layer = json.loads((home / "sae" / "cfg.json").read_text())["metadata"]["hook_layer"]
        return models, rows, layer, load_sae(home / "sae")


def two_batchings(model, rows, layer):
    """The same tokens' hidden states [n, d], each row alone and padded together with others."""
    from lockin_fast import CacheSource
    from lockin_fast.cache.plan import make_plan
    from lockin_fast.cache.write import WriteSettings, sampled

    source = CacheSource(model, layer, rows)
    return sampled(make_plan(rows, "supervised", 2**16), source.hidden_state(), WriteSettings())


def with_outliers(alone, batched, sae):
    """The same with two channels 60 times larger, and an SAE that reads them 60 times weaker: its latents stay."""
    channels = outlier_channels(alone, LOUD).long()
    factor = torch.ones(alone.shape[1]).index_fill(0, channels, 60.0)
    return alone * factor.to(alone.dtype), batched * factor.to(batched.dtype), replace(sae, weight=sae.weight / factor)


def ways(alone, batched, pool, sae):
    """(way, bytes a token, exact latents, stored latents), of the first LATENTS of the pool."""

    def z(h):
        return sae.rows(pool[:LATENTS]).to(dtype=h.dtype).encode_latents(h)

    exact, width = z(alone), alone.shape[1]
    for size in (LATENTS, 250, len(pool)):
        yield f"latents in fp32, pool of {size}", 4 * size, exact, z(batched)
    yield "hidden states in bf16", 2 * width, exact, z(batched.bfloat16().to(alone.dtype))
    for count in OUTLIERS:
        packed = quantize_nf4(batched, outliers=outlier_channels(batched, count))
        size = width / 2 + 4 * width / packed.blocksize + count * alone.element_size()
        yield f"hidden states in NF4, {count} outliers", size, exact, z(packed.dequantize())


def rows_of(data, alone, batched, sae):
    mean = sae.encode_latents(alone).mean(0)
    pool = mean.argsort(descending=True)
    for way, size, exact, stored in ways(alone, batched, pool, sae):
        floor = NoiseFloor(exact, stored)
        plain, margin = floor.spurious_loss(), floor.spurious_loss(floor.margin)
        spread = exact.double().std(0).clamp_min(1e-30)
        yield {
            "data": data,
            "tokens": len(exact),
            "way": way,
            "bytes_per_token": round(size),
            "sigma_median": _short(floor.sigma.median()),
            "sigma_max": _short(floor.sigma.max()),
            "active_share": _short(floor.share.mean()),
            "loss_at_13e3": _short(LAMBDA * plain),
            "refused_at_13e3": int(LAMBDA * plain > MAX_SPURIOUS_LOSS),
            "lambda_up_to": _short(MAX_SPURIOUS_LOSS / plain if plain else float("inf")),
            "loss_at_13e3_with_margin": _short(LAMBDA * margin),
            "margin_over_spread": _short((floor.margin.double() / spread).median()),
        }


def _short(value):
    return float(f"{float(value):.3g}")


def show(rows):
    print(f"{rows[0]['data']}: {rows[0]['tokens']} tokens, {LATENTS} latents")
    heads = f"{'bytes':>7}{'sigma':>10}{'loss at 13e3':>14}{'lambda up to':>14}{'with margin':>13}{'margin':>8}"
    print(f"  {'way':<36}{heads}")
    for row in rows:
        refused = "refused" if row["refused_at_13e3"] else ""
        print(
            f"  {row['way']:<36}{row['bytes_per_token']:>7}{row['sigma_median']:>10.2g}{row['loss_at_13e3']:>14.2g}"
            f"{row['lambda_up_to']:>14.2g}{row['loss_at_13e3_with_margin']:>13.2g}{row['margin_over_spread']:>8.2g}"
            f"  {refused}"
        )


@torch.no_grad()
def main():
    print(describe(provenance()))
    models, rows, layer, sae = organism()
    results = []
    for name, model in models.items():
        alone, batched = two_batchings(model, rows, layer)
        plain = alone, batched, sae
        for data, inputs in ((name, plain), (f"{name}, {LOUD} channels 60x", with_outliers(*plain))):
            found = list(rows_of(f"organism, {data}", *inputs))
            show(found)
            results += found
    print(f"written to {write_csv('cache_noise', results)}")


if __name__ == "__main__":
    main()
