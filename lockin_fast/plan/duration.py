"""What an optimiser step computes and moves, part by part, and how long that takes at a device's rates.

FLOPs a token, with P the elements of a layer's linear weights, T the length and Q the width of all heads: a layer's
forward is 2 P + 2 T Q (causal attention), its backward 2 P + 5 T Q where the weights are frozen (no gradient for them),
the head 2 d V each way, LoRA 6 r (inputs + outputs), the penalty 2 K d for each of z, z_ref and the gradient. A live
reference is a forward up to the blocked layer. Checkpointing does the forward a second time.

Bytes: the stored weights once a micro-batch and pass, unpacked to activations' type and read again where they are
quantised; activations that are kept, written and read; the logits; AdamW's state. A part takes the longer of its
products and its copies, and nothing overlaps: an estimate for telling configurations apart.
"""

from dataclasses import dataclass

from lockin_fast.plan.device import Device
from lockin_fast.plan.memory import Workload, kept_per_token, weights

LOGIT_BYTES = 28  # a token and vocabulary entry: logits, log-probabilities and two gradients, written and read
OPTIMIZER_BYTES = 28  # a trained parameter: weight, gradient and moments read, weight and moments written


@dataclass(frozen=True)
class Part:
    name: str
    flops: float
    bytes: float

    def seconds(self, device: Device) -> float | None:
        if device.flops is None or device.bandwidth is None:
            return None
        return max(self.flops / device.flops, self.bytes / device.bandwidth)


def step_parts(work: Workload) -> list[Part]:
    """The parts of one optimiser step of the whole batch and stack."""
    shape = work.shape
    tokens = work.stack * work.batch * work.length
    passes = work.batch // work.rows_each
    per_layer = shape.linear_elements / shape.layers
    attention = work.length * shape.queries
    forward, backward = 2 * per_layer + 2 * attention, 2 * per_layer + 5 * attention
    head = 2 * shape.width * shape.vocabulary
    of_layer = passes * _weight_traffic(work) / shape.layers
    trained, kept = work.layers_with_gradient, 2 * tokens * kept_per_token(work)
    adapters = sum(inputs + outputs for _, inputs, outputs in work.adapted) * work.adapted_layers
    below = work.layer + 1 if work.reference in ("live", "second") else 0
    encoded = 0 if work.reference == "none" else 3 if below else 2
    parts = [
        Part("base forward", tokens * (shape.layers * forward + head), shape.layers * of_layer + trained * kept / 2),
        Part("base backward", tokens * (trained * backward + head), trained * (of_layer + kept / 2)),
        Part("forward again (checkpointing)", *(trained * part for part in (tokens * forward, of_layer + kept / 2))),
        Part("reference forward", tokens * below * forward, below * of_layer),
        Part("logits and loss", 0, tokens * shape.vocabulary * LOGIT_BYTES),
        Part("adapters", 6 * work.rank * tokens * adapters, 0),
        Part("block penalty", tokens * encoded * 2 * work.latents * shape.width, 0),
        Part("optimizer", 0, OPTIMIZER_BYTES * work.trained),
    ]
    return [part for part in parts if part.flops + part.bytes and (work.checkpointing or "again" not in part.name)]


def _weight_traffic(work: Workload) -> float:
    """Bytes of all decoder layers' weights for one pass: read as stored, written and read again when unpacked."""
    elements = work.shape.linear_elements
    stored = weights(work) - work.weight_bytes * (work.shape.embedding + work.shape.other)
    return stored + (0 if work.quantization == "none" else 2 * work.activation_bytes * elements)
