"""The report's section about lock-in: what it says of made series, its figure, and files that are none."""

import json

import pytest

from lockin_fast.lockin.onset import find_onset
from lockin_fast.lockin.summary import summarise_run
from lockin_fast.measure_settings import LockinThresholds, OnsetSettings
from lockin_fast.report import lockin
from lockin_fast.report.sections import read_sections
from lockin_fast.rundir import RunError

STEPS = [0, 1, 2, 3, 5, 7, 10, 15, 20, 30]
QUICK = LockinThresholds(onset=OnsetSettings(bootstrap=99))
NOISE = [0.004, -0.01, 0.007, -0.003, 0.009, -0.006, 0.002, 0.01, -0.008, 0.005]


@pytest.fixture(scope="module")
def measured():
    """What measure would write of a cosine that jumps at step 7 and rates of which one failed."""
    cosine = [(0.1 if step < 7 else 0.9) + noise for step, noise in zip(STEPS, NOISE, strict=True)]
    em = [None, *NOISE[1:]]
    checkpoints = [{"step": step, "checkpoint": f"checkpoint-{step}", "failed": {}} for step in STEPS]
    checkpoints[0]["failed"] = {"em": "the judge was away"}
    return {"checkpoints": checkpoints, "anomalies": ["steps 0 and 30 are one"]} | summarise_run(
        STEPS, {"persona_cosine": cosine, "em": em}, QUICK
    )


def test_the_section_tells_the_onset_of_each_series(measured, tmp_path):
    onset = find_onset(STEPS, measured["series"]["persona_cosine"]["values"], QUICK.onset)
    assert onset.step == 7  # by construction
    (tmp_path / "lockin.json").write_text(json.dumps(measured))
    (section,) = read_sections(tmp_path)
    assert section["lead"] == "Onset of persona_cosine at step 7. Beware: steps 0 and 30 are one."
    (path, caption), *others = section["figures"]
    assert path.read_bytes().startswith(b"\x89PNG") and "onset" in caption and not others
    onsets, triggers, every = section["tables"]
    assert onsets["rows"][0][:4] == ["persona_cosine", "7", *(f"{step:g}" for step in onset.interval)]
    assert onsets["rows"][1][0] == "em" and onsets["rows"][1][1] in ("not supported", "cannot say")
    assert [row[:2] for row in triggers["rows"]][0] == ["audit", "fires"]  # a change in identity is enough
    assert every["rows"][0] == ["0", "checkpoint-0", "0.104", "\u2013"] and len(every["rows"]) == len(STEPS)
    assert every["note"] == "step 0: em failed: the judge was away"


def test_a_run_that_was_not_measured_has_no_section(tmp_path):
    assert read_sections(tmp_path) == []
    for text in ("{", "{}", '{"series": {"em": {}}}'):
        (tmp_path / "lockin.json").write_text(text)
        with pytest.raises(RunError, match="lockin.json: not what measure writes .*run measure again"):
            lockin.read_lockin(tmp_path)
