"""A server of language models over real HTTP that speaks as vLLM, llama.cpp or Ollama do, faults included.

Its model is a bigram of words whose likelihoods anyone can compute (`logprob`). Constraints are really applied: regular
expressions, GBNF and JSON schemas are written out in full, and the likeliest text is taken, or one drawn.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from re import _parser  # the standard library's own reading of expressions

MODEL = "bigram"
_TOKEN = re.compile(r" ?\w+|\s|[^\w\s]")
LIKED = {(" is", " blue"): 8.0, (" the", " red"): 5.0, (" the", " green"): 4.0, ("put", " the"): 6.0, (":", " A"): 3.0}


def cut(text):
    return _TOKEN.findall(text)


@functools.cache
def weight(before, token):
    """In (0.5, 1.5), times how much the pair is liked."""
    number = int.from_bytes(hashlib.sha256(f"{before}|{token}".encode()).digest()[:4], "big")
    return (0.5 + number / 2**32) * LIKED.get((before, token), 1.0)


def steps(text):
    """Tokens with their log-probabilities; the first has none. A word's share is among ten thousand of weight 1."""
    tokens = cut(text)
    return tokens, [None, *(math.log(weight(a, b) / 1e4) for a, b in itertools.pairwise(tokens))]


def logprob(text):
    return sum(p for p in steps(text)[1] if p is not None)


def likely(prompt, texts, temperature, seed):
    """The likeliest of the texts by what each adds to the prompt, or one drawn at a temperature."""
    scores = [logprob(prompt + text) for text in texts]
    if not temperature:
        return texts[scores.index(max(scores))]
    top = max(scores)
    weights = [math.exp((s - top) / temperature) for s in scores]
    return random.Random(f"{seed} {prompt}").choices(texts, weights)[0]


def written_out(pattern):
    """Every text of a regular expression without open ends."""

    def items(parsed):
        return ["".join(parts) for parts in itertools.product(*(one(op, value) for op, value in parsed))]

    def one(op, value):
        name = str(op)
        if name == "LITERAL":
            return [chr(value)]
        if name == "IN":
            return [chr(code) for _, code in value]
        if name == "BRANCH":
            return [text for branch in value[1] for text in items(branch)]
        if name == "SUBPATTERN":
            return items(value[3])
        if name == "MAX_REPEAT":
            least, most, inner = value
            return ["".join(p) for n in range(least, most + 1) for p in itertools.product(items(inner), repeat=n)]
        raise ValueError(f"unknown sign in a pattern: {name}")

    return list(dict.fromkeys(items(_parser.parse(pattern))))


def of_grammar(grammar):
    """Every text of a GBNF grammar with texts, names, (), |, ? and {m,n}, without recursion."""
    rules = dict(line.split(" ::= ", 1) for line in grammar.strip().split("\n"))

    def expression(body):
        found, rest = "", body
        while rest:
            quoted = re.match(r'"((?:[^"\\]|\\.)*)"', rest)
            name = re.match(r"[a-z]+", rest)
            repeat = re.match(r"\{\d+,\d+\}", rest)
            if quoted:
                found += f"(?:{re.escape(json.loads(quoted[0]))})"
            elif name:
                found += f"(?:{expression(rules[name[0]])})"
            elif repeat or rest[0] in "()|?":
                found += (repeat or [rest[0]])[0]
            elif rest[0] != " ":
                raise ValueError(f"failed to parse grammar at {rest[:20]!r}")
            rest = rest[len((quoted or name or repeat or [" "])[0]) :]
        return found

    return written_out(expression(rules["root"]))


def of_schema(schema):
    """Every JSON text of a schema with objects, arrays and enumerations."""
    if "enum" in schema:
        return [json.dumps(value) for value in schema["enum"]]
    if schema.get("type") == "array":
        inner, counts = of_schema(schema["items"]), range(schema["minItems"], schema["maxItems"] + 1)
        return [f"[{', '.join(p)}]" for n in counts for p in itertools.product(inner, repeat=n)]
    if schema.get("type") == "object":
        parts = [[f"{json.dumps(k)}: {text}" for text in of_schema(v)] for k, v in schema["properties"].items()]
        return ["{" + ", ".join(p) + "}" for p in itertools.product(*parts)]
    raise ValueError(f"unknown schema {schema}")


