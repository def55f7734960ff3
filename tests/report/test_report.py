"""Figures and the HTML report: what they say is what the summary says, and nothing is asked of the network."""

import html.parser
import json
import re

import pytest
from made_run import HOSTILE, made_run, made_summary, with_epochs, with_methods

from lockin_fast.report import write_report
from lockin_fast.report.epochs import draw_epochs
from lockin_fast.report.figures import draw_figures
from lockin_fast.report.methods import draw_methods
from lockin_fast.report.style import looks, short_number, spread_apart
from lockin_fast.report.text import HEADINGS, headline, percent, signed_percent, table
from lockin_fast.rundir import RunError
from lockin_fast.sweep.summary import summarise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = made_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and the text of the table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "td":
            self.cells.append("")
            self.open = True

    def handle_endtag(self, tag):
        self.open = self.open and tag != "td"

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data


def test_the_report_is_one_file_that_asks_for_nothing(run):
    text = (run / "report.html").read_text()
    for tag, attributes in Page(text).tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert tag not in ("iframe", "object", "embed")
    assert "default-src 'none'" in text  # the browser holds it to that
    style_and_script = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", text, re.S)
    assert not any(re.search(r"url\(|@import|fetch\(|https?:", part) for part in style_and_script)


def test_replies_are_text_and_not_markup(run):
    text = (run / "report.html").read_text()
    assert HOSTILE not in text and "&lt;script&gt;alert" in text


def test_headline_table_and_samples_are_in_the_page(run):
    text, summary = (run / "report.html").read_text(), json.loads((run / "summary.json").read_text())
    page = Page(text)
    assert headline(summary) in text.replace("&#39;", "'")
    for row in table(summary):
        assert all(cell in page.cells for cell in row.cells)
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    assert text.count('class="verdict') == 3 * 12
    assert all(
        name in "".join(page.cells) for name in ("base-None-None says", "base-0.0-0 says", "causal-100.0-0 says")
    )
    assert "sha256 " + "a" * 64 in text and "steps: 120" in text


def test_writing_again_gives_the_same_bytes(run):
    before = (run / "report.html").read_bytes()
    write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_one_seed_and_no_best_setting(tmp_path):
    folder = made_run(tmp_path, seeds=1)
    summary = json.loads((folder / "summary.json").read_text())
    worse = [row | {"in_domain": 0.5} for row in summary["trials"]]
    summary = summarise(summary["base"], summary["baseline"]["trials"], worse)
    (folder / "summary.json").write_text(json.dumps(summary))
    text = write_report(folder).read_text()
    assert "No setting kept in-domain and incoherence within 2 points" in text and "±" not in Page(text).cells[2]


def test_a_folder_without_a_sweep_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no summary.json"):
        write_report(tmp_path)


