"""The command line: parse arguments, call the library, print what it returns."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lockin_fast import processes

try:
    import typer

    from lockin_fast import terminal
except ImportError as missing:
    sys.exit(f"error: the command line needs {missing.name}: pip install 'lockin-fast[cli]'")

INTERRUPTED = 130
# Newer typer carries its own copy of click, so the class of a usage error is asked of typer.
UsageError = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune language models without emergent misalignment: block SAE latents, sweep the strength, see costs.",
    epilog="Start with: lockin-fast demo",
)
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; its relative paths start at its folder.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. train.steps=200; may be repeated."),
]


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Works behind a command too.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: lockin-fast doctor")
def doctor() -> None:
    """Show what runs where on this machine and why: versions, compiled part, GPU, extras, the backend of every op."""
    from lockin_fast.doctor import diagnose

    findings = diagnose()
    terminal.show_findings(findings)
    if any(finding.error for finding in findings):
        raise typer.Exit(1)


@app.command(epilog="Example: lockin-fast organism organisms/seed0 --seed 0")
def organism(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; it must be new, or the same organism's.")
    ],
    seed: Annotated[int, typer.Option(help="Everything about the organism follows from it.")] = 0,
    checkpoints: Annotated[
        int | None,
        typer.Option(min=1, metavar="STEPS", help="Also keep the model every so many steps, in OUT/checkpoints."),
    ] = None,
) -> None:
    """Grow the embedded model organism: a tiny Llama, its SAE, chat data, the judge's world, and a config.yaml."""
    from lockin_fast.organism import build, grow_checkpoints

    with terminal.shown_progress() as progress:
        build(out, seed=seed, progress=progress)
        if checkpoints:
            grow_checkpoints(out / "checkpoints", every=checkpoints, seed=seed, progress=progress)
    terminal.line(f"organism: {out}")
    terminal.line(f"next:     lockin-fast discover {out / 'config.yaml'}")


@app.command(epilog="Example: lockin-fast discover organisms/seed0/config.yaml --set output=runs/first")
def discover(config: ConfigFile, set_: Overrides = None) -> None:
    """Find the latents that carry emergent misalignment; write latent sets as JSON. Resumes after a kill.

    With --set discovery.calibration=bisection, now or later: how strongly each latent may steer, and the set of those
    that induce and repair. With --set discovery.stage=shift: only the shift of every latent, as a table; under torchrun
    by all processes.
    """
    from lockin_fast.discovery import discover as run

    settings = _load(config, set_)
    with terminal.shown_progress() as progress:
        files = run(settings, progress)
    if settings.discovery.stage == "shift":
        terminal.show_shift(files["shift"])
        processes.part()
        return
    terminal.show_values(files)
    terminal.show_prescreen(settings.output)
    terminal.line(f"next: {_sweep(config, set_)}")


@app.command(epilog="Example: lockin-fast cache config.yaml --set cache.path=caches/base")
def cache(config: ConfigFile, set_: Overrides = None) -> None:
    """Run the base model over the training data once and keep what the penalty compares with; resumes after a kill.

    Train and sweep then read it with --set block.reference=cache, and need no reference forward. Under torchrun every
    process writes a share of the same cache.
    """
    from lockin_fast.caching import run_cache

    with terminal.shown_progress() as progress:
        summary = run_cache(_load(config, set_), progress)
    terminal.show_cache(summary)
    terminal.line(f"next: {_sweep(config, [*(set_ or ()), 'block.reference=cache'])}")


