"""Head scores equal to TransformerLens's on the same weights and tokens (golden/, made by make_golden.py)."""

import json
from pathlib import Path

import pytest
import torch
from attention_models import build, checksum

from lockin_fast.patching.copying import copying_scores
from lockin_fast.patching.induction import prefix_scores

GOLDEN = Path(__file__).parent / "golden"
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=sorted(path.stem for path in GOLDEN.glob("*.json")))
def case(request):
    """(kind, what TransformerLens found, tokens)."""
    found = json.loads((GOLDEN / f"{request.param}.json").read_text())
    assert checksum(build(request.param)) == pytest.approx(found["weights"], rel=1e-9), "other weights: make it again"
    return request.param, found, torch.tensor(found["tokens"])


def exact_stripe(kind, tokens):
    """The stripe's mean from eager attention with everything but its softmax in float64."""
    with torch.no_grad():
        attentions = build(kind, attention="eager").double()(input_ids=tokens, output_attentions=True).attentions
    length = tokens.shape[1] // 2
    layers = [layer.double().diagonal(1 - length, dim1=-2, dim2=-1)[..., -length:].mean(-1) for layer in attentions]
    return torch.stack(layers, 1)


def test_prefix_matching(case):
    kind, found, tokens = case
    scores = prefix_scores(build(kind), tokens).double()
    truth, theirs = exact_stripe(kind, tokens), torch.tensor(found["stripe"], dtype=torch.float64)
    assert (scores - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 4 * EPS
    # Their detector divides by all attention, T rows of 1; ours by the rows whose token occurred before, T // 2.
    detected = torch.tensor(found["detected"], dtype=torch.float64) * tokens.shape[1] / (tokens.shape[1] // 2)
    assert (scores - detected).abs().max() <= 3 * (theirs - truth).abs().max() + 8 * EPS
    assert scores.std() > 0.1 * scores.mean()


@pytest.mark.parametrize("fold", [False, True])
def test_copying(case, fold):
    kind, found, _ = case
    theirs = torch.tensor(found["copying_processed" if fold else "copying"], dtype=torch.float64)
    scores = copying_scores(build(kind), fold_norms=fold)
    # They multiply V x d x D matrices in float32: V + d + D roundings of products whose sums cancel to the scores.
    assert (scores - theirs).abs().max() <= (60 + 32 + 8) * EPS
    assert scores.std() > 0.05
