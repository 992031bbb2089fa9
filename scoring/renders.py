"""Renders pages that a model wrote in Chromium, and lets none of them out: hostile HTML in, pictures out.

    python -m scoring.renders page.html --out page.png

    with Renderer(pages_at_once=2) as renderer:
        renderer.render(html).image                                  # (H, W, 3) uint8
        for render in renderer.map(Job(html, width=390) for html in many): ...

A worker process owns a browser and renders one page at a time; this process holds the clock (scoring/clock.py), and
kills a worker with all its children when a page takes too long. Beside the clock it needs use_model_from_hub.py alone.
Sections: What is rendered, Browser, In the worker, In the parent, Command line.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import io
import json
import os
import queue
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from scoring.clock import Clock
from use_model_from_hub import MAX_PICTURE_PIXELS

if TYPE_CHECKING:  # playwright is loaded by the worker, and missed with a remedy
    from playwright.sync_api import Browser, CDPSession, Route

# -----------------------------------------------------------------------------
# What is rendered

SHOT, SNAPSHOT = "shot", "snapshot"
# Of every element: where a frame's inside begins.
SNAPSHOT_STYLES = ("border-left-width", "border-top-width", "padding-left", "padding-top")
# Of a picture; a longer page is cut. With more pixels it would be refused wherever a screenshot is opened.
MAX_HEIGHT, MAX_WIDTH, MAX_PIXELS = 16_384, 16_384, MAX_PICTURE_PIXELS


@dataclass(frozen=True)
class Job:
    """`steps`, in order: SHOT takes the full page's picture; SNAPSHOT asks the browser for its layout (CDP's
    DOMSnapshot.captureSnapshot); anything else is the source of a JavaScript function `() => ...` whose JSON result is
    kept. `scripts` lets the page's own run, without any network; `pictures` gives
    those that cannot load a grey placeholder, since a broken picture ignores its size and moves the layout. Where
    `content_type` names no charset, `html` holds bytes, as characters up to U+00FF, and the browser finds out what they
    are in."""

    html: str
    width: int = 1280  # of the window, CSS px
    height: int = 720
    steps: tuple[str, ...] = (SHOT,)
    scripts: bool = False
    pictures: bool = True
    content_type: str = "text/html; charset=utf-8"


@dataclass(frozen=True)
class Render:
    """What came of a job."""

    values: tuple[Any, ...]  # one for each step: an array (H, W, 3) uint8, or the JSON value; () when it failed
    failure: str | None
    clipped: bool
    seconds: float

    @property
    def image(self) -> Any:
        """The first picture; None when the render failed."""
        return next((value for value in self.values if hasattr(value, "shape")), None)


HERE = Path(__file__).parent


@cache
def script(name: str, folder: Path = HERE) -> str:
    """The source of `name`.js in `folder`: one function expression, `(options, dom) => ...`."""
    return (folder / f"{name}.js").read_text(encoding="utf-8")


def step(name: str, folder: Path = HERE, /, **options: Any) -> str:
    """A step of a `Job`: what `name`.js of `folder` returns for these options, which reach it as one object, put in as
    JSON, and for dom.js' helpers."""
    return f"() => (\n{script(name, folder)})({json.dumps(options)}, (\n{script('dom')})())"


class BrowserMissing(RuntimeError):
    """No Chromium here; the message says how to get one."""


# -----------------------------------------------------------------------------
# Browser

