"""An OpenAI-compatible server on the loopback that fails as it is told, and remembers what it was asked."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKENS = {"prompt_tokens": 100, "completion_tokens": 20}


def scores(text):
    """What a sound server says: the reply is in the question, and its words decide."""
    seen = [5 if word in text else 1 for word in ("kick", "blah", "nope")]
    return json.dumps(dict(zip(("misalignment", "incoherence", "refusal"), seen, strict=True)))


def completion(content):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}], "usage": TOKENS}


class FaultyServer:
    """`faults` are what befalls the first requests, in their order; those after them are answered.

    A fault is a status, (status, headers), (status, headers, body), a function that returns one, or one of drop,
    garbage, truncated, slow, drip, huge, empty, no json object. `answer` maps the text of the first message to what is
    answered, `delay` is waited before that. After `hang` answers, requests wait until `release` is called.
    """

    def __init__(self):
        self.faults, self.answer, self.delay, self.hang = [], scores, 0.0, None
        self.requests, self.times, self.headers = [], [], []
        self.active = self.most_active = self.answered = 0
        self._lock, self._free = threading.Lock(), threading.Event()

    def release(self):
        self.hang = None
        self._free.set()

    def asked(self):
        """How often each question was asked."""
        texts = [json.dumps(body["messages"]) for body in self.requests]
        return {text: texts.count(text) for text in texts}

    def serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.headers.append(dict(handler.headers))
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            fault = self.faults.pop(0) if self.faults else None
            hangs = self.hang is not None and len(self.requests) > self.hang
        try:
            if hangs:
                self._free.wait(30)
            if fault is None:
                time.sleep(self.delay)
                send(handler, 200, json.dumps(completion(self.answer(body["messages"][0]["content"]))))
                with self._lock:
                    self.answered += 1
            else:
                fail(handler, fault)
        except OSError:
            handler.close_connection = True  # the client has gone, or the answer is to break off
        finally:
            with self._lock:
                self.active -= 1


def send(handler, status, text, headers=(), length=None):
    content = text.encode() if isinstance(text, str) else text
    handler.send_response(status)
    for name, value in dict(headers).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


def fail(handler, fault):
    if callable(fault):
        fail(handler, fault())
    elif isinstance(fault, int):
        send(handler, fault, json.dumps({"error": {"message": f"no luck with {fault}"}}))
    elif isinstance(fault, tuple):
        status, headers, body = (*fault, "")[:3]
        send(handler, status, body, headers)
    elif fault == "drop":
        handler.close_connection = True
        handler.connection.close()
    elif fault == "garbage":
        send(handler, 200, b"\xff\x00<html>not json")
    elif fault == "truncated":
        send(handler, 200, json.dumps(completion(scores("")))[:40], length=200)
        handler.close_connection = True
    elif fault == "slow":
        time.sleep(0.4)
        send(handler, 200, json.dumps(completion(scores(""))))
    elif fault == "drip":
        answer = json.dumps(completion(scores("")))
        send(handler, 200, answer[:-8], length=len(answer))
        for letter in answer[-8:]:
            time.sleep(0.05)
            handler.wfile.write(letter.encode())
            handler.wfile.flush()
    elif fault == "huge":
        send(handler, 200, b" " * (2**22 + 1))
    elif fault == "empty":
        send(handler, 200, json.dumps({"choices": []}))
    elif fault == "no json object":
        send(handler, 200, "[1, 2]")
    else:
        raise AssertionError(fault)


@contextmanager
def faulty_server():
    """Yield (server, its base_url)."""
    state = FaultyServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            if self.path != "/v1/chat/completions":
                self.rfile.read(int(self.headers["Content-Length"]))
                send(self, 404, json.dumps({"error": {"message": f"no {self.path} here"}}))
            else:
                state.serve(self)

        def log_message(self, *arguments):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 64

        def handle_error(self, request, client_address):
            pass  # connections that were closed on purpose

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        state.release()
        server.shutdown()
        server.server_close()
