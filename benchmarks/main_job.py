"""The main job: how much misalignment blocking removes, on finished demo runs.

    python -m benchmarks.main_job demo-robustness/organism*

Trains nothing: it collects what `lockin-fast demo` left in each run directory into one results file, a row per setting
with means over fine-tuning seeds, so that every figure that is quoted has a file to come from.
"""

import json
import sys
from pathlib import Path

from benchmarks.measure import write_csv

KEPT = ("lambda", "latents", "latent_count", "em", "em_std", "incoherence", "in_domain", "seconds_per_step")


def rows_of(run):
    summary = json.loads((run / "summary.json").read_text())
    seed = json.loads((run / "organism" / "organism.json").read_text())["seed"]
    for row in (summary["baseline"], *summary["means"]):
        yield {
            "organism": seed,
            "seeds": len(row["seeds"]),
            **{key: row[key] for key in KEPT},
            "cut": row.get("em_reduction"),
            "best_of_set": row == summary["best_per_set"].get(row["latents"]),
        }


def main(runs):
    if not runs:
        sys.exit("name the run directories of finished demos, for example demo")
    rows = [row for run in runs for row in rows_of(Path(run))]
    for row in rows:
        if row["best_of_set"]:
            print(
                f"  organism {row['organism']}  {row['latents']:<10} lambda {row['lambda']:>9,g}"
                f"  misaligned {row['em']:6.1%}  cut {row['cut']:6.1%}  in-domain {row['in_domain']:.1%}"
            )
    print(f" written to {write_csv('main_job', rows)}")


if __name__ == "__main__":
    main(sys.argv[1:])