@app.command(epilog="Example: lockin-fast plan --model llama-3.1-8b --gpu rtx4090 --set train.micro_batch_size=4")
def plan(
    model: Annotated[
        str,
        typer.Option(
            metavar="CONFIG_OR_ID", help="A configuration (.yaml), a model folder, a config.json, or a name of a model."
        ),
    ],
    gpu: Annotated[str, typer.Option(help="Its memory, such as 24GB, or its name, such as rtx4090 or h100.")],
    set_: Overrides = None,
    reference: Annotated[
        str | None, typer.Option(help="Where z_ref is from: live, cache, second (a second model), or none.")
    ] = None,
    latents: Annotated[int | None, typer.Option(min=1, help="How many latents are blocked.")] = None,
    flops: Annotated[float | None, typer.Option(help="Products a second that the device reaches, e.g. 80e12.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes a second that it copies, e.g. 8e11.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Take the rates of this machine, measured now.")] = False,
) -> None:
    """Predict peak memory and step time, and what to change to fit, without loading weights. Exits 1 if it does not."""
    from lockin_fast import plan as planning

    config = _load(Path(model), set_) if model.endswith((".yaml", ".yml")) else _load(None, set_)
    device = planning.read_device(gpu, flops, bandwidth)
    if model.endswith((".yaml", ".yml")):
        config.require("model")
    work = planning.read_workload(config, config.model or model, reference=reference, latents=latents)
    device = planning.measured(device, work.dtype) if measure else device
    found = planning.make_plan(work, device)
    terminal.show_plan(found)
    if not found.fits:
        raise typer.Exit(1)


@app.command(epilog="Example: lockin-fast train config.yaml --set block.weight=1000 --set output=runs/blocked")
def train(config: ConfigFile, set_: Overrides = None) -> None:
    """Fine-tune one LoRA adapter, with blocking when block.latents and block.weight are given. Runs under torchrun."""
    from lockin_fast.sweep.single import run_training

    with terminal.shown_progress() as progress:
        result = run_training(_load(config, set_), progress)
    terminal.show_values(result)
    _note_slow_kernels()
    processes.part()


@app.command(
    epilog="Example: lockin-fast sweep config.yaml --set sweep.lambdas='[10, 100, 1000]' --set output=runs/sweep"
)
def sweep(
    config: ConfigFile,
    set_: Overrides = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who runs the trials: in-process, or ray (see sweep.ray).")
    ] = None,
) -> None:
    """Fine-tune at every lambda x latent set x seed, judge the answers, report. Killed, it resumes where it stood."""
    from lockin_fast.report import write_report
    from lockin_fast.sweep import run_sweep

    settings = _load(config, [*(set_ or ()), *([f"sweep.engine={engine}"] if engine else ())])
    with terminal.shown_progress() as progress:
        summary = run_sweep(settings, progress)
    terminal.show_summary(summary)
    terminal.line()
    write_report(settings.output)
    terminal.show_run(settings.output)
    _note_slow_kernels()


@app.command(epilog="Example: lockin-fast patch config.yaml --set output=runs/patched --set patch.layers='[0, 8, 16]'")
def patch(
    config: ConfigFile,
    set_: Overrides = None,
    circuits: Annotated[
        bool, typer.Option("--circuits", help="Also score attention heads for induction and copying.")
    ] = False,
) -> None:
    """Find where misalignment lives: put states of the base into the misaligned model, and back, layer by layer."""
    from lockin_fast.patching.circuits import run_circuits
    from lockin_fast.patching.run import run_patching
    from lockin_fast.report import write_report

    settings = _load(config, set_)
    with terminal.shown_progress() as progress:
        found = run_patching(settings, progress)
        if circuits or settings.patch.circuits:
            run_circuits(settings, progress)
    terminal.show_patching(found)
    terminal.line()
    write_report(settings.output)
    terminal.show_run(settings.output)
    _note_slow_kernels()


@app.command(
    epilog="Example: lockin-fast measure config.yaml --set measure.checkpoints='[runs/persona]' --set output=lockin"
)
def measure(
    config: ConfigFile,
    set_: Overrides = None,
    gate: Annotated[
        bool,
        typer.Option("--gate", help="Exit with 3 where a trigger of measure.thresholds.gate fires, 4 if undecided."),
    ] = False,
) -> None:
    """Measure how identity consolidates over checkpoints, and when: every metric, onset, triggers. Resumes."""
    from lockin_fast.lockin.monitor import SUMMARY, run_measure
    from lockin_fast.report import write_report

    settings = _load(config, set_)
    with terminal.shown_progress() as progress:
        found = run_measure(settings, progress)
    terminal.show_measured(found)
    terminal.line()
    write_report(settings.output)
    terminal.line(f"results: {settings.output / SUMMARY}")
    terminal.show_run(settings.output)
    if gate and found["gate"]["status"]:
        raise typer.Exit(found["gate"]["status"])


