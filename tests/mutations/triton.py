"""Faults in the Triton kernels, whose tests are run in the interpreter: it shows no race, so none is put in."""


def faults(name, *changes, tests=None):
    """`changes` (old, new) to a file of kernels, which the tests of the op of that name, or `tests`, have to notice."""
    file, tests = f"lockin_fast/kernels/triton/{name}.py", f"tests/ops/test_{tests or name}.py"
    return [(file, old, new, tests, "not 2304 and not 4096") for old, new in changes]


MUTATIONS = [
    *faults(
        "_tiles",
        ("height = min(rows - first, GROUP)", "height = GROUP"),
        ("mask=(latents < K)[:, None] & (d < D)[None, :]", "mask=(latents < K)[:, None] & (d < D - 1)[None, :]"),
        ("tl.maximum(tl.load(threshold + latents, mask=latents < K, other=0.0), 0.0)", "tl.load(threshold + latents)"),
        ("tl.where(pre <= floor, 0.0, pre)", "tl.where(pre > floor, pre, 0.0)"),
        ("tl.where(pre <= floor, 0.0, pre)", "tl.where(pre < floor, 0.0, pre)"),
        tests="encode_latents",
    ),
    *faults(
        "_tiles",
        ("token * (ref_stride - h_stride) + to_ref", "to_ref"),
        ("tl.where(x > 0.0, 1.0, 0.0)", "tl.where(x >= 0.0, 1.0, 0.0)"),
        tests="block_penalty",
    ),
    *faults(
        "encode_latents",
        ("tokens < T, latents < K", "tokens < T - 1, latents < K"),
        ("tokens < T, latents < K", "tokens < T, latents < K - 1"),
        ("pre += tl.load(bias", "pre -= tl.load(bias"),
        ("floor_of(threshold, latents, K)", "floor_of(None, latents, K)"),
    ),
    *faults(
        "encode_latents",
        ("out + first * out_stride + place", "out + first * K + place"),
        tests="encode_topk",
    ),
    *faults(
        "encode_topk",
        ("(equal <= spare)", "(equal < spare)"),
        ("tl.where(value != value, 0x7F800001,", "tl.where(value != value, 0x7F800000,"),
        ("tl.where(new > cut, 1, 0), axis=1)\n        equal", "tl.where(new >= cut, 1, 0), axis=1)\n        equal"),
    ),
    *faults(
        "block_penalty",
        ("keep = inside & (tl.load(mask + tokens, mask=inside, other=0) != 0)", "keep = inside"),
        ("tl.where(excess <= 0.0, 0.0, excess)", "tl.where(excess > 0.0, excess, 0.0)"),
        ("excess -= tl.load(margin", "excess += tl.load(margin"),
        ("range(0, K, BLOCK_K)", "range(0, BLOCK_K, BLOCK_K)"),
    ),
    *faults(
        "block_penalty_nf4",
        ("excess = s * (z - z_ref)", "excess = s * (z + z_ref)"),
        ("absmax + tokens * (D // SIZE) + d0 // SIZE", "absmax + tokens * (D // SIZE)"),
    ),
    *faults(
        "js_divergence",
        ("total * tl.exp(largest - shift) +", "total +"),
        ('other=float("-inf")).to(tl.float32)\n            raised', "other=0.0).to(tl.float32)\n            raised"),
    ),
    *faults(
        "nf4",
        ("& 0x7FFFFFFF", ""),
        ("x = tl.where(column == tl.load(channels + j), 0.0, x)", "x = tl.where(column == tl.load(channels), 0.0, x)"),
        ("tl.join(packed >> 4, packed)", "tl.join(packed, packed >> 4)"),
        ("tl.where(largest < SMALLEST, SMALLEST, largest)", "largest"),
        ("~(x <= BETWEEN[7])", "x > BETWEEN[7]"),
        ("tl.where(two, BETWEEN[6], BETWEEN[4])", "tl.where(two, BETWEEN[6], BETWEEN[5])"),
        ("pick(one, 14), pick(one, 12)", "pick(one, 12), pick(one, 14)"),
        ("outliers + token * N + j", "outliers + token * N"),
    ),
]
