"""How much memory a fine-tuning step takes at its peak, from the tensors that autograd keeps in a Llama-like model.

With N = rows x length tokens of one forward, d the width, Q = heads x head size, V = key heads x head size, F the
MLP's width, h heads, a = bytes of an activation (4 in fp32, 2 in bf16, under autocast, and on a quantised bf16 model),
a decoder layer whose weights are frozen keeps, per token,

    norms        4 d + 4 for each RMSNorm: its input in fp32, and the inverse root mean square
    attention    a (2 Q + 2 V) + 4 h: queries and keys after the rotation, values, output, log-sum-exp; a batch with
                 padding repeats keys and values for every head (V -> Q) and keeps a mask, a x length
    MLP          3 F a: gate, silu(gate), up
    LoRA         r l for each adapted module (l = 4, under autocast 2), and its input: once for modules that share it
                 where the types agree (fp32: d before attention, d before the MLP, F before down_proj) and in a
                 stack, whose products cast nothing to keep; else a copy for each, as PEFT casts it (4 bytes where
                 adapters are fp32 in a bf16 model, 2 under autocast); dropout adds a copy and a mask of one byte an
                 element; DoRA both products, (a + l) an output
    int8         the input of every linear layer, which bitsandbytes keeps: a (2 d + F)
    autocast     over fp32 weights: every frozen linear weight once more in bf16, which the gradient of its input needs

With activation checkpointing a layer keeps its input alone (d residual bytes), and one layer's share at a time is there
in the backward. Layers below the first adapted one keep nothing. On top of what is kept comes the largest of three
working sets: the loss's (12 bytes a token and vocabulary entry: the log-probabilities in fp32 and two gradients), one
decoder layer's in the backward, and the reference's forward while the log-probabilities (4 bytes) wait.

AdamW in fp32: 16 bytes a trained parameter (weight, gradient, two moments), kept throughout. NF4 with nested
statistics: 0.5 + 1/64 + 4/(64 x 256) bytes an element of the decoder layers' linear weights; int8: 1, and 4 a row.

Measured by benchmarks/plan_accuracy.py, on small models on a CPU: in every type, adapted modules and reference.
"""

from dataclasses import dataclass

import torch

from lockin_fast.plan.shape import Shape
from lockin_fast.stacked.size import cheap_rows, rows_of_an_adapter
from lockin_fast.train import TrainSettings

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAMW_BYTES = 16
LOSS_BYTES = 12
WAITING_LOSS_BYTES = 4
REFERENCES = ("live", "cache", "second", "none")


@dataclass(frozen=True)
class Workload:
    """What is trained and how. length: tokens of a row after padding; padded: whether rows differ in length.

    stack: adapters trained together; a forward then has about micro_batch rows of them all, at least one of each (see
    `lockin_fast.stacked.size`). reference: where z_ref comes from: "live" (the
    same model, adapters off, up to `layer`), "cache", "second" (a second model), or "none" (no penalty). latents: K.
    layers: those adapted, None for all.
    """

    shape: Shape
    quantization: str = "none"
    autocast: bool = False
    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    dora: bool = False
    batch: int = 64
    micro_batch: int = 64
    length: int = 1024
    padded: bool = True
    checkpointing: bool = False
    reference: str = "live"
    layer: int = 0
    latents: int = 20
    stack: int = 1

    def __post_init__(self):
        if self.reference not in REFERENCES:
            raise ValueError(f"reference: got {self.reference!r}, expected one of {', '.join(REFERENCES)}")
        if self.batch % self.micro_batch:
            raise ValueError(f"micro_batch: got {self.micro_batch}, expected a divisor of the batch, {self.batch}")

    @property
    def dtype(self) -> torch.dtype:
        """Of what is multiplied."""
        return torch.bfloat16 if self.autocast else self.shape.dtype

    @property
    def rows_each(self) -> int:
        """Rows of each adapter in one forward."""
        if self.stack == 1:
            return self.micro_batch
        shape = self.shape
        rows = max(self.micro_batch, cheap_rows(shape.layers, shape.width, shape.intermediate, self.length))
        return rows_of_an_adapter(self.stack, rows, TrainSettings(batch_size=self.batch))

    @property
    def tokens(self) -> int:
        """Of one forward."""
        return self.stack * self.rows_each * self.length

    @property
    def weight_bytes(self) -> int:
        return torch.empty(0, dtype=self.shape.dtype).element_size()

    @property
    def activation_bytes(self) -> int:
        return 2 if self.autocast else self.weight_bytes

    @property
    def adapted_layers(self) -> int:
        return self.shape.layers if self.layers is None else len(self.layers)

    @property
    def layers_with_gradient(self) -> int:
        """Decoder layers that the gradient passes: from the lowest adapted one up."""
        return self.shape.layers - (0 if self.layers is None else min(self.layers))

    @property
    def adapted(self) -> tuple[tuple[str, int, int], ...]:
        """(name, inputs, outputs) of the adapted modules of a layer."""
        return tuple(module for module in self.shape.linear if module[0] in self.targets)

    @property
    def trained(self) -> int:
        """Adapter parameters, of the whole stack; DoRA has a length for every output."""
        of_layer = sum(self.rank * (inputs + outputs) + self.dora * outputs for _, inputs, outputs in self.adapted)
        return self.stack * self.adapted_layers * of_layer


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak by part, which add up to `peak`; `disk`: of cached reference latents, for a million tokens."""

    parts: dict[str, int]
    working: str
    disk: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def predict(work: Workload) -> Memory:
    """The peak of a step, by part. See the module's docstring for the arithmetic."""
    shape = work.shape
    kept_layer = work.tokens * kept_per_token(work)
    head = work.tokens * (4 * shape.width + 4)  # the final norm
    spared = work.tokens * (4 * shape.width + 4)  # of a layer: an input that takes no gradient, or that is kept anyway
    if work.checkpointing:
        kept = work.layers_with_gradient * work.tokens * shape.width * work.weight_bytes + head
    else:
        kept = work.layers_with_gradient * kept_layer + head - spared
    backward = work.tokens * _backward_per_token(work) + _dequantized(work)
    working = {
        "the loss": work.tokens * shape.vocabulary * LOSS_BYTES,
        "a layer's backward": backward + (kept_layer - spared if work.checkpointing else 0),
        "the reference": _reference(work),
    }
    largest = max(working, key=working.get)
    parts = {
        "base model": weights(work),
        "second model": weights(work) if work.reference == "second" else 0,
        "adapters, gradients, optimizer": ADAMW_BYTES * work.trained,
        "activations": int(kept) + _cast_weights(work),
        "SAE rows and coefficients": 0 if work.reference == "none" else _penalty(work),
        "working set": int(working[largest]),
    }
    parts = {name: size for name, size in parts.items() if size}
    return Memory(parts, largest, 4 * work.latents * 10**6 if work.reference == "cache" else 0)


