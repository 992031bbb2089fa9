"""Pages written by a server elsewhere that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, TGI.

    server = Server("http://localhost:8000", recipe, source="./holo1_dom_finetune_final")
    for request, outcome in server.write(requests):
        if isinstance(outcome, Failed):
            say(f"{names[request.place]}: {outcome.error}")

Each screenshot is resized here, as the model's own processor would, and sent as PNG before the recipe's prompt: the
question of `use_model_from_hub.ask`. What goes wrong on the way is tried again; a page that cannot be had is named.

Sections: Picture, Question, Answer, Faults, Endpoint, Pages.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import queue
import random
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from use_model_from_hub import Failed, Recipe, Request, UseError, Written, extract_html, say

try:  # huggingface_hub 2 brings the first of them, 1 the second
    import httpx2 as httpx
except ImportError:
    import httpx

if TYPE_CHECKING:
    from PIL.Image import Image

KEY_VARIABLE = "HOLO1_API_KEY"  # not OPENAI_API_KEY: that one would go to whatever host --server names

# -----------------------------------------------------------------------------
# Picture

QWEN2_5_VL_EDGE = 28  # 14 pixels a patch, 2 x 2 patches a token


def edge_of(source: str | Path) -> int | None:
    """Pixels along one edge of a visual token, patch times merge, by the processor's own file in a folder or a Hub
    repository; None where its processor does not merge patches: `use_model_from_hub.limit_pixels` leaves it alone."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = Path(source) / name
        if not Path(source).is_dir():
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import RemoteEntryNotFoundError

            try:
                path = Path(hf_hub_download(str(source), name))
            except RemoteEntryNotFoundError:
                continue
        if path.is_file():
            facts = json.loads(path.read_text(encoding="utf-8"))
            facts = facts.get("image_processor") or facts
            if "merge_size" in facts:
                return int(facts.get("patch_size", 14)) * int(facts["merge_size"])
    return None


def shown_size(width: int, height: int, edge: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) at which Qwen-VL's processors show a picture: multiples of `edge` whose area lies within both
    limits, about the same proportions. The rule is transformers' `smart_resize` (5.23). Its result is its own
    result, so that a server with the same limits, or wider ones, leaves the picture as it arrives."""
    sides = [round(side / edge) * edge for side in (width, height)]
    area = sides[0] * sides[1]
    if area > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        sides = [max(edge, math.floor(side / shrink / edge) * edge) for side in (width, height)]
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        sides = [math.ceil(side * grow / edge) * edge for side in (width, height)]
    return sides[0], sides[1]


def shown_picture(screenshot: Image, edge: int | None, recipe: Recipe) -> Image:
    """The picture as the model is to see it. Pillow's bicubic filter and torchvision's, which the processor uses,
    differ by one level of 256 in about a thousandth of the values (Pillow 13, torchvision 0.29)."""
    if edge is None:
        return screenshot
    size = shown_size(*screenshot.size, edge, recipe.min_pixels, recipe.max_pixels)
    return screenshot if size == screenshot.size else screenshot.resize(size, resample=3)  # 3: bicubic


def data_url(picture: Image) -> str:
    """A PNG in base64: nothing of the picture is lost."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # a third of the default's time, on a cable that is not the limit
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


# -----------------------------------------------------------------------------
# Question

# Who says in /v1/models that it owns the model, and what that server calls the penalty. Each fills in values that a
# request leaves out from the model's generation_config.json (vLLM, SGLang; Qwen2.5-VL's own has a penalty of 1.05) or
# from its own defaults (llama.cpp: top_k 40, top_p 0.95, min_p 0.05): to these everything is said.
PENALTIES = {"vllm": "repetition_penalty", "sglang": "repetition_penalty", "llamacpp": "repeat_penalty"}


def decoding(recipe: Recipe, owner: str, seed: int) -> dict[str, Any]:
    """The fields of a request that decide how an answer is chosen. A server that is not known gets those of OpenAI's
    own protocol, and `repetition_penalty` only where it is not 1."""
    known = owner in PENALTIES
    asked: dict[str, Any] = {"max_tokens": recipe.max_html_tokens, "temperature": recipe.temperature}
    if known or recipe.repetition_penalty != 1:
        asked[PENALTIES.get(owner, "repetition_penalty")] = recipe.repetition_penalty
    if owner == "llamacpp" and recipe.repetition_penalty != 1:
        asked["repeat_last_n"] = -1  # the whole answer, not the last 64 tokens
    if recipe.temperature > 0:
        asked["seed"] = seed
        if known or recipe.top_p < 1:  # TGI refuses a top_p of 1
            asked["top_p"] = recipe.top_p
        if known:
            asked |= {"top_k": -1, "min_p": 0.0}
    return asked


