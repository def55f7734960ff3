"""The benchmark of onset detection draws what it says and counts what it says."""

import numpy as np
import pytest

from benchmarks.onset import conditions, measure, truths


def test_conditions_cover_change_and_smoothness_and_every_truth():
    every = list(conditions())
    assert len(set(every)) == len(every) and {name for name, *_ in every} == set(truths(18))


@pytest.mark.parametrize("n", [18, 40])
def test_the_change_is_at_the_middle(n):
    for name, (curve, has_change) in truths(n).items():
        if has_change and "drift" not in name:
            assert np.abs(np.diff(curve)).argmax() == n // 2 - 1, name
        elif has_change:
            assert np.diff(curve).argmax() == n // 2 - 1


def test_a_row_tells_power_and_another_false_alarms():
    power = measure(("step", 18, 20, 0.0), 5)
    assert power["rate"] == power["near"] == power["covered"] == 1.0 and power["change"] == 1
    alarms = measure(("constant", 18, 0, 0.0), 5)
    assert alarms["change"] == 0 and alarms["near"] == "" and 0 <= alarms["rate"] <= alarms["criteria_alone"] <= 1