def weights(work: Workload) -> int:
    """Bytes of the frozen base model."""
    shape, size = work.shape, work.weight_bytes
    rest = size * (shape.embedding + shape.other)
    if work.quantization == "nf4":
        return rest + int(NF4_BYTES * shape.linear_elements)
    if work.quantization == "int8":
        return rest + shape.linear_elements + 4 * shape.layers * sum(outputs for _, _, outputs in shape.linear)
    return rest + size * shape.linear_elements


def kept_per_token(work: Workload) -> float:
    """Bytes that one decoder layer keeps of a token for the backward, without checkpointing."""
    shape, a = work.shape, work.activation_bytes
    norms = shape.norms * (4 * shape.width + 4)
    if shape.head_norm:
        norms += 4 * (shape.queries + shape.keys) + 4 * (shape.heads + shape.kv_heads)
    keys = shape.queries if work.padded else shape.keys
    attention = a * (2 * shape.queries + 2 * keys) + 4 * shape.heads + (a * work.length if work.padded else 0)
    return norms + attention + 3 * shape.intermediate * a + _lora_per_token(work) + _int8_per_token(work)


def _lora_per_token(work: Workload) -> float:
    """Adapter inputs and middles, a mean over the layers that the gradient passes."""
    names = {name for name, _, _ in work.adapted}
    middle = 2 if work.autocast else 4
    inputs = 0
    if work.dropout:
        inputs = sum((middle + 1) * width for _, width, _ in work.adapted)
    elif work.stack == 1 and (work.autocast or work.activation_bytes != 4):
        inputs = sum(middle * width for _, width, _ in work.adapted)
    else:
        normed = work.weight_bytes * work.shape.width
        inputs += normed * bool(names & {"q_proj", "k_proj", "v_proj"}) + normed * bool(
            names & {"gate_proj", "up_proj"}
        )
        inputs += work.activation_bytes * work.shape.intermediate * ("down_proj" in names)
    if work.dora:
        inputs += (work.activation_bytes + middle) * sum(outputs for _, _, outputs in work.adapted)
    share = work.adapted_layers / work.layers_with_gradient
    return share * (inputs + middle * work.rank * len(work.adapted))


def _int8_per_token(work: Workload) -> int:
    return (
        work.activation_bytes * (2 * work.shape.width + work.shape.intermediate) if work.quantization == "int8" else 0
    )


def _cast_weights(work: Workload) -> int:
    """Copies in bf16 that autocast makes of frozen fp32 weights, kept from forward to backward."""
    if not work.autocast or work.weight_bytes != 4 or work.quantization != "none":
        return 0
    shape = work.shape
    head = shape.width * shape.vocabulary
    layers = 1 if work.checkpointing else work.layers_with_gradient
    return 2 * (shape.linear_elements // shape.layers * layers + head)


def _backward_per_token(work: Workload) -> int:
    """What a layer's backward holds beside what the layer kept, at the largest: in the MLP.

    Three gradients, of the product and of its two factors, when an adapted down_proj has let go of its input; or that
    adapter's gradient of its input, in its own type and in the activations', beside the base weight's; and the
    stream's gradient.
    """
    a, adapter, wide = work.activation_bytes, 2 if work.autocast else 4, work.shape.intermediate
    held = 3 * a * wide
    if "down_proj" in work.targets:
        held = max(held - adapter * wide, (a + adapter + (a if a != adapter else 0)) * wide)
    return held + 4 * work.shape.width


def _dequantized(work: Workload) -> int:
    """The largest weight of a layer, unpacked to be multiplied."""
    if work.quantization == "none":
        return 0
    return work.activation_bytes * max(inputs * outputs for _, inputs, outputs in work.shape.linear)


def _reference(work: Workload) -> int:
    """The forward without gradient up to the blocked layer, while the log-probabilities wait for the backward."""
    if work.reference not in ("live", "second"):
        return 0
    shape, a = work.shape, work.activation_bytes
    waiting = WAITING_LOSS_BYTES * shape.vocabulary
    return work.tokens * (waiting + 3 * shape.intermediate * a + 3 * shape.width * 4) + _dequantized(work)


def _penalty(work: Workload) -> int:
    """Encoder and decoder rows in fp32, the reference hidden state, and a coefficient for every token and latent."""
    hidden = work.shape.width * work.weight_bytes if work.reference in ("live", "second") else 0
    return 8 * work.latents * work.shape.width + work.tokens * (hidden + 4 * work.latents)
