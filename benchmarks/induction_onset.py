"""When does induction begin? Over the organism's pre-training, and over that of a model which has to learn it.

    python -m benchmarks.induction_onset OUT [--small]

OUT/organism is the model organism, pre-trained as ever with its checkpoints kept; its world needs no induction. The
control, OUT/control, is a Llama of two layers trained on random tokens that come again and again after a distance drawn
for every sequence, so that nothing but induction helps. Both go through the same `run_circuits`; figures
are in the run folders, and results/induction_onset.csv holds a row for every checkpoint: the highest prefix-matching
score, what the first copy adds to the log-probability of the second, and for the last one what the induction heads
recover.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.utils import logging

from benchmarks.measure import write_csv
from lockin_fast.circuit_settings import CircuitSettings
from lockin_fast.config import Config
from lockin_fast.organism import build, grow_checkpoints
from lockin_fast.patching.circuits import run_circuits
from lockin_fast.report.circuits import draw_circuits, onset, read_circuits, verdict
from lockin_fast.rundir import atomic_folder
from lockin_fast.threads import single_thread

VOCABULARY, LENGTH, BATCH, STEPS, LONGEST, RATE = 64, 64, 48, 500, 30, 3e-3


def grow_control(folder, *, steps=STEPS, every=25):
    """Train the control and keep it every so many steps, as folder/step-000025 and so on, with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    core = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, bos_token_id=0, eos_token_id=None, initializer_range=0.06,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps + 1):
        path = folder / f"step-{step:06d}"
        if step % every == 0 and not path.exists():
            with atomic_folder(path) as new:
                model.save_pretrained(new)
                tokenizer.save_pretrained(new)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50)
        tokens = repeating()
        logits = model(tokens).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def repeating():
    """[BATCH, LENGTH]: a start, then different random words again and again; how many is drawn for every row."""
    words = torch.rand(BATCH, VOCABULARY - 1).argsort(1) + 1
    distance = torch.randint(4, LONGEST, (BATCH, 1))
    said = words.gather(1, torch.arange(LENGTH - 1)[None] % distance)
    return torch.cat([torch.zeros(BATCH, 1, dtype=torch.int64), said], 1)


def look(name, model, checkpoints, folder, length):
    """Rows of one training, its figures drawn and what was found printed."""
    settings = CircuitSettings(length=length, checkpoints=checkpoints)
    file = run_circuits(Config(model=model, output=folder, circuits=settings))
    found = read_circuits(folder)
    draw_circuits(found, folder / "figures")
    print(f" {name}: {verdict(found)} {onset(found)}\n   {file}")
    (half,) = (row for row in found["thresholds"] if row["threshold"] == 0.5)
    rows = [
        {
            "model": name, "step": row["step"], "highest": max(map(max, row["prefix"])), "gain_nats": row["gain"],
            "heads_of_0.5": "", "recovery": "", "random_mean": "", "random_low": "", "random_high": "",
        }
        for row in found["onset"]
    ]  # fmt: skip
    beside = {f"random_{key}": (half["random"] or {}).get(key, "") for key in ("mean", "low", "high")}
    rows[-1] |= {"heads_of_0.5": json.dumps(half["heads"]), "recovery": half["recovery"], **beside}
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="the control alone, few checkpoints, nothing written")
    asked = parser.parse_args()
    logging.disable_progress_bar()  # of writing checkpoints
    every = 100 if asked.small else 25
    control = asked.out / "control"
    with single_thread():
        grow_control(control / "checkpoints", every=every)
    last = control / "checkpoints" / f"step-{STEPS:06d}"
    rows = look("control", last, control / "checkpoints", control / "run", 24)
    if not asked.small:
        organism = build(asked.out / "organism")
        grow_checkpoints(organism / "checkpoints", every=25)
        rows += look("organism", organism / "model", organism / "checkpoints", asked.out / "organism-run", 50)
        print(f" written to {write_csv('induction_onset', rows)}")


if __name__ == "__main__":
    main()
