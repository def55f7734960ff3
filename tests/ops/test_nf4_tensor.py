import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lockin_fast import NF4Tensor, outlier_channels, quantize_nf4

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def hidden(*shape, dtype=torch.float32, loud=(), seed=0):
    """Normal hidden states whose `loud` channels are 60 times larger."""
    h = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    h[..., list(loud)] *= 60
    return h.to(dtype)


def relative_error(got, truth):
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (0, 64), (2, 0, 64), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_dtype_and_bytes_are_kept_in_mind(dtype, shape):
    h = hidden(*shape, dtype=dtype)
    q = quantize_nf4(h, blocksize=32)
    tokens, width = h.shape[:-1].numel(), h.shape[-1]
    assert q.shape == h.shape and q.dtype is dtype and q.blocksize == 32 and q.device == h.device
    assert q.codes.shape == (tokens, width // 2) and q.absmax.shape == (tokens, width // 32)
    assert q.channels is q.outliers is None and q.nbytes == tokens * (width // 2 + 4 * width // 32)
    assert q.dequantize().shape == h.shape and q.dequantize().dtype is dtype
    assert q.dequantize(torch.float32).dtype is torch.float32
    if tokens > 1 and width:
        assert 0.05 < relative_error(q.dequantize(), h) < 0.12


def test_half_an_element_is_lost_at_most():
    h = hidden(50, 64)
    q = quantize_nf4(h)
    gap = 1 - 0.6961928009986877  # the widest of the codebook
    assert ((q.dequantize() - h).abs() <= q.absmax * (gap / 2 + 1e-6)).all()


def test_outlier_channels_rescue_the_others():
    loud = [7, 40, 100]
    h = hidden(200, 128, loud=loud)
    others = [c for c in range(128) if c not in loud]
    plain, kept = quantize_nf4(h).dequantize(), quantize_nf4(h, outliers=3)
    assert kept.channels.tolist() == loud and kept.channels.dtype is torch.int32
    assert torch.equal(kept.dequantize()[:, loud], h[:, loud])
    assert relative_error(plain[:, others], h[:, others]) > 0.5
    assert relative_error(kept.dequantize()[:, others], h[:, others]) < 0.12
    assert kept.nbytes == quantize_nf4(h).nbytes + 200 * 3 * 4 + 3 * 4


def test_outliers_may_be_chosen_before_and_in_any_order():
    h = hidden(20, 64, loud=[3, 9], dtype=torch.bfloat16)
    picked = outlier_channels(h, 2)
    expected = quantize_nf4(h, outliers=2)
    for channels in (picked, picked.long().flip(0)):
        q = quantize_nf4(h, outliers=channels)
        assert torch.equal(q.channels, expected.channels) and torch.equal(q.codes, expected.codes)
        assert torch.equal(q.outliers, h[:, [3, 9]])
    assert quantize_nf4(h, outliers=torch.tensor([], dtype=torch.int64)).channels is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outlier_channels_are_the_largest_by_root_mean_square(dtype):
    h = hidden(4, 5, 64, dtype=dtype)
    h[..., [60, 2, 31]] *= 20
    h[0, 0, 10] = 30  # one large element in twenty is less than a channel that always is
    assert outlier_channels(h, 3).tolist() == [2, 31, 60]
    assert outlier_channels(h, 0).tolist() == [] and outlier_channels(h, 64).tolist() == list(range(64))
    huge = torch.ones(4, 8)
    huge[:, 5], huge[:, 6] = 1e30, 1e29
    assert outlier_channels(huge, 1).tolist() == [5]


def test_rows_picks_flattened_tokens():
    h = hidden(4, 6, 64, loud=[5], dtype=torch.float16)
    q = quantize_nf4(h, outliers=1)
    flat = q.dequantize().view(24, 64)
    for index in (torch.tensor([5, 0, 23, 5]), slice(3, 9), torch.arange(24) % 3 == 0):
        assert torch.equal(q.rows(index).dequantize(), flat[index])
    assert q.rows(torch.tensor([], dtype=torch.int64)).shape == (0, 64)


def test_to_a_device_moves_everything():
    moved = quantize_nf4(hidden(4, 64), outliers=2).to("meta")
    assert all(x.device.type == "meta" for x in (moved.codes, moved.absmax, moved.channels, moved.outliers))
    assert moved.device.type == "meta" and moved.shape == (4, 64)
    assert quantize_nf4(hidden(4, 64)).to("meta").channels is None


def test_it_says_what_it_is():
    assert repr(quantize_nf4(hidden(2, 3, 64), outliers=2)) == (
        "NF4Tensor((2, 3, 64), torch.float32, blocksize=64, outliers=2)"
    )


def test_no_gradient_and_any_strides():
    h = hidden(6, 64)
    expected = quantize_nf4(h)
    assert not quantize_nf4(h.clone().requires_grad_(), outliers=1).dequantize().requires_grad
    for same in (h.t().contiguous().t(), h.repeat(1, 2)[:, :64], h.repeat_interleave(2, 0)[::2]):
        assert torch.equal(quantize_nf4(same).codes, expected.codes)


@pytest.mark.parametrize("outliers", [0, 2])
def test_in_one_graph(outliers):
    def round_trip(h):
        q = quantize_nf4(h * 1.0, blocksize=32, outliers=outliers)
        return q.dequantize(), q.rows(slice(1, 3)).dequantize(torch.bfloat16), q.absmax

    torch._dynamo.reset()
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    for tokens in (4, 7):
        h = hidden(tokens, 64)
        for eager, traced in zip(round_trip(h), compiled(h), strict=True):
            assert torch.equal(eager, traced)


def test_nothing_waits_for_the_device():
    with FakeTensorMode():
        h = torch.empty(9, 64, dtype=torch.bfloat16)
        q = quantize_nf4(h, outliers=outlier_channels(h, 3).long())
        assert q.dequantize().shape == (9, 64) and q.nbytes == 9 * (32 + 4 + 6) + 12


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"h": [1.0]}, TypeError, "h: got list, expected a tensor [..., d]"),
        ({"h": torch.zeros(())}, ValueError, "h: got a scalar, expected hidden states [..., d]"),
        ({"h": torch.zeros(4, 64).double()}, TypeError, "h: got torch.float64, expected float32, float16 or bfloat16"),
        ({"blocksize": 48}, ValueError, "blocksize: got 48 for a width of 64, expected one of 16, 32, 64"),
        ({"blocksize": 128}, ValueError, "blocksize: got 128 for a width of 64, expected one of 16, 32, 64"),
        ({"h": torch.zeros(4, 123)}, ValueError, "expected a width that is a multiple of 16"),
        ({"blocksize": 32.0}, ValueError, "blocksize: got 32.0 for a width of 64, expected one of 16, 32, 64"),
        ({"outliers": 65}, ValueError, "outliers: got 65, expected 0 to 64 as h is (4, 64)"),
        ({"outliers": -1}, ValueError, "outliers: got -1, expected 0 to 64"),
        ({"outliers": True}, ValueError, "outliers: got True, expected 0 to 64"),
        ({"outliers": 1.5}, TypeError, "outliers: got float, expected a tensor"),
        ({"outliers": torch.zeros(2)}, ValueError, "outliers: got torch.float32 (2,), expected int channels [n]"),
        ({"outliers": torch.tensor([3, 64])}, ValueError, "outliers: got channel 64, expected 0 to 63"),
        ({"outliers": torch.tensor([-2, 5])}, ValueError, "outliers: got channel -2, expected 0 to 63"),
        ({"outliers": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "outliers: is on meta"),
    ],
)
def test_errors_name_the_argument(change, error, text):
    arguments = {"h": torch.zeros(4, 64), "blocksize": 32, "outliers": 0} | change
    with pytest.raises(error, match=re.escape(text)):
        quantize_nf4(arguments.pop("h"), **arguments)


