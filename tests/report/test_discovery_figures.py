"""The figures of the steering screen, of the calibration and of the sets' fronts show what was measured."""

import pytest
from made_run import BUDGET, RATES, made_discovery, made_run, made_summary, with_screen

from lockin_fast.report import write_report
from lockin_fast.report.discovery import read_discovery, section
from lockin_fast.report.pareto import draw_pareto, front, points_of_sets
from lockin_fast.report.screening import draw_screening, screening_caption
from lockin_fast.report.strengths import best_latents, draw_strengths, strengths_caption


@pytest.fixture
def screened(tmp_path):
    made_discovery(tmp_path)
    with_screen(tmp_path)
    return read_discovery(tmp_path)


@pytest.fixture
def calibrated(tmp_path):
    made_discovery(tmp_path)
    with_screen(tmp_path, calibrated=True)
    return read_discovery(tmp_path)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: figures.append(figure))

    def draw(function, found):
        function(found, tmp_path)
        return figures[-1]

    return draw


def scattered(axes, label=None):
    """{(x, y)} of all groups, or of one; rounded."""
    shown = [each for each in axes.collections if label in (None, each.get_label()) and len(each.get_offsets())]
    return {tuple(round(float(v), 9) for v in point) for each in shown for point in each.get_offsets()}


def doses(found, key, side):
    rows = [row for row in found[key] if row["side"] == side]
    plain, sign = rows[0], 1 if side == "induce" else -1
    return {
        (round(row["incoherent"] - plain["incoherent"], 9), round(sign * (row["misaligned"] - plain["misaligned"]), 9))
        for row in rows[1:]
    }


def test_every_dose_of_the_screen_is_drawn_beside_the_budget(screened, drawn):
    both, repair, induce = drawn(draw_screening, screened).axes
    assert scattered(both) == {(row["induced"], row["repaired"]) for row in screened["pool"]}
    for axes, side in ((repair, "repair"), (induce, "induce")):
        assert scattered(axes) >= doses(screened, "screen", side)
        assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() != "-"] == [[BUDGET, BUDGET]]
        low, high = axes.get_ylim()
        assert all(low < y < high for _, y in scattered(axes))
    assert "the 12 latents" in screening_caption(screened) and "more than 10 points" in screening_caption(screened)


def test_what_was_calibrated_is_drawn_at_its_strength(calibrated, drawn):
    both, repair, _ = drawn(draw_screening, calibrated).axes
    effect = {row["latent"]: (round(row["induced"], 9), round(row["repaired"], 9)) for row in calibrated["calibrated"]}
    assert scattered(both) == set(effect.values())
    assert scattered(both, "causal and valid-reduc") == {effect[104]} and scattered(both, "causal") == {effect[100]}
    assert scattered(both, "valid-reduc") == {effect[111], effect[108]}
    assert {text.get_text() for text in both.texts} == {"111", "108", "104"}  # those that do both
    assert scattered(repair) >= doses(calibrated, "calibration", "repair")
    assert "5 calibrated latents" in screening_caption(calibrated)


def test_the_curves_of_the_best_latents_begin_unsteered(calibrated, drawn):
    assert best_latents(calibrated) == [111, 108, 104, 100]  # 103 is beyond the budget at every strength
    axes = drawn(draw_strengths, calibrated).axes
    for panel, (rate, side) in zip(axes, [(r, s) for r in ("misaligned", "incoherent") for s in ("repair", "induce")],
                                   strict=True):  # fmt: skip
        lines = {line.get_label(): line for line in panel.lines if line.get_label().startswith("latent")}
        assert list(lines) == ["latent 111", "latent 108", "latent 104", "latent 100"]
        rows = [row for row in calibrated["calibration"] if row["side"] == side]
        expected = [rows[0][rate], *(row[rate] for row in rows if row["latent"] == 108)]
        assert list(lines["latent 108"].get_xdata()) == [0.0, 0.4, 0.8, 1.2]
        assert list(lines["latent 108"].get_ydata()) == expected
        rings = [line for line in panel.lines if line.get_markersize() == 12]
        assert [list(ring.get_xdata()) for ring in rings] == [[0.8]] * 4
        budget = [list(line.get_ydata()) for line in panel.lines if line.get_linestyle() == "--"]
        assert budget == ([[BUDGET, BUDGET]] if rate == "incoherent" else [])
    assert "3 of 5 latents both induce and repair" in strengths_caption(calibrated)


def test_a_front_is_what_nothing_beats():
    points = [(0.0, 0.1), (0.0, 0.3), (0.1, 0.2), (0.2, 0.9), (0.2, 0.8), (0.5, 0.9), (0.6, 0.95)]
    assert front(points) == [(0.0, 0.3), (0.2, 0.9), (0.6, 0.95)]
    assert front(points[::-1]) == front(points)
    assert front([(0.3, -0.1)]) == [(0.3, -0.1)]


def test_the_cost_is_the_larger_loss():
    points = points_of_sets(made_summary())
    assert list(points) == list(RATES)
    costs = {name: [cost for cost, _ in points[name]] for name in points}
    assert costs["causal"] == pytest.approx([0.0, 0.003, 0.003]) and costs["top-delta"][2] == pytest.approx(0.035)
    for name, weights in RATES.items():
        for (_, removed), (em, _, _) in zip(points[name], weights.values(), strict=True):
            assert removed == pytest.approx(1 - em / 0.72, abs=0.13)  # the made rates are noisy


def test_every_set_has_its_front_in_the_figure(drawn):
    summary = made_summary()
    (axes,) = drawn(draw_pareto, summary).axes
    assert [text.get_text() for text in axes.texts][: len(RATES)] == list(RATES)
    steps = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    for line, points in zip(steps, points_of_sets(summary).values(), strict=True):
        best = front(points)
        assert list(zip(*line.get_data(), strict=True))[:-1] == best and line.get_ydata()[-1] == best[-1][1]


def test_a_run_shows_the_figures_that_it_has_results_for(tmp_path):
    made_run(tmp_path)
    made_discovery(tmp_path)
    with_screen(tmp_path, calibrated=True)
    text = write_report(tmp_path).read_text()
    names = ("discovery", "induce_repair", "strengths", "pareto")
    assert all(f'<figure class="{name}">' in text for name in names)
    assert all((tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000 for name in names)


def test_without_a_sweep_there_is_no_front(screened, tmp_path):
    assert [path.stem for path, _ in section(screened, None, tmp_path)["figures"]] == ["discovery", "induce_repair"]
    nothing = made_summary() | {"baseline": made_summary()["baseline"] | {"em": 0.0}}
    assert len(section(screened, nothing, tmp_path)["figures"]) == 2