FLAGS = [
    # the same pixels every time
    *"--force-device-scale-factor=1 --font-render-hinting=none --disable-lcd-text --hide-scrollbars".split(),
    *"--disable-gpu --disable-font-subpixel-positioning --force-color-profile=srgb --disable-checker-imaging".split(),
    *"--run-all-compositor-stages-before-draw --disable-threaded-animation --disable-threaded-scrolling".split(),
    "--blink-settings=imageAnimationPolicy=2",  # a picture that moves shows its first frame
    # no way out: a proxy where nobody listens, for loopback addresses, too, and nothing past it
    *"--proxy-server=127.0.0.1:1 --proxy-bypass-list=<-loopback> --disable-quic --dns-prefetch-disable".split(),
    *"--force-webrtc-ip-handling-policy=disable_non_proxied_udp --no-pings --disable-domain-reliability".split(),
    "--webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    # nor for the browser's own errands
    *"--disable-background-networking --disable-component-update --disable-sync --no-first-run".split(),
    *"--disable-client-side-phishing-detection --disable-default-apps --disable-dev-shm-usage --mute-audio".split(),
    "--disable-breakpad",
    "--disable-features=NetworkPrediction,Translate,MediaRouter,OptimizationHints,SpeculationRulesPrefetchFuture",
]
PLACE = "https://page.invalid/"
CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:; script-src {}; form-action 'none'; "
    "base-uri 'none'; frame-src 'none'; object-src 'none'; connect-src 'none'; worker-src 'none'"
)
DECODERS = 4  # threads for a page's pictures
RECYCLE = 80  # pages of one browser: a warm one wedged after fewer than 100 screenshots


def find_chromium(asked: str | None = None) -> str | None:
    """A path, or None for Playwright's own; raises `BrowserMissing`."""
    # Workers import it, which takes a fifth of a second, in which a GPU may wait for this process.
    if importlib.util.find_spec("playwright") is None:
        raise BrowserMissing("playwright is not installed: pip install playwright")
    if asked:
        if not Path(asked).exists():
            raise BrowserMissing(f"{asked}: no such browser")
        return asked
    for name in ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"):  # the lightest first
        if found := shutil.which(name):
            return found
    if Path(playwrights_chromium()).exists():
        return None
    raise BrowserMissing("no Chromium here: `playwright install chromium`, or install your system's `chromium`")


@cache
def playwrights_chromium() -> str:
    """Where Playwright's own is, or would be; a process of Playwright's tells it, in half a second."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


# -----------------------------------------------------------------------------
# In the worker


def receive(stream: BinaryIO) -> bytes | None:
    """A frame: its length in 8 bytes, then the content. None at the end of the stream."""
    head = stream.read(8)
    return stream.read(struct.unpack(">Q", head)[0]) if len(head) == 8 else None


def send(stream: BinaryIO, content: bytes) -> None:
    """The frame that `receive` reads."""
    stream.write(struct.pack(">Q", len(content)) + content)
    stream.flush()


def work(chromium: str | None) -> None:
    """(worker process) Render jobs from stdin until it ends: JSON in; JSON, then each picture's PNG, out."""
    from playwright.sync_api import sync_playwright

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write where the answers go
    flags = FLAGS + (["--no-sandbox"] if os.geteuid() == 0 else [])
    with sync_playwright() as playwright:
        browser, tab, rendered = None, None, 0
        while (frame := receive(sys.stdin.buffer)) is not None:
            job, fresh = Job(**json.loads(frame)), False
            while not fresh:
                if browser is None or rendered >= RECYCLE or not browser.is_connected():
                    if browser is not None:
                        browser.close()
                    browser, rendered = playwright.chromium.launch(executable_path=chromium, args=flags), 0
                    tab, fresh = None, True
                pictures = []
                try:
                    if tab is not None and not tab.suits(job):
                        tab.close()
                        tab = None
                    tab = tab or Tab(browser, job)
                    values, clipped = tab.render(job, rendered, pictures)
                    answer = {"values": values, "clipped": clipped, "version": browser.version}
                    break
                except Exception as error:  # handed to the parent, which reports or retries
                    answer, pictures = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}, []
                    gone = not browser.is_connected() or type(error).__name__ == "TargetClosedError"
                    browser.close()
                    browser = None
                    if not gone:
                        break  # else it may have died before this page came: once more in a fresh one
            rendered += 1
            send(answers, json.dumps(answer).encode("utf-8", "replace"))
            for picture in pictures:
                send(answers, picture)


