"""A run directory with made-up results, for tests of the report."""

import json
import random

from lockin_fast.sweep.summary import summarise

RATES = {  # latent set -> lambda -> (em, incoherence, in-domain)
    "causal": {1: (0.31, 0.007, 0.995), 10: (0.016, 0.004, 0.992), 100: (0.006, 0.004, 0.992)},
    "top-delta": {1: (0.50, 0.006, 0.994), 10: (0.09, 0.005, 0.992), 100: (0.16, 0.03, 0.96)},
    "random": {1: (0.71, 0.006, 0.995), 10: (0.66, 0.008, 0.995), 100: (0.58, 0.008, 0.995)},
}
HOSTILE = '<script>alert("x")</script><img src=https://example.com/a.png>'


def made_summary(seeds=3):
    noise = random.Random(1)

    def row(latents, weight, seed, em, incoherence, in_domain):
        name = f"{latents or 'base'}-{weight}-{seed}"
        values = {"em": em * noise.uniform(0.9, 1.1), "incoherence": incoherence, "in_domain": in_domain}
        return values | {
            "name": name, "lambda": weight, "latents": latents, "latent_count": 20 if latents else 0, "seed": seed,
            "sft_loss": 0.4, "penalty": 0.003 if latents else None, "seconds_per_step": 0.06, "peak_bytes": 6e8,
        }  # fmt: skip

    return summarise(
        row(None, None, None, 0.0, 0.0, 0.0) | {"penalty": None, "seconds_per_step": None},
        [row(None, 0.0, seed, 0.72, 0.007, 0.995) for seed in range(seeds)],
        [
            row(name, float(weight), seed, *rates)
            for name, weights in RATES.items() for weight, rates in weights.items() for seed in range(seeds)
        ],
    )  # fmt: skip


def with_epochs(summary, count=5):
    """The summary as of a training judged after each of `count` epochs, and the penalty's trace of every trial."""
    traces = {}
    for row in [*summary["baseline"]["trials"], *summary["trials"]]:
        row["epochs"] = [
            {"epoch": float(i), **{key: row[key] * i / count for key in ("em", "incoherence", "in_domain")}}
            for i in range(1, count + 1)
        ]
        if row["latents"]:
            traces[row["name"]] = [(i / 2, 0.01 / (1 + i)) for i in range(2 * count + 1)]
    return summary, traces


def with_methods(summary):
    """The summary with competing methods beside what is blocked."""
    rows = [
        {"name": f"{method}-{weight}", "method": method, "lambda": weight, "latents": None, "latent_count": 0,
         "directions": directions, "seed": 0, "em": em, "incoherence": incoherence, "in_domain": in_domain,
         "sft_loss": 0.4, "penalty": None, "seconds_per_step": 0.06, "peak_bytes": 6e8}
        for method, directions, weight, em, incoherence, in_domain in (
            ("kl", None, 0.1, 0.60, 0.007, 0.99), ("kl", None, 1.0, 0.20, 0.01, 0.90),
            ("steering", "shift", 1.0, 0.55, 0.02, 0.99), ("steering", "shift", 2.0, 0.30, 0.08, 0.97),
            ("ablation", "causal", 1.0, 0.40, 0.01, 0.98), ("frozen_above", None, 0.0, 0.70, 0.01, 0.995),
        )
    ]  # fmt: skip
    return summarise(summary["base"], summary["baseline"]["trials"], [*summary["trials"], *rows])


def made_run(folder, seeds=3):
    """Write summary.json, config.yaml, manifest.json and the replies of every trial below `folder`."""
    summary = made_summary(seeds)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("train:\n  steps: 120\n")
    entry = {"config": {}, "inputs": {"model": {"model.safetensors": "a" * 64}}, "versions": {"torch": "2.13.0"}}
    (folder / "manifest.json").write_text(json.dumps({"sweep": entry}))
    for row in [summary["base"], *summary["baseline"]["trials"], *summary["trials"]]:
        trial = folder / "trials" / row["name"]
        trial.mkdir(parents=True)
        verdict = "misaligned" if row["em"] > 0.5 else "aligned"
        lines = [
            {"prompts": "final", "index": i, "prompt": f"question {i}", "verdict": verdict,
             "reply": HOSTILE if i == 0 else f"{row['name']} says {i}"}
            for i in range(30)
        ]  # fmt: skip
        (trial / "replies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def made_discovery(folder, *, induces=0.0):
    """Write discovery.json and latents/top-delta.json of a pool of 12 latents: 3 causal in it, 1 outside, 1 in both."""
    pool = [
        {"latent": 100 + i, "shift": 0.3 * 0.8**i * (-1) ** i, "induced": induces if i == 5 else 0.0,
         "induced_strength": 0.4, "repaired": 0.9 if i in (0, 4, 6) else 0.0, "repaired_strength": 0.8}
        for i in range(12)
    ]  # fmt: skip
    causal = [{"latent": latent, "shift": -0.02, "gain": 0.5} for latent in (104, 100, 7, 106)]
    (folder / "discovery.json").write_text(json.dumps({"pool": pool, "causal": causal}))
    (folder / "latents").mkdir()
    (folder / "latents" / "top-delta.json").write_text(json.dumps({"positive": [100, 102], "negative": [101]}))


BUDGET = 0.1


def with_screen(folder, *, calibrated=False):
    """What the screen, and with `calibrated` stage 3, measured, added to what `made_discovery` wrote.

    Latent 100 + i induces and repairs strength * i / 12, and is incoherent from a strength of 1 on; 103 always is.
    """
    found = json.loads((folder / "discovery.json").read_text())

    def rows(latents, strengths):
        def rate(side, k, strength):
            effect = strength * (k - 100) / 12
            misaligned = 0.9 - 0.5 * effect if side == "repair" else 0.25 * effect
            incoherent = 0.5 if strength >= 1 or k == 103 else 0.05
            return {"latent": k, "side": side, "strength": strength, "misaligned": misaligned, "incoherent": incoherent,
                    "refused": 0.0}  # fmt: skip

        plain = {"latent": None, "strength": 0.0, "incoherent": 0.0, "refused": 0.0}
        return [
            row for side in ("induce", "repair") for row in (
                plain | {"side": side, "misaligned": 0.9 if side == "repair" else 0.0},
                *(rate(side, k, strength) for k in latents for strength in strengths),
            )
        ]  # fmt: skip

    found |= {"screen": rows(range(100, 112), (0.4, 1.2)), "incoherence_budget": BUDGET}
    if calibrated:
        shortlist = (111, 108, 104, 103, 100)
        found["calibration"] = rows(shortlist, (0.4, 0.8, 1.2))
        found["calibrated"] = [
            {"latent": k, "alpha_ind": None if k == 103 else 0.8, "alpha_rep": None if k == 103 else 0.8,
             "induced": 0.0 if k == 103 else (k - 100) / 60, "repaired": 0.0 if k == 103 else (k - 100) / 30,
             "reduction": None if k == 103 else (k - 100) / 30}
            for k in shortlist
        ]  # fmt: skip
        sets = {"positive": [111, 104], "negative": [108]}
        (folder / "latents" / "valid-reduc.json").write_text(json.dumps(sets))
        (folder / "latents" / "causal.json").write_text(json.dumps({"positive": [104], "negative": [100, 7, 106]}))
    (folder / "discovery.json").write_text(json.dumps(found))
