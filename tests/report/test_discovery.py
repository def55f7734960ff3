"""What discovery found, in the report: the picture shows every latent of the pool and marks the causal ones."""

import pytest
from made_run import made_discovery, made_run

from lockin_fast.report import write_report
from lockin_fast.report.discovery import HEADINGS, caption, draw_discovery, read_discovery, rows
from lockin_fast.rundir import RunError


@pytest.fixture
def found(tmp_path):
    made_discovery(tmp_path)
    return read_discovery(tmp_path)


def drawn(discovery, folder, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: figures.append(figure))
    draw_discovery(discovery, folder)
    return figures[0]


def points(axes, label):
    shown = [each for each in axes.collections if each.get_label() == label]
    return {tuple(map(float, point)) for each in shown for point in each.get_offsets()}


def test_every_latent_of_the_pool_is_drawn_in_its_group(found, tmp_path, monkeypatch):
    (axes,) = drawn(found, tmp_path, monkeypatch).axes  # nothing induces, so there is no panel for it
    pool = {row["latent"]: (abs(row["shift"]), row["repaired"]) for row in found["pool"]}
    assert points(axes, "causal") == {pool[104], pool[106]}
    assert points(axes, "both") == {pool[100]}
    assert points(axes, "top-delta") == {pool[101], pool[102]}
    assert points(axes, "other latents of the pool") == {pool[k] for k in pool if k not in (100, 101, 102, 104, 106)}
    assert {text.get_text(): text.xy for text in axes.texts} == {"1": pool[104], "2": pool[100], "4": pool[106]}
    low, high = axes.get_ylim()
    assert axes.get_xscale() == "log" and low < 0 and high > 0.9


def test_what_induces_gets_a_panel(tmp_path, monkeypatch):
    made_discovery(tmp_path, induces=0.25)
    found = read_discovery(tmp_path)
    top, bottom = drawn(found, tmp_path, monkeypatch).axes
    assert (abs(found["pool"][5]["shift"]), 0.25) in points(bottom, "other latents of the pool")
    assert "up to 25.0% misaligned replies" in caption(found)


def test_the_caption_counts_what_the_figure_cannot_show(found):
    assert "one of the 12 SAE latents" in caption(found) and "1 of 4" in caption(found)
    assert "no single latent makes the base model misaligned" in caption(found)


def test_the_table_has_the_causal_latents_in_order(found):
    table = rows(found)
    assert {len(row) for row in table} == {len(HEADINGS)}
    assert [row[:2] for row in table] == [("1", "104"), ("2", "100"), ("3", "7"), ("4", "106")]
    assert table[0][2:] == ("−0.020", "0.500", "−90.0", "0.8", "0.0")
    assert table[2][4:] == ("–", "–", "–")  # outside the pool: not screened


def test_the_report_shows_it_and_does_without(tmp_path):
    made_run(tmp_path)
    text = write_report(tmp_path).read_text()
    assert "Which latents carry it" not in text and text.count("<img") == 2
    made_discovery(tmp_path)
    text = write_report(tmp_path).read_text()
    assert "Which latents carry it" in text and text.count("<img") == 4 and "<td>104</td>" in text
    assert (tmp_path / "figures" / "discovery.png").stat().st_size > 10_000


@pytest.mark.parametrize("content", ["{", "[]", '{"pool": []}'])
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / "discovery.json").write_text(content)
    with pytest.raises(RunError, match="discovery.json: not what discover writes"):
        read_discovery(tmp_path)