@pytest.mark.parametrize("n", [65, -1, 2.0, True])
def test_a_wrong_number_of_channels_is_named(n):
    with pytest.raises(ValueError, match=re.escape(f"n: got {n}, expected 0 to 64 as sample is (4, 64)")):
        outlier_channels(torch.zeros(4, 64), n)


def test_other_result_dtypes_are_refused():
    with pytest.raises(TypeError, match="dtype: got torch.float64, expected float32, float16 or bfloat16"):
        quantize_nf4(hidden(4, 64)).dequantize(torch.float64)


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_bnb_reads_what_bitsandbytes_wrote(bnb, dtype, nested):
    h = hidden(3, 40, 256, dtype=dtype)
    packed, state = bnb.quantize_4bit(h, blocksize=64, quant_type="nf4", compress_statistics=nested)
    q = NF4Tensor.from_bnb(packed, state)
    assert q.shape == h.shape and q.dtype is dtype and q.codes.data_ptr() == packed.data_ptr()
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))
    if not nested:
        assert torch.equal(q.codes, quantize_nf4(h).codes) and torch.equal(q.absmax, quantize_nf4(h).absmax)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_from_bnb_takes_a_parameter_with_its_state(bnb, storage):
    from bitsandbytes.nn import Params4bit

    h = hidden(12, 256, dtype=torch.bfloat16)
    weight = Params4bit(h.clone(), requires_grad=False, quant_type="nf4", quant_storage=storage).to("cpu")
    q = NF4Tensor.from_bnb(weight)
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(weight.data, weight.quant_state))


