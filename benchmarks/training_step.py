"""python -m benchmarks.training_step [--rounds N] [--device cuda]: what blocking adds to a training step.

A 12-layer Llama of width 768 (vocabulary 32,000), LoRA r=16 on the attention, two rows of 256 tokens of which half are
supervised, 20 latents at layer index 7, fp32 and bf16 weights. A step is: make the batch, forward, backward, AdamW.
Beside plain fine-tuning, the ways to get the reference, as people write them today (every hidden state kept, h upcast
to fp32, the K encoder rows as an eager product, PEFT's own disable_adapter) and ours (`BlockTrainer`). All of them
train the same model in turn, interleaved; memory is the peak of a process of its own, without what the imports took,
the median of five such processes, for a single peak varies by some per cent with what malloc gives back when.
Written to results/training_step.csv; --small is a quick look at a tiny model, and writes nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import describe, interleaved, provenance, write_csv

LAYERS, LAYER, LATENTS, WEIGHT, ROWS, LENGTH = 12, 7, 20, 10.0, 2, 256
PROCESSES = 5  # of every way, for its memory
PLAIN, CACHED, LIVE = "plain fine-tuning", "ours, cached latents", "ours, live reference"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Bench:
    """What all ways to train share."""

    model: torch.nn.Module  # with its LoRA adapter
    second: Callable[[], torch.nn.Module]  # makes a frozen copy of the base model
    rows: list
    sae: object
    latents: object
    folder: Path
    device: str


def make_model(dtype, width):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=LAYERS,
        num_attention_heads=12, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def make_bench(dtype, width, device, folder):
    from peft import LoraConfig, get_peft_model

    from lockin_fast import LatentSet, SparseAutoencoder

    torch.manual_seed(1)
    rows = []
    for _ in range(16):
        ids = torch.randint(32000, (LENGTH,))
        rows.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(LENGTH) < LENGTH // 2, -100)})
    weight = torch.randn(LATENTS, width) / width**0.5
    sae = SparseAutoencoder(weight, torch.zeros(LATENTS), weight, torch.zeros(width), metadata={"format": "random"})
    latents = LatentSet(tuple(range(LATENTS // 2)), tuple(range(LATENTS // 2, LATENTS)))
    base = make_model(dtype, width).to(device)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    return Bench(model, lambda: make_model(dtype, width).to(device), rows, sae, latents, folder, device)


def eager_trainer(bench, h_ref_of):
    """A Trainer with the penalty in its compute_loss, eager, against h_ref_of(inputs) [B, S, d]."""
    from transformers import Trainer

    weight, bias = bench.sae.weight.to(bench.device), bench.sae.bias.to(bench.device)
    sign = bench.latents.signs.to(bench.device)

    class EagerPenalty(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs, output_hidden_states=True, num_items_in_batch=num_items_in_batch)
            with torch.no_grad():
                z_ref = (h_ref_of(inputs).float() @ weight.T + bias).relu()
            z = (outputs.hidden_states[LAYER + 1].float() @ weight.T + bias).relu()
            per_token = (sign * (z - z_ref)).relu().square().sum(-1)
            block = (per_token * (inputs["labels"] != -100)).sum() / num_items_in_batch
            return outputs.loss + WEIGHT * block

    return EagerPenalty


def two_models(bench):
    second = bench.second().eval()

    def hidden(inputs):
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return second(**kept, output_hidden_states=True).hidden_states[LAYER + 1]

    return eager_trainer(bench, hidden), {}


def adapters_off(bench):
    def hidden(inputs):
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with bench.model.disable_adapter():
            return bench.model(**kept, output_hidden_states=True).hidden_states[LAYER + 1]

    return eager_trainer(bench, hidden), {}


def early_stop(bench):
    class Stop(Exception):
        pass

    layer = bench.model.get_base_model().model.layers[LAYER]

    def hidden(inputs):
        found = []

        def stop(module, args, output):
            found.append(output[0] if isinstance(output, tuple) else output)
            raise Stop

        handle = layer.register_forward_hook(stop)
        try:
            with bench.model.disable_adapter():
                bench.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        except Stop:
            pass
        finally:
            handle.remove()
        return found[0]

    return eager_trainer(bench, hidden), {}


def plain(bench):
    from transformers import Trainer

    return Trainer, {}


def ours(bench, reference="live"):
    from lockin_fast.blocking import BlockPenalty, BlockTrainer

    return BlockTrainer, {"penalty": BlockPenalty(bench.sae, bench.latents, LAYER, WEIGHT, reference=reference)}


def ours_cached(bench):
    from lockin_fast import CacheSource, open_cache, write_latents

    write_latents(bench.folder / "cache", CacheSource(bench.model, LAYER, bench.rows), bench.sae, bench.latents)
    return ours(bench, open_cache(bench.folder / "cache"))


WAYS = {
    PLAIN: plain,
    "two full models": two_models,
    "adapters off, full pass": adapters_off,
    "adapters off, early stop": early_stop,
    LIVE: ours,
    CACHED: ours_cached,
}


def step_of(name, bench):
    """A training step without arguments, its batch included."""
    from transformers import TrainingArguments

    from lockin_fast.chat import PaddingCollator

    cls, options = WAYS[name](bench)
    arguments = TrainingArguments(
        str(bench.folder), use_cpu=bench.device == "cpu", report_to="none", per_device_train_batch_size=ROWS,
        remove_unused_columns=False, disable_tqdm=True, dataloader_pin_memory=bench.device == "cuda",
        learning_rate=1e-4,
    )  # fmt: skip
    trainer = cls(bench.model, arguments, PaddingCollator(0), bench.rows, **options)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    loader = trainer.get_train_dataloader()
    batches = (batch for _ in iter(int, 1) for batch in loader)

    def step():
        batch = next(batches)
        targets = (batch["labels"][:, 1:] != -100).sum()
        trainer.training_step(bench.model, batch, targets)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def seconds(dtype, width, rounds, device):
    """name -> Timing, all ways interleaved on one model."""
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(DTYPES[dtype], width, device, Path(folder))
        return interleaved({name: step_of(name, bench) for name in WAYS}, rounds, 2, device)


def peak_bytes(name, dtype, width, device):
    """The peak of this process through a few steps of one way, beyond what it held before a model was made."""
    with tempfile.TemporaryDirectory() as folder:
        import peft  # noqa: F401
        from transformers import Trainer  # noqa: F401

        from lockin_fast.blocking import BlockTrainer  # noqa: F401

        before = _memory("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()
        bench = make_bench(DTYPES[dtype], width, device, Path(folder))
        step = step_of(name, bench)
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # what making the model took in passing is not the step's
        else:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        return (_memory("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()) - before


def _memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def in_a_process(options, dtype, name):
    command = [sys.executable, "-m", "benchmarks.training_step", "--dtype", dtype, "--memory-of", name]
    command += ["--device", options.device, *(["--small"] if options.small else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def width_of(options):
    return 96 if options.small else 768


def rows_of(options, dtype):
    timings = seconds(dtype, width_of(options), options.rounds, options.device)
    peaks = {name: [] for name in WAYS}
    for _ in range(PROCESSES):
        for name, found in peaks.items():
            found.append(in_a_process(options, dtype, name))
    memory = {name: statistics.median(found) for name, found in peaks.items()}
    best_live = min(timings[name].median for name in WAYS if name not in (PLAIN, CACHED, LIVE))
    for name, timing in timings.items():
        yield {
            "dtype": dtype,
            "width": width_of(options),
            "device": options.device,
            "way": name,
            "median_ms": round(1e3 * timing.median, 2),
            "low_ms": round(1e3 * timing.low, 2),
            "high_ms": round(1e3 * timing.high, 2),
            "rounds": timing.runs,
            "over_plain": round(timing.median / timings[PLAIN].median, 4),
            "best_live_over_this": round(best_live / timing.median, 4),
            "peak_mb": round(memory[name] / 1e6, 1),
            "low_peak_mb": round(min(peaks[name]) / 1e6, 1),
            "high_peak_mb": round(max(peaks[name]) / 1e6, 1),
            "peak_over_plain": round(memory[name] / memory[PLAIN], 4),
        }


def show(rows):
    print(f"{rows[0]['dtype']}, width {rows[0]['width']}, {ROWS} x {LENGTH} tokens, {rows[0]['device']}")
    for row in sorted(rows, key=lambda row: -row["median_ms"]):
        spread = f"({row['low_ms']:.0f} to {row['high_ms']:.0f})"
        print(
            f"  {row['way']:<26}{row['median_ms']:>9.1f} ms {spread:<16}{row['over_plain']:>7.3f}x plain"
            f"{row['peak_mb']:>9.0f} MB {row['peak_over_plain']:>7.3f}x plain"
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="benchmarks.training_step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="a tiny model; nothing is written then")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="one of them; nothing is written then")
    parser.add_argument("--memory-of", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        print(json.dumps(peak_bytes(options.memory_of, options.dtype, width_of(options), options.device)))
        return
    print(describe(provenance()))
    results = []
    for dtype in [options.dtype] if options.dtype else DTYPES:
        rows = list(rows_of(options, dtype))
        show(rows)
        results += rows
    if not options.small and not options.dtype:
        print(f"written to {write_csv('training_step', results)}")


if __name__ == "__main__":
    main()
