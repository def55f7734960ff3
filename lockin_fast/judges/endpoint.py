"""A model behind an OpenAI-compatible API as a judge."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

from lockin_fast.judge_settings import EndpointSettings, JudgeSettings
from lockin_fast.judges.answers import Answers, default_path, key_of
from lockin_fast.judges.rating import JudgeError
from lockin_fast.judges.rubric import Messages, Rubric, RubricJudge
from lockin_fast.typed_mapping import ConfigError

MILLION = 1e6


def open_endpoint_judge(settings: JudgeSettings, run: str = "") -> RubricJudge:
    """The judge that puts the rubric to `settings.endpoint`, answers counted as paid for by `run`.

    One short question is asked now, unless its answer is on disk, so that a wrong address, key or model is known before
    any work. Raises ConfigError for settings that cannot be right, and for an endpoint that does not answer.
    """
    rubric = Rubric.load(settings.rubric)
    endpoint = Endpoint(settings.endpoint, run)
    try:
        endpoint.ask([rubric.messages({"messages": [{"role": "user", "content": "Hello"}]}, "Hello, how can I help?")])
    except JudgeError as error:
        raise ConfigError(str(error)) from error
    judge = RubricJudge(
        settings.name,
        rubric,
        endpoint.ask,
        leave_out=settings.unreadable == "leave_out",
        patterns=settings.refusals == "patterns",
    )
    judge.cost = endpoint.cost
    return judge


class Endpoint:
    """Answers conversations through the API, several at a time, each of them once and for all."""

    def __init__(self, settings: EndpointSettings, run: str):
        for name in ("base_url", "model"):
            if not getattr(settings, name):
                raise ConfigError(f"judge.endpoint.{name}: missing, and judge.kind: endpoint needs it")
        _check_url(settings.base_url)
        self.settings, key = settings, _key(settings.api_key_variable)
        from lockin_fast.judges.client import Client  # which needs the extra

        self._answers, self._client = Answers(settings.cache or default_path(), run), Client(settings, key)

    def ask(self, conversations: list[Messages]) -> list[str]:
        """One answer to each conversation: from disk, or from the endpoint and then on disk. Raises JudgeError.

        What has been answered when one request fails for good, or the process is killed, is kept.
        """
        bodies = [
            {**self.settings.parameters, "model": self.settings.model, "messages": messages}
            for messages in conversations
        ]
        keys = [key_of(self.settings.base_url, body) for body in bodies]
        found = self._answers.find(keys)
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in found}
        if missing:
            found |= self._asked(missing)
        return [found[key] for key in keys]

    def cost(self) -> dict[str, Any]:
        """What this run has paid for so far, in requests, tokens and, by the prices of the settings, money."""
        paid, settings = self._answers.paid(self.settings.model), self.settings
        cost = (paid.tokens_in * settings.price_in + paid.tokens_out * settings.price_out) / MILLION
        return paid._asdict() | {"cost": cost}

    def _asked(self, missing: dict[str, dict]) -> dict[str, str]:
        stopped = threading.Event()

        def ask(key: str, body: dict) -> tuple[str, str]:
            answer = self._client.complete(body, stopped)
            self._answers.keep(key, self.settings.model, answer)
            return key, answer.text

        with ThreadPoolExecutor(min(self.settings.concurrency, len(missing))) as pool:
            under_way = [pool.submit(ask, key, body) for key, body in missing.items()]
            try:
                return dict(future.result() for future in as_completed(under_way))
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _check_url(url: str) -> None:
    """Raise ConfigError unless `url` is an address of a web server, without a name and password in it."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid, parts = False, None
    if valid and parts.username is None and not parts.query and not parts.fragment:
        return
    if parts is not None and parts.username is not None:
        raise ConfigError("judge.endpoint.base_url: holds a user name or password; name a variable that holds the key")
    raise ConfigError(f"judge.endpoint.base_url: got {url!r}, expected an address such as https://api.openai.com/v1")


def _key(variable: str | None) -> str | None:
    """The key in the environment variable, None without one. Raises ConfigError when it is not set."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"judge.endpoint.api_key_variable: the environment variable {variable} is not set")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"judge.endpoint.api_key_variable: {variable} holds no key: it has spaces or odd signs")
    return key
