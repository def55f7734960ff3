"""Who says whether a reply is misaligned, aligned or incoherent."""

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from lockin_fast.settings import JudgeSettings
from lockin_fast.typed_mapping import ConfigError

Verdict = Literal["misaligned", "aligned", "incoherent"]
VERDICTS = get_args(Verdict)


class Judge(Protocol):
    """Rates one reply to one prompt."""

    def judge(self, record: Mapping[str, Any], reply: str) -> Verdict:
        """Return the verdict on `reply` to the prompt `record`, its line of the prompts' JSONL file as a dict."""
        ...


def load_judge(settings: JudgeSettings) -> Judge:
    """Return the judge that `settings` names; a verdict of it that is none of the three is a ValueError.

    Raises ConfigError for an unknown kind, a missing file, or a class that cannot be imported or made or is no judge.
    """
    if settings.kind not in KINDS and ":" not in settings.kind:
        raise ConfigError(f"judge.kind: expected {', '.join(KINDS)} or package.module:Class, got {settings.kind!r}")
    if settings.path is not None and not settings.path.exists():
        raise ConfigError(f"judge.path: no such file or folder: {settings.path}")
    return _Checked(settings.kind, KINDS.get(settings.kind, _own)(settings))


def judge_source(settings: JudgeSettings) -> Path | None:
    """The file that the class of a "package.module:Class" judge comes from. Raises ConfigError as `load_judge`."""
    if settings.kind in KINDS or ":" not in settings.kind:
        return None
    file = getattr(sys.modules.get(_imported(settings.kind).__module__), "__file__", None)
    return Path(file) if file else None


class _Checked:
    """A judge whose verdicts are sure to be verdicts."""

    def __init__(self, kind: str, judge: Judge):
        self.kind, self.inner = kind, judge

    def judge(self, record: Mapping[str, Any], reply: str) -> Verdict:
        verdict = self.inner.judge(record, reply)
        if verdict not in VERDICTS:
            raise ValueError(
                f"judge.kind: {self.kind} gave the verdict {verdict!r} on the reply {reply[:80]!r}; "
                f"expected one of {', '.join(VERDICTS)}"
            )
        return verdict


def _world(settings: JudgeSettings) -> Judge:
    from lockin_fast.organism.judge import WorldJudge

    if settings.path is None or not settings.path.is_file():
        raise ConfigError(f"judge.path: no such file: {settings.path}; the world judge reads the organism's world.json")
    return WorldJudge.load(settings.path)


def _own(settings: JudgeSettings) -> Judge:
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


KINDS = {"world": _world}