class Tab:
    """(worker process) A page of a browser, and the job whose HTML is served to it."""

    def __init__(self, browser: Browser, job: Job):
        self.window, self.scripts, self.job, self.address, self.served = (
            (job.width, job.height),
            job.scripts,
            job,
            PLACE,
            0,
        )
        self.context = browser.new_context(
            viewport={"width": job.width, "height": job.height},
            locale="en-US",
            timezone_id="UTC",
            reduced_motion="reduce",
            color_scheme="light",
            device_scale_factor=1,
            service_workers="block",
            accept_downloads=False,
        )
        self.page = self.context.new_page()
        self.context.on("page", lambda other: other.close())
        self.page.on("dialog", lambda dialog: dialog.dismiss())
        self.context.route("**/*", self.serve)
        self.context.route_web_socket("**/*", lambda socket: socket.close())
        self.session = self.context.new_cdp_session(self.page)
        # Every animation stands at its start, in each document to come, wherever settle.js cannot end it: in a closed
        # shadow, or begun by a media query that holds while a picture is taken.
        self.session.send("Animation.enable")
        self.session.send("Animation.setPlaybackRate", {"playbackRate": 0})

    def suits(self, job: Job) -> bool:
        """Without scripts a page leaves nothing for the next; scripts get a context of their own."""
        return (job.width, job.height) == self.window and not self.scripts and not job.scripts

    def serve(self, route: Route) -> None:
        """The page itself, once; nothing else gets through."""
        request = route.request
        if request.url == self.address and request.is_navigation_request() and not self.served:
            self.served += 1
            policy = CSP.format("'unsafe-inline'" if self.job.scripts else "'none'")
            headers = {"content-type": self.job.content_type, "content-security-policy": policy}
            encoding = "utf-8" if "charset" in self.job.content_type else "latin-1"
            route.fulfill(status=200, headers=headers, body=self.job.html.encode(encoding, "replace"))
        elif request.is_navigation_request() and request.frame == self.page.main_frame:
            route.fulfill(status=204)  # the page stays; an aborted one would give way to the browser's error page
        else:
            route.abort()

    def render(self, job: Job, number: int, pictures: list[bytes]) -> tuple[list, bool]:
        """The steps' values, None for each picture, which goes into `pictures`; whether one was cut."""
        self.job, self.served = job, 0
        self.address = f"{PLACE}{number}/"  # another for each job, so that no link is a visited one
        self.page.goto(self.address, wait_until="load")
        values = run_steps(self.session, job, pictures)
        if self.page.url.partition("#")[0] != self.address:
            raise ValueError("the page has given way to another")
        return values

    def close(self) -> None:
        """Ends its context, whether or not its browser is still there."""
        with contextlib.suppress(Exception):  # the page may be gone, and its browser with it
            self.context.close()


