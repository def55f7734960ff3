"""The report in a real browser: no console error, every figure visible, and the table sorts."""

import json
import re
import shutil
import subprocess

import pytest
from made_run import made_discovery, made_run

from lockin_fast.report import compare, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
).split()
PROBE = """
<script>
window.addEventListener("load", () => {
  const shown = [...document.images].map(image => {
    const box = image.getBoundingClientRect();
    return {natural: image.naturalWidth, width: box.width, height: box.height, left: box.left, right: box.right};
  });
  const rows = () => [...document.querySelectorAll("#settings tbody tr")].map(
    row => Number(row.children[2].dataset.key));
  const button = document.querySelectorAll("#settings th button")[2];
  button.click();
  const rising = rows();
  button.click();
  document.documentElement.dataset.probe = JSON.stringify(
    {shown, rising, falling: rows(), page: document.documentElement.clientWidth,
     wide: document.documentElement.scrollWidth});
});
</script>
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


def visit(page, profile, width=1100):
    """(what the probe in the page saw, lines of the console)."""
    command = [CHROMIUM, *FLAGS, f"--window-size={width},900", f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found[1].replace("&quot;", '"')), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def page(tmp_path):
    """The report of a run beside another, and of its discovery, with the probe added before its end."""
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        made_run(tmp_path / name)
    made_discovery(tmp_path / "run", induces=0.1)
    compare(tmp_path / "run", [tmp_path / "other"])
    text = write_report(tmp_path / "run").read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", PROBE + "</body>"))
    return probed


@pytest.mark.parametrize("width", [1100, 520])
def test_figures_are_visible_and_the_console_is_silent(page, tmp_path, width):
    seen, console = visit(page, tmp_path / "profile", width)
    assert console == []
    assert len(seen["shown"]) == 3
    for image in seen["shown"]:
        assert image["natural"] > 1000 and image["width"] > 0.6 * width and image["height"] > 0.3 * width
        assert 0 <= image["left"] < image["right"] <= seen["page"]
    assert seen["wide"] <= seen["page"]  # nothing runs out of the page
    assert seen["rising"] == sorted(seen["rising"]) and seen["falling"] == seen["rising"][::-1]


def test_the_probe_would_see_a_broken_page(page, tmp_path):
    """A control: a script error, a damaged figure and a request all show."""
    text = page.read_text().replace("data:image/png;base64,", "data:image/png;base64,AAAA", 1)
    page.write_text(
        text.replace("</main>", "<script>lost()</script><img src='http://127.0.0.1:48151/missing.png'></main>")
    )
    seen, console = visit(page, tmp_path / "profile")
    assert any("lost is not defined" in line for line in console)
    assert [image["natural"] for image in seen["shown"]].count(0) == 2
    assert any("Content Security Policy" in line and "missing.png" in line for line in console), console
