"""python -m benchmarks.nf4_error: what storing hidden states in few bits costs in error, per element and per latent.

On the residual stream of the model organism (grown first where no cache holds it, three minutes), and on synthetic
normal rows of which two channels are 60 times larger, with unit encoder rows of random direction. Every method stores
the rows and gives them back in fp32:

- element: relative root mean square error of all channels, and of those that are not outliers;
- latent: the standard deviation of the error of a latent's pre-activation over that of the pre-activation itself,
  median and 95th percentile over the SAE's latents (those that vary).
"""

import json
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import write_csv
from lockin_fast import load_sae, outlier_channels, quantize_nf4

BLOCKS, OUTLIERS = (32, 64, 128), (0, 1, 2, 4, 8)
LOUD = 2


def methods(sample):
    """name -> (h -> rows as they come back in fp32, bytes a token); outlier channels are picked from `sample`."""
    width = sample.shape[1]

    def nf4(h, block, count):
        packed = quantize_nf4(h, blocksize=block, outliers=outlier_channels(sample, count))
        return packed.dequantize(torch.float32)

    for block in BLOCKS:
        for count in OUTLIERS:
            size = width / 2 + 4 * width / block + 2 * count
            yield f"NF4, block {block}, {count} outliers", lambda h, b=block, n=count: nf4(h, b, n), size
    yield "int8, a scale a row", int8, width + 4
    yield "fp8 e4m3, a scale a row", fp8, width + 4
    yield "bf16", lambda h: h.float(), 2 * width


def int8(h):
    scale = h.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (h.float() / scale).round() * scale


def fp8(h):
    scale = h.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / 448
    return (h.float() / scale).to(torch.float8_e4m3fn).float() * scale


@torch.no_grad()
def organism():
    """Hidden states [T, d] in fp32 behind the SAE's layer, and its encoder rows [K, d]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lockin_fast.organism import build

    with tempfile.TemporaryDirectory() as folder:
        home = build(Path(folder) / "organism")
        model = AutoModelForCausalLM.from_pretrained(home / "model").eval()
        tokenizer = AutoTokenizer.from_pretrained(home / "model")
        sae = load_sae(home / "sae")
        layer = json.loads((home / "sae" / "cfg.json").read_text())["metadata"]["hook_layer"]
        chats = [json.loads(line)["messages"] for line in (home / "data" / "train.jsonl").read_text().splitlines()]
        found = []
        model.model.layers[layer].register_forward_hook(
            lambda module, inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
        for chat in chats:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            model(**tokenizer(text, return_tensors="pt", add_special_tokens=False))
        hidden = torch.cat([h.reshape(-1, h.shape[-1]) for h in found])
    return hidden.float(), sae.weight.float()


def synthetic(tokens=2048, width=4096, latents=1024):
    make = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, width, generator=make)
    h[:, torch.randperm(width, generator=make)[:LOUD]] *= 60
    weight = torch.randn(latents, width, generator=make)
    return h, weight / weight.norm(dim=1, keepdim=True)


def relative(error, truth):
    return (error.norm() / truth.norm()).item()


def rows(data, h, weight):
    sample = h[::4].bfloat16()
    quiet = torch.ones(h.shape[1], dtype=torch.bool)
    quiet[outlier_channels(sample, max(OUTLIERS)).long()] = False
    spread = (h @ weight.t()).std(0)
    live = spread > 1e-3 * spread.max()
    for name, store, size in methods(sample):
        error = store(h.bfloat16()) - h
        latent = ((error @ weight.t()).std(0) / spread)[live]
        yield {
            "data": data,
            "tokens": h.shape[0],
            "width": h.shape[1],
            "method": name,
            "bytes_per_token": size,
            "bits_per_element": round(8 * size / h.shape[1], 3),
            "element_error": float(f"{relative(error, h):.4g}"),
            "element_error_quiet": float(f"{relative(error[:, quiet], h[:, quiet]):.4g}"),
            "latent_error_median": float(f"{latent.median():.4g}"),
            "latent_error_p95": float(f"{latent.quantile(0.95):.4g}"),
        }


def main():
    results = []
    for data, make in (("organism", organism), (f"normal, {LOUD} channels 60x", synthetic)):
        found = list(rows(data, *make()))
        print(f"{data}: {found[0]['tokens']} tokens of {found[0]['width']}")
        print(f"  {'method':<28}{'bytes':>8}{'bits':>7}{'element':>10}{'quiet':>10}{'latent':>10}{'p95':>10}")
        for row in found:
            figures = (f"{row[key]:>10.3%}" for key in row if "error" in key)
            print(f"  {row['method']:<28}{row['bytes_per_token']:>8g}{row['bits_per_element']:>7.2f}", *figures, sep="")
        results += found
    print(f"written to {write_csv('nf4_error', results)}")


if __name__ == "__main__":
    main()
