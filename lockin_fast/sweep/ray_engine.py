"""The trials of a sweep as tasks of a Ray cluster: many GPUs, many machines, one folder.

Every machine has to see the run's folder and the input files under the same paths. The driver, which holds the run's
lock, hands out batches and waits; a worker opens the inputs once, from the same files, and writes the folders of its
trials itself, exactly as they are written in one process. So nothing of size travels, and whatever is killed, worker or
driver, costs the trials that were running and no more.
"""

import functools
import logging
import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lockin_fast.config import Config
from lockin_fast.exam import Exam, open_exam
from lockin_fast.inputs import Inputs, open_inputs
from lockin_fast.progress import Progress
from lockin_fast.provenance import kernels
from lockin_fast.rundir import RunError
from lockin_fast.sweep.engines import Batch, run_batch, trials_failed
from lockin_fast.sweep_settings import RaySettings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts a cluster: nothing is sent anywhere
try:
    import ray
except ImportError as error:
    raise ImportError("sweep.engine: ray needs the package ray: pip install 'lockin-fast[ray]'") from error


def on_ray(
    missing: Sequence[Batch], config: Config, latents: Mapping[str, Path], exams: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Run each batch as a Ray task with `config.sweep.ray`; return what served the worker that finished last.

    Takes the cluster of RAY_ADDRESS, else one that runs on this machine, else starts one here for the while.
    latents, exams: the files of the sets and the names of the prompts that a worker opens. Raises RunError: before
    anything starts, where no machine has a trial's resources; TrialsFailed when all the others have finished, for
    trials that failed, or whose worker died more than max_retries times.
    """
    settings, total = config.sweep.ray, sum(len(batch.trials) for batch in missing)
    stage, finished = f"{total} trials on Ray", 0
    # The judge may be a module of the user's, which this process finds in its working directory.
    inputs = pickle.dumps((config, dict(latents), tuple(exams), [os.path.abspath(folder) for folder in sys.path]))
    with _cluster():
        gpus = _gpus_per_trial(settings)
        resources = {"num_cpus": settings.num_cpus, "num_gpus": gpus}
        # max_calls: a worker that has opened the inputs stays, where Ray would end one with a GPU after every task.
        task = ray.remote(**resources, max_retries=settings.max_retries, max_calls=0)(_work)
        running = {task.options(name=batch.stage).remote(batch, inputs): batch for batch in missing}
        failures, served = [], {}
        progress(stage, 0, total)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            batch = running.pop(done)
            try:
                served = ray.get(done)
            except ray.exceptions.RayError as error:
                failures.append((batch, error))
            finished += len(batch.trials)
            progress(stage, finished, total)
    if failures:
        causes = [(batch, _cause(error, tries=1 + settings.max_retries)) for batch, error in failures]
        raise trials_failed(causes, total) from failures[0][1]
    return served


def _work(batch: Batch, inputs: bytes) -> dict[str, Any]:
    """The task: run what is missing of the batch, with as many threads as cores are reserved for it."""
    cores = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cores)))
    # A trial is finished already where a worker died after writing it, or another one was only thought to be dead.
    if rest := batch.unfinished():
        try:
            run_batch(rest, *_opened(inputs), lambda done, total: None)
        except FileExistsError:
            if batch.unfinished():
                raise
    return kernels()


@functools.lru_cache(maxsize=1)
def _opened(inputs: bytes) -> tuple[Inputs, Exam]:
    """What trials need; opened once in the life of a worker, since a worker serves one sweep."""
    config, latents, exams, modules = pickle.loads(inputs)
    sys.path += [folder for folder in modules if folder not in sys.path]
    return open_inputs(config, latents), open_exam(config, *exams)


@contextmanager
def _cluster() -> Iterator[None]:
    """Ray, connected or started; as it was found afterwards."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except Exception as error:  # whatever Ray raises
        raise RunError(
            f"sweep.engine: Ray cannot be reached or started: {' '.join(str(error).split())}; look at RAY_ADDRESS "
            f"({os.environ.get('RAY_ADDRESS', 'not set')})"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _gpus_per_trial(settings: RaySettings) -> float:
    """The GPUs to reserve for a trial. Raises RunError unless some machine has them and the cores."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = settings.num_gpus
    if gpus is None:
        gpus = float(any(machine.get("GPU", 0) >= 1 for machine in machines))
    if not any(machine.get("CPU", 0) >= settings.num_cpus and machine.get("GPU", 0) >= gpus for machine in machines):
        largest = ", ".join(f"{m.get('CPU', 0):g} and {m.get('GPU', 0):g}" for m in machines)
        raise RunError(
            f"sweep.ray: a trial asks for {settings.num_cpus:g} cores and {gpus:g} GPUs, but the machines of the "
            f"cluster have {largest}; lower num_cpus or num_gpus, or add machines first"
        )
    return gpus


def _cause(error: Exception, tries: int) -> str:
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return f"its worker died in {tries} of {tries} tries"
    return str(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error)
