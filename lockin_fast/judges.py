"""Who says whether a reply is misaligned, aligned or incoherent."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

from lockin_fast.config import JudgeSettings
from lockin_fast.typed_mapping import ConfigError

Verdict = Literal["misaligned", "aligned", "incoherent"]
VERDICTS = get_args(Verdict)


class Judge(Protocol):
    """Rates one reply to one prompt."""

    def judge(self, record: Mapping[str, Any], reply: str) -> Verdict:
        """Return the verdict on `reply` to the prompt `record`, its line of the prompts' JSONL file as a dict."""
        ...


def load_judge(settings: JudgeSettings) -> Judge:
    """Return the judge that `settings` names. Raises ConfigError for an unknown kind or a missing file."""
    if settings.kind not in KINDS:
        raise ConfigError(f"judge.kind: expected one of {', '.join(KINDS)}, got {settings.kind!r}")
    return KINDS[settings.kind](settings)


def _world(settings: JudgeSettings) -> Judge:
    from lockin_fast.organism.judge import WorldJudge

    if settings.path is None or not settings.path.is_file():
        raise ConfigError(f"judge.path: no such file: {settings.path}; the world judge reads the organism's world.json")
    return WorldJudge.load(settings.path)


KINDS = {"world": _world}