def seed_of(screenshot: Image, recipe: Recipe, sample: int) -> int:
    """31 bits by seed, screenshot and sample alone, as `use_model_from_hub.chances` mixes them: an answer does not
    depend on the order of the pages. The same seed draws other tokens there than here: the generators differ."""
    mixed = f"{recipe.seed} {sample} {screenshot.size}".encode()
    return zlib.crc32(mixed, zlib.crc32(screenshot.tobytes())) & 0x7FFFFFFF  # llama.cpp takes 2^32 - 1 for "any"


# -----------------------------------------------------------------------------
# Answer


class Fault(Exception):
    """What may go well when it is tried again. `away`: nobody is there, or too busy; `wait_s` is what was asked for."""

    def __init__(self, message: str, away: bool = False, wait_s: float = 0.0):
        super().__init__(message)
        self.away, self.wait_s = away, wait_s


class Refused(Exception):
    """What this page will never be answered with."""


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class Answer:
    """An answer out of its events: text, finish reason, usage, and the pieces, counted."""

    def __init__(self) -> None:
        self.text, self.pieces = [], 0
        self.finish, self.usage, self.chosen = None, {}, False

    def take(self, event: object) -> str:
        """The text that an event, or a whole answer, adds. Raises `Fault` and `Refused`."""
        if not isinstance(event, Mapping):
            raise Fault(f"an answer that is no object: {str(event)[:100]}")
        if event.get("error") or event.get("object") == "error":
            self.refuse(event)
        self.usage = event.get("usage") or self.usage
        if not event.get("choices"):  # as in the last event, which carries the usage
            return ""
        try:
            choice = event["choices"][0]
            text = (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            self.finish, self.chosen = choice.get("finish_reason") or self.finish, True
        except (AttributeError, LookupError, TypeError) as error:
            raise Fault(f"an answer of another shape: {str(event)[:100]}") from error
        if text:
            self.text.append(str(text))
            self.pieces += 1
        return str(text)

    def refuse(self, event: Mapping[str, Any]) -> None:
        """An error within a stream whose status was 200."""
        error = event["error"] if isinstance(event.get("error"), Mapping) else event
        message, code = words_of(json.dumps(event)), error.get("code") or 500
        if isinstance(code, int) and 400 <= code < 500 and code != 429:
            raise Refused(with_remedy(message))
        raise Fault(f"an error within the answer: {message}", away=code == 429)

    def written(self) -> Written:
        """Raises `Fault` where the answer is not one to its end."""
        if not self.chosen:
            raise Fault("an answer without choices")
        if self.finish is None:
            raise Fault("the answer breaks off: no finish_reason")
        if self.finish not in ("stop", "eos_token", "length"):
            raise Fault(f"the answer ended with finish_reason {self.finish!r}")
        raw = "".join(self.text)
        # The server's own count, which has vLLM's end token in it; without one its events are about as many.
        tokens = self.usage.get("completion_tokens") or self.pieces
        return Written(extract_html(raw), raw, tokens, cut_off=self.finish == "length")


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that end with a line feed. httpx's own iter_lines also ends one at U+2028 and U+0085, which JSON may hold,
    and pages do."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def events_of(lines: Iterable[bytes], timeout_s: float, stop: threading.Event) -> Iterator[object]:
    """The JSON of server-sent events, to [DONE]. Raises `Fault` where one is none, and where nothing but comments,
    which keep a connection open, come for `timeout_s`."""
    last = time.monotonic()
    for line in lines:
        if stop.is_set():
            raise Stopped
        name, _, data = line.strip().partition(b":")
        if name != b"data":
            if time.monotonic() - last > timeout_s:
                raise Fault(f"no word for {timeout_s:g} s")
            continue
        last = time.monotonic()
        if data.strip() == b"[DONE]":
            return
        yield parsed(data)


def parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError as error:  # of the encoding, too
        raise Fault(f"not JSON: {data[:80]!r}") from error


# -----------------------------------------------------------------------------
# Faults

AWAY = (429, 502, 503, 504)  # too busy, or a proxy behind which nobody is
_CONTEXT = re.compile(r"context|max_model_len|max_new_tokens|maximum.{0,30}length|too long", re.IGNORECASE)


def words_of(body: str) -> str:
    """What a server says has gone wrong: the message in its JSON, else the text, in one line of at most 300."""
    try:
        facts = json.loads(body)
    except ValueError:
        facts = body
    while isinstance(facts, Mapping):
        facts = next((facts[name] for name in ("error", "message", "detail") if facts.get(name)), str(dict(facts)))
    return " ".join(str(facts).split())[:300]


def with_remedy(message: str) -> str:
    """A refusal of one page, and what can be done."""
    if _CONTEXT.search(message):
        return f"{message} - serve the model with a longer context (vLLM: --max-model-len) or ask for fewer tokens"
    return message


def retry_after_s(value: str | None) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; at most ten minutes; 0 where it holds neither."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), 600.0) if math.isfinite(seconds) else 0.0


class Patience:
    """How long is tried again, for all pages of a run together; asked from several threads.

    A page gives up after `tries` faults of its own, and, where nobody answers, once nobody has for `patience_s`: the
    pages behind it then try once each, so that a server which is gone does not cost `patience_s` a page. One that is
    busy with other pages is waited for: in the end it is asked for this one alone.
    """

    def __init__(self, tries: int, patience_s: float, backoff_s: tuple[float, float]):
        self.tries, self.patience_s, self.backoff_s = tries, patience_s, backoff_s
        self.lock, self.kinds = threading.Lock(), Counter()
        self.away_since: float | None = None  # when nobody answered first, after the last answer

    def begin(self) -> None:
        """Before the first page."""
        self.kinds, self.away_since = Counter(), None

    def answered(self) -> None:
        """The server has said something."""
        self.away_since = None

    def met(self, fault: Fault, own: int) -> bool:
        """Counts a fault, tells the first of its kind, and says whether to try again; `own` is the page's faults."""
        kind = re.sub(r"[\d.]+ s\b|: .*", "", str(fault))
        with self.lock:
            self.kinds[kind] += 1
            first = self.kinds[kind] == 1
            if fault.away and self.away_since is None:
                self.away_since = time.monotonic()
            away_s = time.monotonic() - (self.away_since or time.monotonic())
        if first:
            limit = f"for up to {self.patience_s:g} s" if fault.away else f"up to {self.tries} times a page"
            say(f"  {fault}: trying again {limit}; counted from here on")
        return away_s <= self.patience_s if fault.away else own < self.tries

    def pause_s(self, fault: Fault, attempts: int) -> float:
        """Twice as long each time, with chance in it, lest all pages come back at once; at least what was asked for."""
        first, most = self.backoff_s
        return fault.wait_s + min(most, first * 2 ** min(attempts - 1, 20)) * random.uniform(0.5, 1.0)

    def summary(self) -> str:
        """The faults, counted, most frequent first."""
        return ", ".join(f"{count} x {kind}" for kind, count in self.kinds.most_common())


class Showing:
    """Passes on an answer's text as it is written. What an attempt that failed has shown already is not shown again,
    where the next one writes the same."""

    def __init__(self, show: Callable[[str], None]):
        self.show, self.shown, self.text = show, "", ""

    def begin(self) -> None:
        self.text = ""

    def piece(self, text: str) -> None:
        self.text += text
        if len(self.text) > len(self.shown):
            same = self.text.startswith(self.shown)
            self.show(self.text[len(self.shown) :] if same else "\n" + self.text)
            self.shown = self.text


# -----------------------------------------------------------------------------
# Endpoint


def endpoint(url: str) -> str:
    """The address up to /v1, of what a user may have typed. Raises `UseError`."""
    remedy = "give the server's address, like http://localhost:8000"
    try:
        parts = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise UseError(f"--server {url}: {error}; {remedy}") from error
    if parts.userinfo:  # and not repeated here
        raise UseError(f"--server with a password in its address: give a key in the environment, {KEY_VARIABLE}")
    if parts.scheme not in ("http", "https") or not parts.host:
        raise UseError(f"--server {url}: {remedy}")
    return re.sub(r"(/v1)?(/chat/completions)?/*$", "", str(parts)) + "/v1"


def key_from(key: str | None) -> str | None:
    """The key as it can stand in a header. Raises `UseError`, without repeating it."""
    key = (key if key is not None else os.environ.get(KEY_VARIABLE, "")).strip()
    if not key.isascii() or not key.isprintable():
        raise UseError(f"the key in {KEY_VARIABLE} has characters that no key has; copy it anew")
    return key or None


# -----------------------------------------------------------------------------
# Pages


class Server:
    """Writes pages by asking a server; the protocol of everything that writes pages.

    `url` with or without /v1; `model_name` where the server has several; `source` the folder or Hub repository of the
    model, whose processor says how pictures are resized (without one, as Qwen2.5-VL's); `in_flight` pages at once,
    which bounds the memory, too; `timeout_s` without a word from the server before a request counts as lost: a page
    may have to wait for others there. `tries`, `patience_s`, `backoff_s` (first and longest) are those of `Patience`.
    `key`: from the environment (HOLO1_API_KEY) where it is not given. Raises `UseError` where the server is not there,
    wants another key, or has another model.
    """

    def __init__(
        self,
        url: str,
        recipe: Recipe,
        model_name: str | None = None,
        in_flight: int = 16,
        timeout_s: float = 600.0,
        key: str | None = None,
        source: str | Path | None = None,
        tries: int = 5,
        patience_s: float = 300.0,
        backoff_s: tuple[float, float] = (0.5, 30.0),
    ):
        if in_flight < 1 or timeout_s <= 0:
            raise UseError(f"in_flight {in_flight}, timeout_s {timeout_s:g}: both must be more than 0")
        self.url, self.key, self.recipe = endpoint(url), key_from(key), recipe
        self.in_flight, self.timeout_s = in_flight, timeout_s
        try:
            self.edge = QWEN2_5_VL_EDGE if source is None else edge_of(source)
        except (OSError, ValueError) as error:  # the Hub's own are OSErrors, too
            raise UseError(f"{source}: how its processor resizes pictures cannot be read: {error}") from error
        self.patience = Patience(tries, patience_s, backoff_s)
        self.opening = threading.BoundedSemaphore(4)  # decoded at once: 20 M pixels are 60 MB
        self.text_tokens, self.size_told = None, False  # of the prompt, by the server's count: the same for each page
        self.model, self.owner = self._find_model(model_name)
        say(self.words())

    def words(self) -> str:
        """What is asked of whom, in one line."""
        asked = {name: value for name, value in decoding(self.recipe, self.owner, 0).items() if name != "seed"}
        asked |= {"seed": f"by page, from {self.recipe.seed}"} if self.recipe.temperature > 0 else {}
        limits = f"{self.recipe.min_pixels:,} to {self.recipe.max_pixels:,} pixels"
        size = f"resized here to multiples of {self.edge} and {limits}" if self.edge else "as they are"
        told = ", ".join(f"{name} {value}" for name, value in asked.items())
        doubt = ""
        if self.owner not in PENALTIES and self.recipe.repetition_penalty != 1:
            doubt = "; whether this server heeds repetition_penalty is not known: vLLM and SGLang do"
        return (
            f"{self.url}: {self.model} ({self.owner or 'nobody'} owns it), {self.in_flight} pages at once; screenshots "
            f"{size}, as PNG; {told}{doubt}"
        )

    def _client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # A proxy is for what is elsewhere: the variables that name one seldom spare this machine.
        elsewhere = httpx.URL(self.url).host not in ("localhost", "127.0.0.1", "::1")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.in_flight)
        timeout = httpx.Timeout(self.timeout_s, connect=min(10.0, self.timeout_s))
        return httpx.Client(headers=headers, timeout=timeout, limits=limits, trust_env=elsewhere)

    def _find_model(self, wanted: str | None) -> tuple[str, str]:
        """(name, owner) of the model to ask for."""
        start = "start it first, for example: vllm serve holo1_dom_finetune_final"
        with self._client() as client:
            try:
                response = client.get(f"{self.url}/models")
            except (httpx.TransportError, httpx.DecodingError) as error:
                raise UseError(f"--server {self.url}: {error or type(error).__name__}; {start}") from error
        self._check_status(response.status_code, response.text)
        if response.status_code == 404 and wanted:  # not every server has a list
            return wanted, ""
        try:
            cards = response.json()["data"] if response.status_code == 200 else []
            owners = {card["id"]: str(card.get("owned_by") or "") for card in cards}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UseError(f"--server {self.url}: its list of models is not OpenAI's; is that its address?") from error
        if not owners:
            said = f"status {response.status_code} and no model: {self._words(response.text)}"
            raise UseError(f"--server {self.url}: {said}; {start}")
        if wanted is None and len(owners) > 1:
            raise UseError(f"--server {self.url} has several models, name one of them: {', '.join(owners)}")
        if wanted is not None and wanted not in owners:
            raise UseError(f"--server {self.url} has no model {wanted}, but {', '.join(owners)}")
        name = wanted or next(iter(owners))
        return name, owners[name]

    def _words(self, body: str) -> str:
        """Some servers repeat the key that they refuse."""
        return words_of(body.replace(self.key, "...") if self.key else body)

    def _check_status(self, status: int, body: str) -> None:
        """Raises `UseError` for what no page would be spared."""
        if status in (401, 403):
            state = "was not accepted" if self.key else "is not set"
            raise UseError(f"--server {self.url} refuses access ({status}): its key in {KEY_VARIABLE} {state}")
        if 300 <= status < 400:
            raise UseError(f"--server {self.url} sends elsewhere ({status}): give the address that it leads to")

    def write(
        self, requests: Iterable[Request], shown: Callable[[Request, str], None] | None = None
    ) -> Iterator[tuple[Request, Written | Failed]]:
        """Yield each request with its answer, or with why there is none, as they end, in any order.

        `shown` gets each piece of text, in the thread that iterates. Requests are taken from `requests` and opened when
        their turn comes. Raises `UseError` where the server refuses what is asked of every page. Whoever stops
        iterating, by Ctrl-C or otherwise, leaves at once; the server notices when it sends its next word.
        """
        waiting, events, stop, running = iter(requests), queue.SimpleQueue(), threading.Event(), 0
        counts = Counter()
        self.patience.begin()
        client = self._client()
        try:
            while True:
                while running < self.in_flight and (request := next(waiting, None)) is not None:
                    work = (client, request, events, stop, shown is not None)
                    # A daemon: a thread that waits for a server's word would keep the process from ending.
                    name = f"page {request.place}"
                    threading.Thread(target=self._work, args=work, name=name, daemon=True).start()
                    running += 1
                if not running:
                    return
                request, outcome = events.get()
                if isinstance(outcome, str):
                    shown(request, outcome)
                    continue
                running -= 1
                if isinstance(outcome, Exception):
                    raise outcome
                counts[type(outcome).__name__] += 1
                yield request, outcome
        finally:
            stop.set()
            # Never under a thread that reads: the number of its socket may be another's a moment later. Each closes its
            # own connection when it finds that nobody waits.
            if not running:
                client.close()
            if self.patience.kinds or counts["Failed"]:
                faults = self.patience.summary() or "none that was tried again"
                say(f"  {counts['Written']:,} pages answered, {counts['Failed']:,} not; faults: {faults}")

    def _work(
        self, client: httpx.Client, request: Request, events: queue.SimpleQueue, stop: threading.Event, shows: bool
    ) -> None:
        """(a thread of its own) One page to its outcome; an error of ours is raised where the pages are waited for."""
        showing = Showing(lambda text: events.put((request, text))) if shows else None
        try:
            outcome = self._page(client, request, stop, showing)
        except Stopped:
            return
        except Exception as error:
            outcome = error
        if not stop.is_set():
            events.put((request, outcome))

    def _page(
        self, client: httpx.Client, request: Request, stop: threading.Event, showing: Showing | None
    ) -> Written | Failed:
        try:
            with self.opening:
                body, picture_tokens = self._body(request)
        except UseError as error:  # of whoever opens it
            return Failed(error)
        except (OSError, ValueError) as error:
            return Failed(UseError(f"the screenshot cannot be read: {error}", code=80))
        attempts = own = 0
        while True:
            attempts += 1
            try:
                return self._ask(client, body, picture_tokens, stop, showing)
            except Refused as refused:
                return Failed(UseError(f"the server refuses it: {refused}"), attempts)
            except Fault as fault:
                own += not fault.away
                if stop.is_set():
                    raise Stopped from fault
                if not self.patience.met(fault, own):
                    return Failed(UseError(f"no answer after {attempts} attempts, the last: {fault}"), attempts)
                if stop.wait(self.patience.pause_s(fault, attempts)):
                    raise Stopped from fault

    def _body(self, request: Request) -> tuple[bytes, int]:
        """The request as JSON, and the tokens that its picture becomes (0 where that is not known)."""
        screenshot = request.open()
        seed = seed_of(screenshot, self.recipe, request.sample) if self.recipe.temperature > 0 else 0
        picture = shown_picture(screenshot, self.edge, self.recipe)
        content = [{"type": "image_url", "image_url": {"url": data_url(picture)}}]
        content += [{"type": "text", "text": self.recipe.prompt}]
        asked = decoding(self.recipe, self.owner, seed)
        asked |= {"model": self.model, "messages": [{"role": "user", "content": content}]}
        if self.owner in PENALTIES:  # these know the word; it was trained with its thoughts off, where it has any
            asked["chat_template_kwargs"] = {"enable_thinking": False, "thinking": False}
        # Streamed even where nobody looks: a long silence and a lost answer are told apart from a long page.
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        area = picture.width * picture.height
        return json.dumps(asked).encode(), area // self.edge**2 if self.edge else 0

    def _ask(
        self,
        client: httpx.Client,
        body: bytes,
        picture_tokens: int,
        stop: threading.Event,
        showing: Showing | None,
    ) -> Written:
        """One attempt. Raises `Fault`, `Refused`, `Stopped`, and `UseError` for what every page would meet."""
        answer = Answer()
        if showing is not None:
            showing.begin()
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        try:
            with client.stream("POST", f"{self.url}/chat/completions", content=body, headers=headers) as response:
                if response.status_code != 200:
                    self._refuse(response, response.read().decode("utf-8", "replace"))
                if "json" in response.headers.get("Content-Type", ""):  # a server that does not stream
                    events = iter([parsed(response.read())])
                else:
                    events = events_of(lines_of(response.iter_bytes()), self.timeout_s, stop)
                for event in events:
                    text = answer.take(event)
                    self.patience.answered()
                    if text and showing is not None:
                        showing.piece(text)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Fault(f"no connection: {error}", away=True) from error
        except httpx.ReadTimeout as error:
            raise Fault(f"no word for {self.timeout_s:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise Fault(f"the connection broke: {error or type(error).__name__}") from error
        written = answer.written()
        self._compare(answer.usage.get("prompt_tokens"), picture_tokens)
        return written

    def _refuse(self, response: httpx.Response, body: str) -> None:
        """Raises what another status than 200 means."""
        status, message = response.status_code, self._words(body)
        self._check_status(status, body)
        if status in AWAY:
            wait_s = retry_after_s(response.headers.get("Retry-After"))
            raise Fault(f"status {status}: {message}", away=True, wait_s=wait_s)
        if status >= 500 or status == 408:
            raise Fault(f"status {status}: {message}")
        if status == 404:
            raise UseError(f"--server {self.url} has no chat with {self.model} (404): {message}")
        if status == 413:
            message = f"raise the limit of its proxy, or train with a smaller --max_pixels: {message}"
        # Of the fields that not every server knows.
        optional = {"stream_options", *decoding(self.recipe, self.owner, 0)} - {"max_tokens"}
        named = [name for name in optional if re.search(rf"\b{name}\b", message)]
        if status in (400, 422) and named and not _CONTEXT.search(message):
            raise UseError(f"--server {self.url} does not take {', '.join(sorted(named))} as asked for: {message}")
        raise Refused(f"{status}: {with_remedy(message)}")

    def _compare(self, prompt_tokens: int | None, picture_tokens: int) -> None:
        """Whether the server saw the picture in its size, by vLLM's count of the prompt's tokens: less the picture's,
        the same number stays for each page. Said once."""
        if self.owner != "vllm" or not prompt_tokens or not picture_tokens:
            return
        text = prompt_tokens - picture_tokens
        with self.patience.lock:
            known, self.text_tokens = self.text_tokens, text
            if self.size_told or (text > 0 and known in (None, text)):
                return
            self.size_told = True
        say(
            f"  the server shows the model another size: {prompt_tokens:,} tokens for the prompt and a picture of "
            f"{picture_tokens:,}; serve with the limits of the training: --mm-processor-kwargs "
            f'\'{{"min_pixels": {self.recipe.min_pixels}, "max_pixels": {self.recipe.max_pixels}}}\''
        )