def test_from_bnb_refuses_the_layout_repacked_for_cpu_products(bnb):
    from types import SimpleNamespace

    packed, state = bnb.quantize_4bit(hidden(128, 256), blocksize=64, quant_type="nf4")
    repacked = SimpleNamespace(**vars(state), packing_format_for_cpu=True)
    with pytest.raises(ValueError, match="^packed: got bitsandbytes' layout repacked for CPU products"):
        NF4Tensor.from_bnb(packed, repacked)


def test_from_bnb_refuses_what_a_linear_layer_was_repacked_to(bnb):
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
    NF4Tensor.from_bnb(layer.weight)
    with torch.no_grad():
        layer(torch.zeros(2, 256, dtype=torch.bfloat16))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks on processors with AVX-512 BF16 alone")
    with pytest.raises(ValueError, match="^packed: got bitsandbytes' layout repacked for CPU products"):
        NF4Tensor.from_bnb(layer.weight)


def test_from_bnb_refuses_other_layouts_by_name(bnb):
    h = hidden(6, 96, dtype=torch.bfloat16)

    def refused(text, packed, state):
        with pytest.raises((ValueError, TypeError), match=re.escape(text)):
            NF4Tensor.from_bnb(packed, state)

    packed, state = bnb.quantize_4bit(h, blocksize=32, quant_type="nf4")
    NF4Tensor.from_bnb(packed, state)
    refused("packed: got a transposed view (1, 288)", packed.t(), state)
    refused("quant_state: got None", packed, None)
    refused("packed: got list, expected a tensor", [1], state)
    refused("packed: got 32 bytes, expected 288 for the shape (6, 96)", packed[:32], state)
    refused("quant_state: got quant_type 'fp4'", *bnb.quantize_4bit(h, blocksize=32, quant_type="fp4"))
    refused("blocks of 64 in rows of 96", *bnb.quantize_4bit(h, blocksize=64, quant_type="nf4"))
    state.dtype = torch.float64
    refused("quant_state: got dtype torch.float64", packed, state)
    state.dtype, state.absmax = torch.bfloat16, state.absmax.bfloat16()
    refused("quant_state: got absmax of 18 torch.bfloat16", packed, state)
