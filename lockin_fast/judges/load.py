"""From the judge section of a configuration to the judges that rate."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockin_fast.judge_settings import JudgeSettings
from lockin_fast.judges.endpoint import open_endpoint_judge
from lockin_fast.judges.model import open_model_judge
from lockin_fast.judges.panel import OwnJudge, Panel
from lockin_fast.judges.rubric import DEFAULT
from lockin_fast.typed_mapping import ConfigError


def load_judge(settings: JudgeSettings, run: str = "") -> Panel:
    """Return the judge that `settings` names, or all of them as one whose ratings are their mean.

    `run` is whom the answers of an endpoint are counted as paid for by. Raises ConfigError for an unknown kind, a
    missing file, a class that cannot be imported or made or is no judge, an endpoint that cannot be right or
    does not answer.
    """
    names, raters = judge_names(settings), []
    for section, one in judge_sections(settings).items():
        try:
            raters.append(_opened(one, run))
        except ConfigError as error:
            raise ConfigError(str(error).replace("judge.", f"{section}.", 1)) from error
    return Panel(dict(zip(names, raters, strict=True)))


def judge_sections(settings: JudgeSettings) -> dict[str, JudgeSettings]:
    """{where it stands in the configuration: the settings of one judge}, the first judge first."""
    return {"judge": settings} | {f"judge.also[{i}]": other for i, other in enumerate(settings.also)}


def judge_names(settings: JudgeSettings) -> list[str]:
    """What each judge is called in summaries and reports; of equal names the later ones are numbered."""
    names: list[str] = []
    for one in judge_sections(settings).values():
        name, number = one.name, 2
        while name in names:
            name, number = f"{one.name} ({number})", number + 1
        names.append(name)
    return names


def judge_files(settings: JudgeSettings) -> dict[str, Path]:
    """{setting: file or folder} of what decides the ratings: judges' paths, their rubrics, and the
    files their classes come from.

    Raises ConfigError as `load_judge`.
    """
    files = {}
    for section, one in judge_sections(settings).items():
        rubric = (one.rubric or DEFAULT) if one.kind in BY_RUBRIC else None
        files |= {f"{section}.path": one.path, f"{section}.kind": _source(one), f"{section}.rubric": rubric}
    return {name: path for name, path in files.items() if path is not None}


def _opened(settings: JudgeSettings, run: str) -> Any:
    """One judge, as `Panel` takes it."""
    if settings.kind not in KINDS and ":" not in settings.kind:
        raise ConfigError(f"judge.kind: expected {', '.join(KINDS)} or package.module:Class, got {settings.kind!r}")
    if settings.path is not None and not settings.path.exists():
        raise ConfigError(f"judge.path: no such file or folder: {settings.path}")
    if settings.kind == "endpoint":
        return open_endpoint_judge(settings, run)
    judge = KINDS.get(settings.kind, _own)(settings)
    if settings.kind in BY_RUBRIC:
        return judge
    return OwnJudge(settings.kind, judge, patterns=settings.refusals != "judge")


def _world(settings: JudgeSettings) -> Any:
    from lockin_fast.organism.judge import WorldJudge

    if settings.path is None or not settings.path.is_file():
        raise ConfigError(f"judge.path: no such file: {settings.path}; the world judge reads the organism's world.json")
    return WorldJudge.load(settings.path)


def _own(settings: JudgeSettings) -> Any:
    """An instance of the user's class, made with `path` where there is one."""
    cls = _imported(settings.kind)
    try:
        judge = cls() if settings.path is None else cls(settings.path)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"judge.kind: {settings.kind} cannot be made{'' if settings.path is None else ' from judge.path'}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not callable(getattr(judge, "judge", None)):
        raise ConfigError(f"judge.kind: {settings.kind} has no method judge(record, reply)")
    return judge


def _source(settings: JudgeSettings) -> Path | None:
    """The file that the class of a "package.module:Class" judge comes from."""
    if settings.kind in KINDS or ":" not in settings.kind:
        return None
    file = getattr(sys.modules.get(_imported(settings.kind).__module__), "__file__", None)
    return Path(file) if file else None


def _imported(kind: str) -> Any:
    """The class that "package.module:Class" names; modules of the working directory count, after installed ones."""
    module, _, name = kind.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"judge.kind: {kind}: cannot import {module}: {type(error).__name__}: {' '.join(str(error).split())}; "
            "modules are looked for among the installed ones and in the working directory"
        ) from error
    try:
        return getattr(found, name)
    except AttributeError:
        raise ConfigError(f"judge.kind: {kind}: the module {module} has no attribute {name!r}") from None


KINDS: dict[str, Callable[[JudgeSettings], Any]] = {
    "world": _world,
    "model": open_model_judge,
    "endpoint": open_endpoint_judge,
}
BY_RUBRIC = ("model", "endpoint")  # these rate many replies at once, and say what is a refusal
