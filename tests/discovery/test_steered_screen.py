"""The benchmark of the steering screen runs, and finds every way to do it say the same tokens."""

from benchmarks import steered_screen


def test_all_ways_say_the_same_tokens_and_shared_reads_every_prompt_once(organism, capsys, monkeypatch):
    monkeypatch.setattr(steered_screen, "write_csv", None)  # nothing small is written
    steered_screen.main(["--organism", str(organism), "--small", "--batch-size", "16"])
    printed = capsys.readouterr().out
    lines = {name: next(line for line in printed.splitlines() if line.startswith(f"  {name} "))
             for name in ("shared", "latent at a time", "many in a batch", "prompt at a time")}  # fmt: skip
    assert all("same tokens 100.00%" in line for line in lines.values())
    below = {name: int(line.split("steered layer ")[1].split(",")[0]) for name, line in lines.items()}
    assert below["shared"] < below["latent at a time"]
