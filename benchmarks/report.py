"""python -m benchmarks.report: the tables of benchmarks/README.md and its figure, from the files in benchmarks/results.

Also what the project's README says of GPUs. Nothing is measured here, and no number is typed in by hand: what stands
between the pages' markers is replaced.
"""

import csv
import statistics
from pathlib import Path

from benchmarks.run import names
from lockin_fast.dispatch import backends, never_run_on_gpu
from lockin_fast.kernels import gpu

HERE = Path(__file__).parent
RESULTS, PAGE, FIGURE = HERE / "results", HERE / "README.md", HERE / "results" / "ceilings.png"
BEGIN, END = "<!-- tables: python -m benchmarks.report -->", "<!-- end of tables -->"
FRONT = HERE.parent / "README.md"
HEAD_BEGIN, HEAD_END = "<!-- figures: python -m benchmarks.report -->", "<!-- end of figures -->"
# What the front page shows: benchmark, case, what it is about.
HEADLINE = (
    ("block_penalty", "h_ref in the same pass", "the penalty in a step, T=4096, d=4096, K=20"),
    ("block_penalty", "z_ref cached, every token active", "the same, reference latents cached"),
    ("block_penalty_nf4", "reference in NF4", "the same, reference in four bits"),
    ("latent_stats", "one stream, bfloat16", "statistics of 65,536 latents, T=2048"),
    ("encode_topk", "bfloat16", "the 64 largest of 65,536 latents, T=2048"),
    ("nf4", "quantise, 0 outlier channels", "4096 x 4096 to four bits"),
    ("patch", "2,048 rows, bf16", "2,048 rows patched"),
    ("steer", "16 prompts of 128", "16 prompts steered"),
    ("js_divergence", None, "8 prompts x 64 positions x 128,256 tokens"),
    ("prefix_matching", "float32", "induction scores, 16 heads, T=4096"),
)
GPU_BEGIN, GPU_END = "<!-- gpu: python -m benchmarks.report -->", "<!-- end of gpu -->"


def read(name):
    """The rows of one results file, numbers as numbers; none when it was never measured."""
    path = RESULTS / f"{name}.csv"
    return (
        [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(path.open())]
        if path.exists()
        else []
    )


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text


def problems(rows):
    """Rows of the same case and allocator together, in the order of the file."""
    groups = {}
    for row in rows:
        groups.setdefault((row["case"], row["allocator"]), []).append(row)
    return groups


