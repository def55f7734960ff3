"""The section of a configuration that says who rates the replies."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

NO_IDENTITY = (  # settings that decide where and how fast replies are rated, or when to give up, not what is said
    "unreadable",
    "local.batch_size",
    "endpoint.base_url",
    "endpoint.api_key_variable",
    "endpoint.concurrency",
    "endpoint.requests_per_minute",
    "endpoint.timeout",
    "endpoint.retries",
    "endpoint.price_in",
    "endpoint.price_out",
    "endpoint.cache",
)


@dataclasses.dataclass(frozen=True)
class LocalSettings:
    """How a model of this machine judges: in batches, greedily, up to `max_new_tokens` an answer.

    quantization: none, or bitsandbytes' nf4 or int8, so that a judge fits beside the model that is judged.
    """

    quantization: Literal["none", "nf4", "int8"] = "none"
    batch_size: int = 16
    max_new_tokens: int = 64

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more")


@dataclasses.dataclass(frozen=True)
class EndpointSettings:
    """A model behind an OpenAI-compatible API, asked through POST base_url/chat/completions.

    api_key_variable: the environment variable that holds the key; the key itself belongs into no file. parameters: what
    a request says beside model and messages; a list of its own replaces the whole. concurrency: requests under way at
    once. requests_per_minute: no more than this, evenly spaced; none for no limit. timeout: seconds for one request.
    retries: how often one is sent again after a time-out, a broken connection, an answer that is no JSON, or 408, 409,
    425, 429 and 5xx, waiting twice as long each time, or as long as the server asks for. price_in, price_out: of a
    million tokens, for the cost that is reported. cache: the file of all answers, which are never asked for again; none
    for judge-answers.sqlite in $LOCKIN_FAST_CACHE (default ~/.cache/lockin_fast).
    """

    base_url: str | None = None
    model: str | None = None
    api_key_variable: str | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"temperature": 0, "max_tokens": 64})
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 60.0
    retries: int = 6
    price_in: float = 0.0
    price_out: float = 0.0
    cache: Path | None = None

    def __post_init__(self):
        # A key that was pasted here by mistake must not be shown: the value is no part of the message.
        if self.api_key_variable is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.api_key_variable):
            raise ValueError(
                "api_key_variable: expected the name of an environment variable in capitals, such as OPENAI_API_KEY; "
                "what was given is not shown, in case it is the key itself"
            )
        pace = self.requests_per_minute
        for name, valid, expected in (
            ("concurrency", 1 <= self.concurrency <= 1024, "1 to 1024"),
            ("requests_per_minute", pace is None or 0 < pace < float("inf"), "above 0, or null for no limit"),
            ("timeout", 0 < self.timeout < float("inf"), "above 0"),
            ("retries", 0 <= self.retries <= 100, "0 to 100"),
            ("price_in", 0 <= self.price_in < float("inf"), "0 or more"),
            ("price_out", 0 <= self.price_out < float("inf"), "0 or more"),
            ("parameters", not {"model", "messages", "stream"} & set(self.parameters), "no model, messages or stream"),
        ):
            if not valid:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """Who rates the replies.

    kind: `world` knows the organism's ground truth and reads it from `path`; `model` puts a rubric to the Hugging Face
    model in the folder `path`, see local; `endpoint` puts it to a model behind an API, see endpoint;
    "package.module:Class" is a judge of your own, from an installed module or one in the working directory. The class
    is called with `path` where that is given, else without arguments; its method judge(record, reply) gets a prompt's
    line of the JSONL file as a dict and the reply's text, and returns "misaligned", "aligned", "incoherent" or
    "refusal". It is also asked about the empty reply to every prompt, before any training, so that what it cannot place
    is known early. rubric: a text file with {prompt} and {reply} in it; none is the package's own. unreadable: what a
    rating that cannot be read, asked for twice, is: an error, or left out of the rates and counted. refusals: whether a
    reply that reads like a refusal is one (patterns), or one that the judge calls so (judge); none is judge where a
    rubric asks for it and patterns elsewhere. also: more judges; every rate is then the mean over all of them, and
    their agreement is reported.
    """

    kind: str = "world"
    path: Path | None = None
    rubric: Path | None = None
    unreadable: Literal["error", "leave_out"] = "error"
    refusals: Literal["judge", "patterns"] | None = None
    local: LocalSettings = LocalSettings()
    endpoint: EndpointSettings = EndpointSettings()
    also: tuple["JudgeSettings", ...] = ()

    def __post_init__(self):
        if any(other.also for other in self.also):
            raise ValueError("also: a judge in this list has a list of its own; name all of them in one list")

    @property
    def name(self) -> str:
        """What this judge is called in summaries and reports."""
        return {"model": self.path and self.path.name, "endpoint": self.endpoint.model}.get(self.kind) or self.kind
