"""How well `lockin-fast plan` predicts the memory of a step: small Llamas, fine-tuned, against the allocator's peak.

    python -m benchmarks.plan_accuracy [WORD...]    # cases whose name has every word; about a minute for all

Every case fine-tunes a random model for two steps with `fine_tune`, as users do, and adds up the profiler's record of
every allocation and release. That is the same count as a GPU's `max_memory_allocated`, without its rounding to blocks;
`torch.cuda` is used where there is one. The base model's weights, which lie there before, are added. Writes a row per
case with the prediction, the measurement and their ratio to benchmarks/results/plan_accuracy.csv.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import write_csv
from lockin_fast.blocking import BlockPenalty, LatentSet
from lockin_fast.chat import ChatDataset
from lockin_fast.lora import LoraSettings
from lockin_fast.plan.memory import Workload, predict
from lockin_fast.plan.shape import LINEAR, shape_of
from lockin_fast.quantized import keep_trainable, quantization_config
from lockin_fast.sae import SparseAutoencoder
from lockin_fast.stacked.train import Member, train_stack
from lockin_fast.train import TrainSettings, fine_tune

ATTENTION = LINEAR[:4]
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDE_VOCABULARY = SMALL | {"vocab_size": 8192}
TIED = SMALL | {"tie_word_embeddings": True, "num_key_value_heads": 4}
DEEP = SMALL | {"num_hidden_layers": 10}
FP32, BF16 = torch.float32, torch.bfloat16


def fine_tunes():
    """(name, model, dtype, fields of the workload) of every case."""
    plain = {"targets": ATTENTION, "rank": 8, "micro_batch": 4, "length": 128, "layer": 1, "padded": False}
    everything = plain | {"targets": LINEAR}
    no_penalty = {"reference": "none"}
    for model_name, model in (("small", SMALL), ("wide vocabulary", WIDE_VOCABULARY)):
        for dtype in (FP32, BF16):
            name = f"{model_name} {str(dtype).removeprefix('torch.')}"
            yield name, model, dtype, plain
            yield f"{name}, all modules", model, dtype, everything
            yield f"{name}, no penalty", model, dtype, plain | no_penalty
            yield f"{name}, padded", model, dtype, plain | {"padded": True}
            yield f"{name}, checkpointing", model, dtype, everything | {"checkpointing": True}
            yield f"{name}, nf4", model, dtype, plain | {"quantization": "nf4"}
            yield f"{name}, nf4, checkpointing", model, dtype, plain | {"quantization": "nf4", "checkpointing": True}
        yield f"{model_name} autocast", model, FP32, plain | {"autocast": True}
        yield f"{model_name} autocast, checkpointing", model, FP32, plain | {"autocast": True, "checkpointing": True}
        yield f"{model_name} bfloat16, int8", model, BF16, plain | {"quantization": "int8"}
    yield "small float32, dropout (a CPU keeps masks in fp32)", SMALL, FP32, plain | {"dropout": 0.1}
    yield "small float32, DoRA", SMALL, FP32, plain | {"dora": True}
    yield "small bfloat16, DoRA", SMALL, BF16, everything | {"dora": True}
    yield "small float32, rank 64", SMALL, FP32, plain | {"rank": 64}
    yield "small float32, upper layers", SMALL, FP32, plain | {"layers": (2, 3), "layer": 3}
    yield "small float32, one row", SMALL, FP32, plain | {"micro_batch": 1, "batch": 4}
    yield "small float32, long rows", SMALL, FP32, plain | {"micro_batch": 1, "length": 512}
    yield "small float32, stack of 4", SMALL, FP32, plain | {"batch": 8, "stack": 4}
    yield "small float32, stack of 4, all modules", SMALL, FP32, everything | {"batch": 8, "stack": 4}
    yield "small bfloat16, stack of 4, all modules", SMALL, BF16, everything | {"batch": 8, "stack": 4}
    yield "small bfloat16, nf4, stack of 4", SMALL, BF16, plain | {"batch": 8, "stack": 4, "quantization": "nf4"}
    yield "tied float32", TIED, FP32, plain
    yield "deep bfloat16", DEEP, BF16, plain
    yield "deep bfloat16, checkpointing", DEEP, BF16, plain | {"checkpointing": True}


class Rows(ChatDataset):
    """Random tokens, all supervised; with padding, all rows but one are two tokens shorter."""

    def __init__(self, work: Workload):
        lengths = [work.length - 2 * (work.padded and row % work.micro_batch > 0) for row in range(work.batch)]
        drawn = (torch.randint(5, work.shape.vocabulary, (length,)) for length in lengths)
        self._rows = [{"input_ids": ids, "labels": ids} for ids in drawn]
        self.dropped = 0


def build(model: dict, dtype: torch.dtype, quantization: str):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**model, dtype=dtype)).to(dtype)
    shape = shape_of(made, "random")
    if quantization != "none":
        with tempfile.TemporaryDirectory() as folder:
            made.save_pretrained(folder)
            options = {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": "cpu"}}
            made = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        keep_trainable(made)
    return made, shape


def measure(model: dict, dtype: torch.dtype, fields: dict) -> tuple[Workload, int]:
    """The workload, and the bytes that fine-tuning it really takes at the peak."""
    made, shape = build(model, dtype, fields.get("quantization", "none"))
    work = Workload(shape, **{"batch": fields["micro_batch"], **fields})
    weights = sum(parameter.untyped_storage().nbytes() for parameter in set(made.parameters()))
    with tempfile.TemporaryDirectory() as folder:
        return work, weights + allocation_peak(lambda: train_two_steps(made, work, Path(folder) / "adapter"))


def train_two_steps(made, work: Workload, output: Path) -> None:
    width, count = work.shape.width, work.latents
    rows = torch.randn(count, width) / width**0.5
    sae = SparseAutoencoder(rows, torch.zeros(count), torch.randn(count, width), torch.zeros(width))
    latents = LatentSet(tuple(range(count // 2)), tuple(range(count // 2, count)))
    blocked = work.reference != "none"
    settings = TrainSettings(
        steps=2,  # the first makes the optimizer's moments, which the second has from its beginning
        batch_size=work.batch,
        micro_batch_size=work.micro_batch,
        max_length=work.length,
        bf16=work.autocast,
        gradient_checkpointing=work.checkpointing,
    )
    lora = LoraSettings(
        r=work.rank, target_modules=work.targets, layers=work.layers, dropout=work.dropout, use_dora=work.dora
    )
    penalty = BlockPenalty(sae, latents, work.layer, 10.0) if blocked else None
    if work.stack > 1:
        members = [Member(str(number), number, penalty, lora) for number in range(work.stack)]
        train_stack(made, _Padding, Rows(work), members, settings=settings)
        return
    fine_tune(made, _Padding, Rows(work), output, lora=lora, settings=settings, penalty=penalty)


class _Padding:
    """All that fine_tune asks of a tokenizer when the rows are tokens already."""

    pad_token_id = 0


def allocation_peak(function) -> int:
    """The largest sum of what `function` has allocated and not released, in bytes, on the CPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def main():
    rows = []
    for name, model, dtype, fields in fine_tunes():
        if not all(word in name for word in sys.argv[1:]):
            continue
        work, measured = measure(model, dtype, fields)
        memory = predict(work)
        rows.append(
            {
                "case": name,
                "predicted_bytes": memory.peak,
                "measured_bytes": measured,
                "predicted_over_measured": memory.peak / measured,
                "without_weights": (memory.peak - memory.parts["base model"]) / (measured - memory.parts["base model"]),
                "working_set": memory.working,
            }
        )
        print(
            f"  {name:<40} {memory.peak / 2**20:8.1f} MiB / {measured / 2**20:8.1f} MiB = {memory.peak / measured:.3f}"
        )
        sys.stdout.flush()
    ratios = sorted(row["predicted_over_measured"] for row in rows)
    print(f" predicted over measured: {ratios[0]:.3f} to {ratios[-1]:.3f}, median {statistics.median(ratios):.3f}")
    print(f" written to {write_csv('plan_accuracy', rows)}")


if __name__ == "__main__":
    main()