def digits(value):
    """Three digits, and all of them before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(row):
    """Median and quartiles."""
    return f"{digits(row['median_ms'])} ({digits(row['low_ms'])}-{digits(row['high_ms'])})"


def table(rows):
    """A Markdown table: per case and allocator the best baseline, ours, and what the two mean."""
    lines = [
        "| case | allocator | best baseline, ms | ours, ms | ratio | of the ceiling | extra memory, ours / baseline |",
        "|---|---|---|---|---|---|---|",
    ]
    for (case, allocator), group in problems(rows).items():
        baselines = [row for row in group if is_baseline(row)]
        best = min(baselines, key=lambda row: row["median_ms"])
        for ours in (row for row in group if row["ours"]):
            ratio = f"{ours['best_baseline_over_this']:.2f}x"
            if ours["this_over_bare"] != "":
                ratio += f"; {ours['this_over_bare']:.3f} of the bare product"
            memory = "" if ours["extra_mb"] == "" else f"{ours['extra_mb']:.1f} / {best['extra_mb']:.1f} MB"
            lines.append(
                f"| {case}: `{ours['provider']}` | {allocator} | {best['provider']}: {milliseconds(best)} "
                f"| {milliseconds(ours)} | {ratio} | {ours['of_ceiling']:.0%} | {memory} |"
            )
    return lines


def tables():
    """All tables, worst first: the benchmark whose worst ratio is smallest leads."""
    measured = {name: rows for name in names() if (rows := read(name))}
    worst = {
        name: min(row["best_baseline_over_this"] for row in rows if row["ours"]) for name, rows in measured.items()
    }
    lines = []
    for name in sorted(measured, key=worst.get):
        row = measured[name][0]
        where = f"{row['gpu'] or row['cpu']}, {row['threads']:.0f} threads, {row['isa']}, torch {row['torch']}"
        lines += [f"### {name}", "", f"`results/{name}.csv`: {where}, commit {row['commit']}, {row['date'][:10]}.", ""]
        lines += [*table(measured[name]), ""]
    return lines


def draw(path=FIGURE):
    """Roofline of what multiplies, and for every case the fraction of its ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for name in names() for row in read(name) if row["ours"] and row["allocator"] == "default"]
    rows.sort(key=lambda row: row["of_ceiling"])
    figure, (roof, bars) = pyplot.subplots(1, 2, figsize=(13, max(4.5, 0.24 * len(rows))), width_ratios=(1, 1.1))
    multiplying = [row for row in rows if row["gflop_per_s"] > 0]
    for dtype, color in (("bfloat16", "tab:blue"), ("float32", "tab:orange")):
        of_dtype = [row for row in multiplying if dtype in row["shape"]]
        if not of_dtype:
            continue
        peak = max(row["product_gflop_per_s"] for row in of_dtype)
        copy = statistics.median(row["copy_gb_per_s"] for row in of_dtype)
        grid = [10 ** (e / 20) for e in range(0, 75)]
        roof.plot(grid, [min(copy * x, peak) for x in grid], color=color, lw=1, label=f"{dtype}: copy and product")
        intensity = [row["gflop_per_s"] / row["gb_per_s"] for row in of_dtype]
        roof.scatter(intensity, [row["gflop_per_s"] for row in of_dtype], color=color, s=18, zorder=3)
    roof.set(xscale="log", yscale="log", xlabel="FLOP per byte of least traffic", ylabel="GFLOP/s")
    roof.set_title("Ours under the measured roofs", fontsize=10)
    roof.legend(fontsize=8)
    labels = [f"{row['provider']}: {row['case']}" for row in rows]
    bars.barh(range(len(rows)), [100 * row["of_ceiling"] for row in rows], color="tab:blue", height=0.7)
    bars.set_yticks(range(len(rows)), labels, fontsize=7)
    bars.axvline(100, color="black", lw=0.8)
    bars.set(xlabel="percent of the ceiling of the same run")
    bars.set_title("The larger of copying the bytes and multiplying the FLOPs", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def headline():
    """The table of the front page: one case a line, with memory retained where that was measured."""
    lines = [
        "| | costliest form in use | best baseline | ours | | of the ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for name, case, about in HEADLINE:
        groups = problems(read(name))
        labels = [label for label, _ in groups if case in (None, label)][:1]
        for label in labels:
            group = groups.get((label, "retained")) or groups[label, "default"]
            ours = min((row for row in group if row["ours"]), key=lambda row: row["median_ms"])
            best, *_, costliest = sorted(filter(is_baseline, group), key=lambda row: row["median_ms"])
            baselines = " | ".join(f"{row['provider']}, {digits(row['median_ms'])} ms" for row in (costliest, best))
            lines.append(
                f"| [{about}](benchmarks/results/{name}.csv): `{ours['provider']}` | {baselines} "
                f"| {digits(ours['median_ms'])} ms | {ours['best_baseline_over_this']:.3g}x "
                f"| {ours['of_ceiling']:.0%} |"
            )
    return lines


def is_baseline(row):
    """Neither ours nor the floor of a bare product."""
    return not row["ours"] and row["this_over_bare"] != 1.0


def gpu_lines():
    """What has run on a GPU and what has not, as Markdown."""
    backends()  # defines the ops
    seen = sorted({(run.gpu, run.file) for run in gpu.runs()})
    never = never_run_on_gpu()
    lines = [f"- Run on {name}: `benchmarks/results/{file}`." for name, file in seen]
    lines += [f"- Never run on a GPU, in {name}: {', '.join(f'`{op}`' for op in ops)}." for name, ops in never.items()]
    return lines


def replaced(text, begin, lines, end):
    """`text` with the lines put between the two markers, whatever stood there."""
    head, rest = text.split(begin)
    return "\n".join([head + begin, "", *lines, ""]) + end + rest.split(end)[1]


def main():
    PAGE.write_text(replaced(PAGE.read_text(), BEGIN, tables(), END))
    front = replaced(FRONT.read_text(), HEAD_BEGIN, headline(), HEAD_END)
    FRONT.write_text(replaced(front, GPU_BEGIN, gpu_lines(), GPU_END))
    print(f"written to {PAGE}, {FRONT} and {draw()}")


if __name__ == "__main__":
    main()