def test_a_summary_without_trials_draws_nothing(tmp_path):
    summary = made_summary()
    with pytest.raises(ValueError, match="no blocked trial"):
        draw_figures(summary | {"means": []}, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_figures_show_every_set_and_the_baseline(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: figures.append(figure))
    summary = made_summary()
    draw_figures(summary, tmp_path)
    sweep, trade_off = figures
    for axes, key in zip(sweep.axes, ("em", "in_domain", "incoherence"), strict=True):
        assert axes.get_xscale() == "log"
        drawn = [tuple(line.get_ydata()) for line in axes.lines]
        for name in ("causal", "top-delta", "random"):
            assert tuple(row[key] for row in summary["means"] if row["latents"] == name) in drawn
        assert any(set(values) == {summary["baseline"][key]} for values in drawn)
        low, high = axes.get_ylim()
        assert all(low <= value <= high for values in drawn for value in values)
    labels = {text.get_text() for text in sweep.axes[0].texts}
    assert {"causal\n20 latents", "top-delta\n20 latents", "random\n20 latents", "no blocking"} <= labels
    axes, unblocked = trade_off.axes[0], summary["baseline"]
    drawn = {tuple(map(float, point)) for line in axes.lines for point in zip(*line.get_data(), strict=True)}
    for row in summary["means"]:
        point = (row["in_domain"] / unblocked["in_domain"] - 1, 1 - row["em"] / unblocked["em"])
        assert point in drawn
        assert axes.get_xlim()[0] < point[0] < axes.get_xlim()[1] and axes.get_ylim()[0] < point[1] < axes.get_ylim()[1]


def test_the_names_of_many_sets_do_not_collide_and_stay_in_the_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: figures.append(figure))
    summary = made_summary(seeds=1)
    trials = [
        row | {"latents": f"{row['latents']}-k{size}-{side}"}
        for side in ("positive", "negative", "shuffled") for size in (5, 10, 20) for row in summary["trials"]
    ]  # fmt: skip
    summary = with_methods(summarise(summary["base"], summary["baseline"]["trials"], trials))
    draw_figures(summary, tmp_path)
    draw_methods(summary, tmp_path)
    for figure in figures:
        figure.draw_without_rendering()
        texts = [text for legend in figure.legends for text in legend.get_texts()]
        if not texts:
            texts = [text for text in figure.axes[0].texts if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        assert len(boxes) >= 27 + 1
        for i, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            overlaps = [texts[i + 1 + j].get_text() for j, other in enumerate(boxes[i + 1 :]) if box.overlaps(other)]
            assert not overlaps, texts[i].get_text()
    sweep, trade_off, _ = figures
    offsets = [path.get_offset_transform().transform((0.0, 0.0))[0] for path in trade_off.axes[0].collections[1:]]
    assert max(offsets) - min(offsets) <= 45 / 72 * trade_off.dpi, "beside each other, but not at other values"


def test_sets_drawn_apart_stay_between_the_axes(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: figures.append(figure))
    summary = made_summary(seeds=1)
    costless = {"in_domain": 1.0, "incoherence": 0.0}  # better than unblocked: at the edge of both panels
    trials = [row | costless | {"latents": f"{row['latents']}{i}"} for i in range(2) for row in summary["trials"]]
    draw_figures(summarise(summary["base"], summary["baseline"]["trials"], trials), tmp_path)
    figures[1].draw_without_rendering()
    for axes in figures[1].axes:
        box, radius = axes.get_window_extent(), 9 / 72 * figures[1].dpi  # of the ring around the best setting
        places = [c.get_offset_transform().transform(c.get_offsets())[:, 0] for c in axes.collections[1:]]
        x = [place for of_set in places for place in of_set]
        assert min(x) - radius > box.x0 and max(x) + radius < box.x1


@pytest.mark.parametrize("change", [{"em": 0.0}, {"in_domain": 0.0}])
def test_figures_of_a_baseline_with_nothing_to_change(tmp_path, change):
    summary = made_summary(seeds=1)
    summary = summarise(summary["base"], [row | change for row in summary["baseline"]["trials"]], summary["trials"])
    assert all(path.stat().st_size > 10_000 for path in draw_figures(summary, tmp_path))
    assert headline(summary)


def test_a_single_setting_can_be_drawn(tmp_path):
    summary = made_summary(seeds=1)
    summary = summarise(summary["base"], summary["baseline"]["trials"], summary["trials"][:1])
    assert len(draw_figures(summary, tmp_path)) == 2


def test_the_headline_says_the_numbers():
    assert headline(made_summary(seeds=1)).startswith(
        "Blocking 20 causal latents at lambda 100 cuts emergent misalignment"
    )
    assert "means over 3 seeds" in headline(made_summary())


def test_table_rows_match_the_headings_and_mark_one_best():
    rows = table(made_summary())
    assert all(len(row.cells) == len(row.keys) == len(HEADINGS) for row in rows)
    assert [row.cells[:2] for row in rows if row.best] == [("causal (20)", "100")]
    assert rows[0].cells[0] == "base model" and rows[1].cells[:2] == ("no blocking", "0")


def test_texts_of_numbers():
    assert percent(0.1234) == "12.3%" and percent(0.1234, 0.02) == "12.3 ± 2.0%" and percent(None) == "–"
    assert signed_percent(-0.9871) == "−98.7%" and signed_percent(0.5) == "+50.0%" and signed_percent(-0.0) == "0.0%"
    assert [short_number(value) for value in (0.1, 1, 30, 1e3, 13e3, 1e6)] == ["0.1", "1", "30", "1k", "13k", "1M"]


def test_labels_are_spread_apart_and_keep_their_order():
    placed = spread_apart([0.5, 0.1, 0.11, 0.12], 0.1, 0.0, 1.0)
    assert placed == pytest.approx([0.5, 0.1, 0.2, 0.3])
    top = spread_apart([0.99, 1.0, 0.98], 0.1, 0.0, 1.0)
    assert top == pytest.approx([0.9, 1.0, 0.8])
    assert spread_apart([0.0, 0.01], 0.1, 0.05, 1.0) == pytest.approx([0.05, 0.15]), "from the lowest place on"


def test_every_set_has_a_look_of_its_own():
    chosen = looks(["causal", "mine", "random", "other", "top-delta"])
    assert len({look.color for look in chosen.values()}) == len({look.marker for look in chosen.values()}) == 5


def drawn(monkeypatch, module):
    """What `save_figure` would draw, as {name: axes}, without writing anything."""
    from matplotlib.figure import Figure

    figures = {}

    def keep(path, size, draw):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figures[path.stem] = figure.axes
        return path

    monkeypatch.setattr(f"lockin_fast.report.{module}.save_figure", keep)
    return figures


def test_epochs_show_every_lambda_and_the_penalty_below(monkeypatch, tmp_path):
    summary, traces = with_epochs(made_summary(seeds=2))
    figures = drawn(monkeypatch, "epochs")
    assert draw_epochs(made_summary(), {}, tmp_path) == []
    draw_epochs(summary, traces, tmp_path)
    assert set(figures) == {"epochs", "epochs_sets"}
    by_title = {axes.get_title(loc="left") or axes.get_title(): axes for axes in figures["epochs"]}
    rates = by_title["Emergent misalignment"].lines
    assert [line.get_label() for line in rates] == ["no blocking", "λ = 1", "λ = 10", "λ = 100"]
    unblocked = [row["em"] for row in summary["baseline"]["trials"]]
    assert rates[0].get_ydata()[-1] == pytest.approx(sum(unblocked) / 2)
    assert list(rates[0].get_xdata()) == [1, 2, 3, 4, 5]
    causal = [row["em"] for row in summary["trials"] if (row["latents"], row["lambda"]) == ("causal", 10.0)]
    assert rates[2].get_ydata()[-1] == pytest.approx(sum(causal) / 2)
    (penalty,) = (axes for title, axes in by_title.items() if title.startswith("Penalty"))
    assert penalty.get_yscale() == "log" and len(penalty.lines) == 3 * 2
    assert len(figures["epochs_sets"]) == 2 * 3
    assert all(len(axes.lines) in (4, 6) for axes in figures["epochs_sets"])


def test_methods_are_compared_on_the_papers_axes(monkeypatch, tmp_path):
    summary = with_methods(made_summary())
    figures = drawn(monkeypatch, "methods")
    assert draw_methods(made_summary(), tmp_path) == []
    draw_methods(summary, tmp_path)
    (axes,) = figures["methods"]
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert set(labels) == {
        "kl", "steering shift", "ablation causal", "frozen above", "blocking causal", "blocking top-delta",
        "blocking random", "no blocking",
    }  # fmt: skip
    row = next(row for row in summary["means"] if row["method"] == "kl" and row["lambda"] == 1.0)
    base = summary["baseline"]
    expected = (row["in_domain"] / base["in_domain"] - 1, 1 - row["em"] / base["em"])
    points = [tuple(path.get_offsets()[0]) for path in axes.collections]
    assert any(point == pytest.approx(expected) for point in points)


def test_methods_stand_in_the_table_and_never_win_the_headline():
    summary = with_methods(made_summary())
    names = [row.cells[0] for row in table(summary)]
    assert {"kl", "steering shift", "ablation causal", "frozen above"} <= set(names)
    assert [row.cells[1] for row in table(summary) if row.cells[0] == "ablation causal"] == ["–"], "it has no strength"
    assert summary["best"] == made_summary()["best"] and headline(summary) == headline(made_summary())
    assert set(summary["best_per_set"]) == {"causal", "top-delta", "random"}
    assert summary["best_per_method"]["kl"]["lambda"] == 0.1, "1.0 costs more than two points of in-domain"


def test_a_run_with_epochs_and_methods_reports_them(tmp_path):
    folder = made_run(tmp_path, seeds=1)
    summary, traces = with_epochs(json.loads((folder / "summary.json").read_text()))
    (folder / "summary.json").write_text(json.dumps(with_methods(summary)))
    with open(folder / "metrics.jsonl", "w") as file:
        for trial, points in traces.items():
            for epoch, value in points:
                file.write(json.dumps({"trial": trial, "epoch": epoch, "block_penalty": value}) + "\n")
    text = write_report(folder).read_text()
    assert sum(tag == "img" for tag, _ in Page(text).tags) == 5
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {
        "sweep", "trade_off", "methods", "epochs", "epochs_sets",
    }  # fmt: skip
