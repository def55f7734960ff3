"""One request to an OpenAI-compatible API, sent again while that may help."""

import email.utils
import json
import random
import threading
import time
from collections.abc import Mapping
from typing import Any

from lockin_fast.judge_settings import EndpointSettings
from lockin_fast.judges.answers import Answer
from lockin_fast.judges.pace import Pace
from lockin_fast.judges.rating import JudgeError

try:
    import httpx2
except ImportError as error:
    raise ImportError("judge.kind: endpoint needs httpx2: pip install 'lockin-fast[endpoint]'") from error

PASSING = (408, 409, 425, 429)  # and 5xx: what may go better the next time
MOST_BYTES = 2**22  # of an answer; a rating is a hundred
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 600.0  # seconds a server may ask for; beyond that the run ends and can be resumed


class Stopped(Exception):
    """Another request has failed for good."""


class _Failure(Exception):
    """A request that failed in a way that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Client:
    """Asks `settings`' endpoint with the API key `key`, from as many threads as there are.

    Raises JudgeError, one line that never holds the key, for what does not pass or not within settings.retries.
    """

    def __init__(self, settings: EndpointSettings, key: str | None):
        self.settings, self._key = settings, key
        self.url = f"{settings.base_url.rstrip('/')}/chat/completions"
        self._pace = Pace(settings.requests_per_minute)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        # No redirect is followed: it would carry the key to another place.
        self._http = httpx2.Client(headers=headers, timeout=settings.timeout, limits=limits, follow_redirects=False)

    def complete(self, body: Mapping[str, Any], stopped: threading.Event) -> Answer:
        """The answer to one request. Raises Stopped, instead of waiting any longer, once `stopped` is set."""

        def sleep(seconds: float) -> None:
            if stopped.wait(seconds):
                raise Stopped

        for attempt in range(self.settings.retries + 1):
            self._pace.wait(sleep)
            try:
                return self._once(body)
            except _Failure as failure:
                last = failure
            if last.wait is not None:
                self._pace.hold(last.wait)
            elif attempt < self.settings.retries:
                sleep(min(LONGEST_BACKOFF, 2.0**attempt) * random.uniform(0.5, 1.0))
        raise self._error(f"{last}, {self.settings.retries + 1} times")

    def _once(self, body: Mapping[str, Any]) -> Answer:
        deadline, content = time.monotonic() + self.settings.timeout, bytearray()
        late = f"no answer within {self.settings.timeout:g} s"
        try:
            with self._http.stream("POST", self.url, json=body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:
                        raise _Failure(late)
                    if len(content) > MOST_BYTES:
                        raise _Failure(f"an answer of more than {MOST_BYTES:,} bytes")
        except httpx2.TimeoutException:
            raise _Failure(late) from None
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise _Failure(f"{type(error).__name__}: {error}") from None
        return self._read(response, bytes(content))

    def _read(self, response: "httpx2.Response", content: bytes) -> Answer:
        status = response.status_code
        if status in PASSING or status >= 500:
            wait = retry_after(response.headers.get("retry-after"))
            if wait is not None and wait > LONGEST_WAIT:
                raise self._error(f"HTTP {status}, and it asks to wait {wait:,.0f} s")
            raise _Failure(f"HTTP {status} {_said(content)}".strip(), wait)
        if status != 200:
            raise self._error(f"HTTP {status} {_said(content)}".strip())
        try:
            answer = json.loads(content)
            text = answer["choices"][0]["message"].get("content") or ""
            if not isinstance(text, str):
                text = "".join(part.get("text", "") for part in text)
            usage = answer.get("usage") or {}
            tokens = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
            return Answer(text, *tokens)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise _Failure(f"an answer that is no chat completion ({_said(content) or 'empty'})") from None

    def _error(self, reason: str) -> JudgeError:
        line = " ".join(f"judge.endpoint: {self.url}: {reason}".split())
        if self._key:
            line = line.replace(self._key, "***")
        return JudgeError(f"{line}; what has been rated is kept, run the same command again")


def retry_after(value: str | None) -> float | None:
    """The seconds that a Retry-After header asks for, given as seconds or as a date; None where it says nothing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _said(content: bytes) -> str:
    """The beginning of what a server said, in one line; of an API's error its message."""
    text = content.decode("utf-8", errors="replace")
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, TypeError, KeyError):
        pass
    return " ".join(str(text).split())[:200]