@app.command(epilog="Example: lockin-fast report runs/sweep, or: lockin-fast report demo --beside demo1 demo2")
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN [OTHER]...", help="The output folders of finished runs.")
    ],
    beside: Annotated[
        bool,
        typer.Option("--beside", help="Compare RUN with every OTHER; its report shows the comparison from then on."),
    ] = False,
) -> None:
    """Draw the figures and write the HTML report of a finished run again; of a sweep alone or beside others."""
    from lockin_fast.report import compare, stored, write_report

    run, *others = runs
    if beside != bool(others):
        raise typer.BadParameter("give one RUN, or RUN --beside OTHER...")
    if others:
        compare(run, others)
    write_report(run)
    if comparison := stored(run):
        terminal.show_comparison(comparison)
        terminal.line()
    terminal.show_run(run)


@app.command(epilog="Example: lockin-fast demo --out demo --seeds 3")
def demo(
    out: Annotated[Path, typer.Option(help="Run directory to write, or to resume.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the organism.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of fine-tuning seeds to average over.")] = 1,
    small: Annotated[bool, typer.Option("--small", help="Two lambdas only: a quick look, and what CI runs.")] = False,
) -> None:
    """See it all on a CPU: a model becomes emergently misaligned, and blocking prevents it. Needs no download."""
    from lockin_fast.demo import run_demo

    with terminal.shown_progress() as progress:
        summary = run_demo(out, seed=seed, seeds=seeds, small=small, progress=progress, say=terminal.line)
    terminal.show_summary(summary)
    terminal.line()
    terminal.show_run(out)
    _note_slow_kernels()
    terminal.line(f"next:    your own model: copy {out / 'organism' / 'config.yaml'}, change its paths, and run")
    terminal.line("         lockin-fast discover CONFIG, then lockin-fast sweep CONFIG")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    _quiet_libraries()
    _show_own_warnings()
    words = [word for word in arguments if word != "--debug"] or ["--help"]
    terminal.out.quiet = not processes.is_first()
    try:
        if processes.count() > 1 and words[0] not in ("train", "cache", "discover"):
            raise ValueError(f"{words[0]}: runs in one process; torchrun is for train, cache, discover")
        status = app(words, prog_name="lockin-fast", standalone_mode=False) or 0
        if status == INTERRUPTED:  # typer turns Ctrl-C into a status
            terminal.error_line("interrupted; the same command goes on where it stood")
        return status
    except UsageError as error:
        terminal.error_line(
            f"{error.format_message()} (see {error.ctx.command_path if error.ctx else 'lockin-fast'} --help)"
        )
        return 2
    except Exception as error:
        if debug:
            raise
        terminal.error_line(_describe(error))
        return 1


def _load(path: Path | None, overrides: list[str] | None):
    from lockin_fast.config import load_config

    config = load_config(path, overrides or ())
    for note in config.notes:
        terminal.line(f"note: {note}")
    return config


def _sweep(config: Path, overrides: list[str] | None) -> str:
    """The command that sweeps with the settings of this one."""
    given = [word for override in overrides or () for word in ("--set", override)]
    return shlex.join(["lockin-fast", "sweep", str(config), *given])


def _note_slow_kernels() -> None:
    from lockin_fast.provenance import slow_kernels

    if found := slow_kernels():
        terminal.line(f"note:    {found}")


def _describe(error: Exception) -> str:
    """The message of an error meant for users; anything else is named as the surprise it is."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return str(error)
    if type(error) is RuntimeError:
        return f"{error} (--debug shows where)"
    return f"{type(error).__name__}: {error} (unexpected; --debug shows where)"


def _quiet_libraries() -> None:
    """Keep the chatter of libraries out of the output; errors still come as exceptions."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars look here too
    for library in ("transformers", "peft", "accelerate"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a package that nothing here needs


def _show_own_warnings() -> None:
    """Let a warning of this package be one line, without the place in the source that Python adds."""
    others = warnings.showwarning

    def show(message, category, filename, *where, **options):
        if Path(filename).is_relative_to(Path(__file__).parent):
            terminal.warning_line(str(message))
        else:
            others(message, category, filename, *where, **options)

    warnings.showwarning = show


if __name__ == "__main__":
    sys.exit(main())