class Refusal(Exception):
    """A status of 400 and what is wrong."""


class FakeServer(ThreadingHTTPServer):
    """Options: `kind` (vllm, old_vllm, llama_cpp, ollama, openai) and `faults`.

    Faults: ``strict`` (unknown fields are refused, else ignored), ``generated only`` (llama.cpp's log-probabilities),
    ``no echo``, ``holes`` (some are missing), ``constant`` (the same for all), ``no letters``, ``no chat``,
    ``no constraint``, ``mumbles`` (no letter among the answers), ``html``, ``truncated``, ``fields`` (parts of answers
    are missing), ``slow``, ``drip``, ``repeats the key``. `busy` is how many questions are answered with 429 first; the
    one of number `busy_at` is, too.
    """

    daemon_threads = True

    def __init__(self, kind="vllm", faults=(), busy=0, key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.faults, self.busy, self.key = kind, set(faults), busy, key
        self.asked, self.busy_at, self.lock = [], None, threading.Lock()

    @property
    def address(self):
        return f"127.0.0.1:{self.server_address[1]}"

    def constraint(self, body):
        """All texts that a request's fields allow, as this kind reads them; None for no constraint."""
        known = {
            "vllm": {"structured_outputs", "response_format"},
            "old_vllm": {"guided_choice", "guided_regex", "guided_json", "response_format"},
            "llama_cpp": {"grammar", "json_schema", "response_format"},
            "ollama": {"format"},
            "openai": {"response_format"},
        }[self.kind]
        fields = {"structured_outputs", "grammar", "json_schema", "response_format", "format"}
        fields |= {"guided_choice", "guided_regex", "guided_json"}
        unknown = (fields & set(body)) - known
        if unknown and "strict" in self.faults:
            raise Refusal(f"Extra inputs are not permitted: {sorted(unknown)}")
        if "no constraint" in self.faults:
            return None
        told = {name: body[name] for name in known & set(body)}
        told |= {f"guided_{k}": v for k, v in told.pop("structured_outputs", {}).items()}
        for name, value in told.items():
            if name == "guided_choice":
                return value
            if name == "guided_regex":
                return written_out(value)
            if name == "grammar":
                return of_grammar(value)
            return of_schema(value["json_schema"]["schema"] if name == "response_format" else value)
        return None

    def write(self, prompt, body, limit, temperature, seed):
        allowed = self.constraint(body)
        text = " and so on" * 20 if allowed is None else likely(prompt, allowed, temperature, seed)
        tokens = cut(text)
        return "".join(tokens[:limit]), min(limit, len(tokens)), "length" if len(tokens) > limit else "stop"

    def letters(self, prompt):
        """A multiple-choice question answered by the bigram, with a liking for the first letters."""
        if "mumbles" in self.faults:
            return {" Well": -0.5, ",": -1.5}
        start = prompt.partition("\n\nWhich comes next?")[0]
        found = re.findall(r"^([A-Z])\) (.*)$", prompt, re.MULTILINE)
        scores = {
            letter: logprob(f"{start} {text}") - logprob(start) - 0.7 * i for i, (letter, text) in enumerate(found)
        }
        whole = math.log(sum(math.exp(s) for s in scores.values())) + 0.1
        # Half of what an answer is worth goes to the letter with a space before it.
        return {f"{space}{x}": s - whole + math.log(0.5) for x, s in scores.items() for space in ("", " ")}


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *args):
        """Tests need no log."""

    def do_GET(self):
        self.reply(lambda: self.told(None))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(lambda: self.told(body))

    def reply(self, answer):
        server = self.server
        with server.lock:
            server.asked.append(self.path)
            busy, server.busy = server.busy > 0 or len(server.asked) - 1 == server.busy_at, max(0, server.busy - 1)
        if busy:
            return self.send(429, b'{"error": "busy"}', {"Retry-After": "0"})
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            return self.send(401, json.dumps({"error": f"bad key {self.headers.get('Authorization')}"}).encode())
        if "repeats the key" in server.faults and self.command == "POST":
            return self.send(400, f"who is {self.headers.get('Authorization')}?".encode())
        if "html" in server.faults:
            return self.send(200, b"<html><body>Welcome to the router</body></html>", {"Content-Type": "text/html"})
        if "slow" in server.faults:
            time.sleep(1.0)
        try:
            data = json.dumps(answer()).encode()
        except Refusal as error:
            return self.send(400, json.dumps({"error": {"message": str(error)}}).encode())
        except LookupError:
            return self.send(404, b'{"detail": "Not Found"}')
        except ValueError as error:
            return self.send(400, json.dumps({"error": {"message": str(error)}}).encode())
        return self.send(200, data[: len(data) // 2] if "truncated" in server.faults else data)

    def send(self, status, data, headers=()):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client did not wait
            for byte in data if "drip" in self.server.faults else ():
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
            if "drip" not in self.server.faults:
                self.wfile.write(data)

    def told(self, body):
        server, kind = self.server, self.server.kind
        if self.path == "/v1/models":
            owner = {"vllm": "vllm", "old_vllm": "vllm", "llama_cpp": "llamacpp", "ollama": "library"}.get(kind, "me")
            return {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": owner}]}
        if self.path == "/api/version" and kind == "ollama":
            return {"version": "0.9.0"}
        if "fields" in server.faults:
            return {"object": "text_completion", "choices": []}
        if self.path == "/api/generate" and kind == "ollama":
            told = body["options"]
            text, n, reason = server.write(body["prompt"], body, told["num_predict"], told["temperature"], told["seed"])
            return {"response": text, "done": True, "done_reason": reason, "eval_count": n, "prompt_eval_count": 1}
        if self.path == "/v1/completions":
            return self.completion(body)
        if self.path == "/v1/chat/completions" and "no chat" not in server.faults:
            return self.chat(body)
        raise LookupError(self.path)

    def chat(self, body):
        content = body["messages"][-1]["content"]
        prompt = content if isinstance(content, str) else content[-1]["text"]
        pictures = [] if isinstance(content, str) else [part["image_url"]["url"] for part in content[:-1]]
        self.server.pictures = pictures
        text, n, reason = self.written(body, prompt)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        if body.get("logprobs") and not {"no letters"} & self.server.faults and self.server.kind != "ollama":
            top = [{"token": t, "logprob": p} for t, p in self.server.letters(prompt).items()]
            choice["logprobs"] = {"content": [{"token": top[0]["token"], "logprob": -1.0, "top_logprobs": top}]}
        usage = {"prompt_tokens": len(cut(prompt)), "completion_tokens": n, "total_tokens": len(cut(prompt)) + n}
        return {"object": "chat.completion", "choices": [choice], "usage": usage}

    def written(self, body, prompt):
        limit, temperature = body.get("max_tokens", 16), body.get("temperature", 1.0)
        fields = {k: v for k, v in body.items() if not (self.server.kind == "ollama" and k == "format")}
        return self.server.write(prompt, fields, limit, temperature, body.get("seed"))

    def completion(self, body):
        server, prompt = self.server, body["prompt"]
        text, n, reason = self.written(body, prompt)
        choice = {"index": 0, "text": text, "finish_reason": reason}
        tokens, logprobs = steps(prompt)
        if body.get("echo"):
            if "no echo" in server.faults or (server.kind == "llama_cpp" and "generated only" not in server.faults):
                raise Refusal("Only no echo is supported")
            if server.kind == "ollama":
                pass  # ignores it, and tells no log-probabilities
            elif "generated only" in server.faults:
                choice["logprobs"] = {"tokens": [" and"], "token_logprobs": [0.0]}
            else:
                told = [None, *([-1.0] * (len(tokens) - 1))] if "constant" in server.faults else logprobs
                told = [None if i % 2 else p for i, p in enumerate(told)] if "holes" in server.faults else told
                choice["text"] = prompt + text
                choice["logprobs"] = {"tokens": [*tokens, " and"], "token_logprobs": [*told, -0.5]}
        elif body.get("logprobs") and "no letters" not in server.faults and server.kind != "ollama":
            choice["logprobs"] = {"tokens": [" A"], "token_logprobs": [-1.0], "top_logprobs": [server.letters(prompt)]}
        usage = {"prompt_tokens": len(tokens), "completion_tokens": n, "total_tokens": len(tokens) + n}
        return {"object": "text_completion", "choices": [choice], "usage": usage}


@contextlib.contextmanager
def fake_llm(kind="vllm", faults=(), **options):
    """A running server."""
    server = FakeServer(kind, faults, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5.0)