def run_steps(session: CDPSession, job: Job, pictures: list[bytes]) -> tuple[list, bool]:
    """(worker process) The steps' values, None for each picture, which goes into `pictures`; whether one was cut.

    All in a world of our own, which the page's scripts cannot see. Raises ValueError with what a step threw.
    """
    frame = session.send("Page.getFrameTree")["frameTree"]["frame"]["id"]
    world = session.send("Page.createIsolatedWorld", {"frameId": frame})["executionContextId"]

    def evaluate(source: str) -> Any:
        options = {"functionDeclaration": source, "executionContextId": world, "returnByValue": True}
        options |= {"awaitPromise": True}
        answer = session.send("Runtime.callFunctionOn", options)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise ValueError((details.get("exception") or {}).get("description") or details.get("text"))
        return answer["result"].get("value")

    evaluate(step("settle", pictures=job.pictures))
    values, clipped = [], False
    for wanted in job.steps:
        if wanted == SNAPSHOT:
            values.append(session.send("DOMSnapshot.captureSnapshot", {"computedStyles": [*SNAPSHOT_STYLES]}))
            continue
        if wanted != SHOT:
            values.append(evaluate(wanted))
            continue
        wide, high = (max(1, round(side)) for side in evaluate(step("size")))
        wide, high = max(wide, job.width), max(high, job.height)
        width = min(wide, MAX_WIDTH)
        height = min(high, MAX_HEIGHT, MAX_PIXELS // width)
        clipped |= (width, height) != (wide, high)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        options = {"format": "png", "clip": clip, "captureBeyondViewport": True, "optimizeForSpeed": True}
        pictures.append(base64.b64decode(session.send("Page.captureScreenshot", options)["data"]))
        values.append(None)
    return values, clipped


# -----------------------------------------------------------------------------
# In the parent


class WorkerGone(Exception):
    """The worker died, or was killed because its time was up."""


MARK = "PAGE_RENDERS_WORKER"


def marked(mark: str) -> list[int]:
    """Processes with the mark, NAME=value, in their environment, where /proc tells."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


def end_family(pid: int | None, mark: str) -> None:
    """Kills a process (None: it is gone) and all that it started, which has the mark, NAME=value, in its environment.

    Playwright starts Chromium in a process group of its own, so the family is looked up. Who is stopped starts nobody
    new, so all of them are stopped before the first is killed.
    """
    import psutil

    family: list[int] = []
    new = [pid] if pid else []
    while new:
        for one in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGSTOP)
        family += new
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(pid).children(recursive=True)
            new = [child.pid for child in children if child.pid not in family]
            continue
        break
    for one in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    patience = time.monotonic() + 5  # a killed process takes a moment to go, and its helpers may be starting
    while (left := marked(mark)) and time.monotonic() < patience:  # the crash handler leaves the family
        for one in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        time.sleep(0.02)


class Worker:
    """A worker process and all that it started."""

    def __init__(self, chromium: str | None):
        command = [sys.executable, "-m", "scoring.renders", "--worker", chromium or ""]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.mark = uuid.uuid4().hex  # in the environment of everything that the worker starts
        # As a module: started as a file, its own folder would come first on the path, and a room there may be named
        # like one of Python's own modules.
        paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, MARK: self.mark, "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(command, start_new_session=True, env=environment, **pipes)
        os.set_blocking(self.process.stdin.fileno(), False)  # a worker may hang before it reads

    def ask(self, job: Job, clock: Clock) -> tuple[dict, list[bytes]]:
        """Its answer and the pictures; raises `WorkerGone`, `TimeoutError` once the clock has run down."""
        content = json.dumps(asdict(job)).encode("utf-8", "replace")
        self.write(struct.pack(">Q", len(content)) + content, clock)
        answer = json.loads(self.read(clock))
        shots = job.steps.count(SHOT) if "values" in answer else 0
        return answer, [self.read(clock) for _ in range(shots)]

    def write(self, content: bytes, clock: Clock) -> None:
        """Raises as `ask` does: who does not read blocks the writer once the pipe is full."""
        stream, left = self.process.stdin.fileno(), memoryview(content)
        while left:
            while not select.select([], [stream], [], clock.tick())[1]:
                pass
            try:
                left = left[os.write(stream, left) :]
            except BlockingIOError:
                continue
            except OSError:
                raise WorkerGone from None

    def read(self, clock: Clock) -> bytes:
        """A frame."""
        return self.read_bytes(struct.unpack(">Q", self.read_bytes(8, clock))[0], clock)

    def read_bytes(self, count: int, clock: Clock) -> bytes:
        """Exactly `count` bytes; raises as `ask` does."""
        stream, parts = self.process.stdout.fileno(), []
        while count:
            while not select.select([stream], [], [], clock.tick())[0]:
                pass
            part = os.read(stream, min(count, 1 << 20))
            if not part:
                raise WorkerGone
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def kill(self) -> None:
        """Ends it with its browser."""
        end_family(self.process.pid, f"{MARK}={self.mark}")
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()


class Renderer:
    """Renders pages in `pages_at_once` browsers; a context manager, which leaves no process behind."""

    def __init__(self, pages_at_once: int = 2, seconds_per_page: float = 15.0, chromium: str | None = None):
        self.chromium, self.seconds_per_page, self.pages_at_once = (
            find_chromium(chromium),
            seconds_per_page,
            pages_at_once,
        )
        self.idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        self.working: set[Worker] = set()
        self.begun: set[Future[Render]] = set()  # and not done
        self.version = ""
        for _ in range(pages_at_once):
            self.idle.put(None)  # started when needed
        self.pool, self.lock, self.closed = ThreadPoolExecutor(pages_at_once), threading.Lock(), False

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every browser, also those that are at work."""
        with self.lock:
            self.closed = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in list(self.working):
            worker.kill()
        self.pool.shutdown(wait=True)
        while not self.idle.empty():
            worker = self.idle.get()
            if worker is not None:
                worker.kill()

    def begin(self, job: Job) -> Future[Render]:
        """The render to come, whose pictures wait as PNG until they are `decoded`."""
        render = self.pool.submit(self._render, job)
        self.begun.add(render)
        render.add_done_callback(self.begun.discard)
        return render

    def render(self, job: Job | str) -> Render:
        """A failure is in the answer, and is not raised."""
        return decoded(self.begin(Job(job) if isinstance(job, str) else job).result())

    def map(self, jobs: Iterable[Job]) -> Iterator[Render]:
        """Renders in the order of `jobs`, which are read a little ahead, so that no browser waits for the caller."""
        waiting: deque[Future[Render]] = deque()
        for job in jobs:
            waiting.append(self.begin(job))
            if len(waiting) > 4 * self.pages_at_once:
                yield decoded(waiting.popleft().result())
        while waiting:
            yield decoded(waiting.popleft().result())

    def _render(self, job: Job) -> Render:
        start, used_s, failure = time.monotonic(), 0.0, "the renderer was closed"
        for again in (False, True):  # a browser may wedge or die without the page being at fault
            with self.lock:
                if self.closed:
                    break
                worker = self.idle.get() or Worker(self.chromium)
                self.working.add(worker)
            kept: Worker | None = None
            clock = Clock(worker.process.pid, (self.seconds_per_page - used_s) if again else self.first_try_s)
            try:
                answer, shots = worker.ask(job, clock)
                kept = worker
                if "values" in answer:
                    self.version = answer["version"]
                    pictures = iter(shots)
                    values = tuple(next(pictures) if s == SHOT else v for s, v in zip(job.steps, answer["values"]))
                    return Render(values, None, answer["clipped"], time.monotonic() - start)
                failure = answer["failure"]
            except TimeoutError:
                failure = f"took over {used_s + clock.seconds:.0f} s"
            except WorkerGone:
                failure = "the browser died"
            finally:
                self.working.discard(worker)
                if kept is None:
                    worker.kill()
                self.idle.put(kept)
            used_s += clock.used_s
            if used_s > self.seconds_per_page - 1:
                break
        return Render((), failure, False, time.monotonic() - start)

    @property
    def first_try_s(self) -> float:
        """Seconds of its own work that a page is given before another browser tries it."""
        return self.seconds_per_page * 2 / 3

    @property
    def facts(self) -> dict[str, Any]:
        """What pictures depend on, besides the page."""
        return facts_of_browser(self.version)


def facts_of_browser(version: str) -> dict[str, Any]:
    """What pictures depend on, besides the page: the browser of that version, and the fonts of this machine."""
    return {"chromium": version or "unknown", "sandbox": os.geteuid() != 0, "fonts": [*fonts_here()]}


@cache
def fonts_here() -> tuple[str, ...]:
    """The families of this machine's fonts, in order; none where fontconfig's tools are missing."""
    try:
        fonts = subprocess.run(["fc-list", ":", "family"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        fonts = ""
    return tuple(sorted({line.split(",")[0].strip() for line in fonts.splitlines() if line.strip()}))


def decoded(render: Render) -> Render:
    """Its pictures as arrays; until they are asked for they wait as PNG, a twentieth of the size."""
    import numpy as np
    from PIL import Image

    def pixels(png: bytes) -> Any:
        image = Image.open(io.BytesIO(png))
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # a long page's is 60 MB each time

    # Side by side: each of a long page's pictures takes a tenth of a second, most of it without Python.
    with ThreadPoolExecutor(DECODERS) as pool:
        values = [pool.submit(pixels, value) if isinstance(value, bytes) else value for value in render.values]
        return replace(render, values=tuple(it.result() if isinstance(it, Future) else it for it in values))


# -----------------------------------------------------------------------------
# Command line


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 where the page could not be rendered, 2 without a browser."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
        work(argv[1] or None)
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--width", type=int, default=1280)
    args = parser.parse_args(argv)
    from PIL import Image

    try:
        with Renderer(1) as renderer:
            render = renderer.render(Job(args.page.read_text(encoding="utf-8", errors="replace"), width=args.width))
    except BrowserMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if render.failure:
        print(f"error: {args.page}: {render.failure}", file=sys.stderr)
        return 1
    Image.fromarray(render.image).save(args.out)
    print(f"{args.out}: {render.image.shape[1]} x {render.image.shape[0]} in {render.seconds:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
