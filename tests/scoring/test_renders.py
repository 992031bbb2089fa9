"""Rendering: the same pixels each time, and nothing that a page tries leaves the machine or outlives its render."""

import contextlib
import multiprocessing
import os
import signal
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from conftest import need_browser

from scoring import clock, renders
from scoring.renders import SHOT, Job, Renderer

PAGE = "<!DOCTYPE html><html><head><title>t</title></head><body>{}</body></html>"
MARK = "PAGE_RENDERS_TEST"
MAGENTA = (255, 0, 255)


@pytest.fixture(scope="module")
def renderer():
    need_browser()
    os.environ[MARK] = mark = str(os.getpid())
    with Renderer() as renderer:
        yield renderer
    del os.environ[MARK]
    assert marked(mark) == [], "no process is left"


def marked(value: str) -> list[int]:
    """Processes that carry the mark in their environment, but for this one."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if f"{MARK}={value}".encode() in file.read().split(b"\0"):
                        found.append(int(entry))
            except OSError:
                continue
    return found


# -----------------------------------------------------------------------------
# Pictures


def test_the_same_page_gives_the_same_pixels(renderer):
    html = PAGE.format("<h1>Title</h1><p style='color:#246'>Some text</p>" * 20)
    first, second = renderer.map([Job(html), Job(html)])
    assert first.failure is None and first.image.shape == second.image.shape and first.image.dtype == np.uint8
    assert (first.image != second.image).any(axis=2).mean() <= 0.0011


def test_steps_come_back_in_their_order_and_layout_is_the_windows(renderer):
    html = PAGE.format("<div style='height:100vh;background:#0f0'></div><div style='height:50px'></div>")
    steps = ("() => 2 + 3", SHOT, "() => ({width: innerWidth, text: document.title})", SHOT)
    render = renderer.render(Job(html, width=400, height=300, steps=steps))
    assert render.values[0] == 5 and render.values[2] == {"width": 400, "text": "t"}
    assert render.values[1].shape[1] == 400 and 350 <= render.values[1].shape[0] <= 380
    assert (render.values[1][:320] == (0, 255, 0)).all(axis=2).sum() == 300 * (400 - 16), "100vh is the window's height"


def test_nothing_slides_while_a_picture_is_taken(renderer):
    """A screenshot past the window narrows the window for a moment; by its delay each slide would be half-way at once,
    as a short one is on a busy machine."""
    rules = (
        "{margin:0;height:50px;background:#f0f;transition:margin 100s -50s%s}@media(max-width:767px){%s{margin:50px}}"
    )
    inside = f"<style>p{rules % ('', 'p')}</style><p></p>"
    slides = [
        f"<style>p{rules % ('', 'p')}b{rules % ('!important', 'b')}b{{display:block}}</style><p></p>",
        "<b></b>",
        "<p style='margin:10vw'></p>",
        f"<div><template shadowrootmode=open>{inside}</template></div>",
        f'<iframe srcdoc="{inside}" style="width:100%;height:100px"></iframe>',
    ]
    tall = PAGE.format("".join(f"<div style='height:300px;overflow:hidden'>{slide}</div>" for slide in slides))
    moving, at_rest = (renderer.render(page).image for page in (tall, tall.replace("transition", "unknown")))
    places = range(0, 1500, 300)
    assert all((at_rest[y : y + 300] == MAGENTA).all(axis=2).any() for y in places)
    assert [np.array_equal(moving[y : y + 300], at_rest[y : y + 300]) for y in places] == [True] * len(slides)


def test_what_moves_by_itself_is_the_same_whenever_the_picture_is_taken(renderer):
    """Endless and ending, in the page, in shadows and frames; by a media query that holds while the picture is taken;
    by scrolling, which a picture of the whole page makes impossible for a moment. What ends is seen at its end."""
    frames = "@keyframes m{from{margin-left:0}to{margin-left:150px}}"
    rules = f"<style>{frames}p{{margin:0;width:50px;height:50px;background:#f0f;animation:m %s}}</style><p></p>"
    shadow = "<div><template shadowrootmode=%s>%s</template></div>"
    inside = [shadow % ("open", rules % how) for how in (".7s infinite", "9s forwards")]
    inside += [shadow % ("closed", rules % ".7s infinite")]
    inside += [
        f'<iframe srcdoc="{rules % how}" style="width:100%"></iframe>' for how in (".7s infinite", "9s forwards")
    ]
    own = f"<style>{frames}b{{display:block;width:50px;height:50px;background:#f0f}}"
    for name, how in (("endless", ".7s infinite"), ("ending", "9s forwards"), ("scrolled", "linear forwards")):
        own += f".{name}{{animation:m {how}}}"
    own += ".scrolled{animation-timeline:scroll()}.endless{animation-duration:.9s}"
    for query, how in (("min-height:1000px", ".7s"), ("max-height:999px", ".9s")):
        own += f"@media({query}){{.tall{{animation:m {how} infinite}}}}"
    strips = [f"<b class={name}></b>" for name in ("endless", "ending", "scrolled", "tall")]
    strips += [*inside, "<marquee>words</marquee>"]
    page = PAGE.format(
        own + "</style>" + "".join(f"<div style='height:200px;overflow:hidden'>{it}</div>" for it in strips)
    )
    pictures = [render.image for render in renderer.map([Job(page)] * 6)]
    places = [slice(200 * number, 200 * number + 190) for number in range(len(strips))]
    same = [all(np.array_equal(pictures[0][place], other[place]) for other in pictures[1:]) for place in places]
    assert same == [True] * len(strips)
    left = [int((pictures[0][place] == MAGENTA).all(axis=2).any(axis=0).argmax()) for place in places[:-1]]
    assert [left[number] - left[0] for number in (1, 5)] == [150, 150] and left[8] - left[7] == 150, left


def test_renders_come_in_order_and_a_failure_stops_nobody(renderer):
    jobs = [Job(PAGE.format(f"<p>{n}</p>"), steps=("() => document.body.textContent",)) for n in range(6)]
    jobs[2] = Job(PAGE.format("x"), steps=("() => { throw new Error('on purpose'); }",))
    found = list(renderer.map(jobs))
    assert [render.values[0] if render.values else None for render in found] == ["0", "1", None, "3", "4", "5"]
    assert "on purpose" in found[2].failure and found[2].image is None


@pytest.mark.parametrize("seconds", ["0", "0.1"])
@pytest.mark.parametrize("place", ["", ";url=https://example.org/", ";url=/", ";url=#below"])
def test_a_page_that_wants_to_go_elsewhere_stays(renderer, seconds, place):
    html = PAGE.format(f"<meta http-equiv=refresh content='{seconds}{place}'><h1>Here</h1>")
    wait = "() => new Promise((done) => setTimeout(done, 400))"
    jobs = [Job(html, steps=(wait, "() => document.body.textContent", SHOT)), Job(PAGE.format("<h1>Here</h1>"))]
    render, plain = renderer.map(jobs)
    assert render.failure is None and render.values[1] == "Here" and np.array_equal(render.image, plain.image)


def test_a_worker_that_hangs_before_it_reads_is_given_up(monkeypatch):
    """More than a pipe holds, and a worker that is stopped."""
    real = renders.Worker.ask

    def stopped(self, job, clock):
        os.kill(self.process.pid, signal.SIGSTOP)
        return real(self, job, clock)

    monkeypatch.setattr(renders.Worker, "ask", stopped)
    with Renderer(1, seconds_per_page=2.0) as hanging:
        render = hanging.render(PAGE.format("x" * 1_000_000))
    assert "took over" in render.failure and render.seconds < 10


def test_long_pages_are_cut_and_wide_ones_shown_whole(renderer):
    render = renderer.render(PAGE.format("<div style='height:1000000px'></div>"))
    assert render.clipped and render.image.shape[0] == min(16_384, 20_000_000 // 1280)
    wide = renderer.render(PAGE.format("<div style='width:2000px;height:10px'></div>"))
    assert not wide.clipped and wide.image.shape[1] == 2008


@pytest.mark.parametrize("source", ["https://x.invalid/a.png", "missing.png", "data:image/png;base64,AAAA", ""])
def test_a_picture_that_cannot_load_keeps_its_size(source, renderer):
    body = f"<img src='{source}' width=120 height=80 alt='a long text instead of the picture'><p id=after>after</p>"
    step = "() => [document.images[0].clientWidth, document.images[0].clientHeight]"
    assert renderer.render(Job(PAGE.format(body), steps=(step,))).values == ([120, 80],)


def test_scripts_run_only_when_asked(renderer):
    html = PAGE.format("<p>before</p><script>document.querySelector('p').textContent = 'after'</script>")
    step = ("() => document.querySelector('p').textContent",)
    renders = renderer.map([Job(html, steps=step), Job(html, steps=step, scripts=True)])
    assert [render.values for render in renders] == [("before",), ("after",)]


# -----------------------------------------------------------------------------
# Processes


def test_a_browser_that_is_killed_is_replaced(renderer):
    import psutil

    renderer.render(PAGE.format("x"))
    killed = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # gone with the one before
            if "chrom" in process.name():
                process.send_signal(signal.SIGKILL)
                killed += 1
    assert killed
    assert [render.failure for render in renderer.map([Job(PAGE.format("x"))] * 3)] == [None] * 3


@pytest.mark.slow
def test_a_page_that_takes_too_long_is_ended_with_its_browser():
    with Renderer(1, seconds_per_page=8) as renderer:  # within which a busy machine starts another browser
        renderer.render(PAGE.format("warm"))
        start = time.monotonic()
        render = renderer.render(Job(PAGE.format("<script>while (true);</script>"), scripts=True))
        assert render.failure.startswith("took over") and render.values == () and time.monotonic() - start < 60
        assert renderer.render(PAGE.format("x")).failure is None


def spin() -> None:
    os.setsid()  # Linux shares cores out among sessions first: in ours all of them would get as much as the browser
    while True:
        pass


@contextlib.contextmanager
def busy_machine():
    """Ten processes on two cores, five for each of more, that want a core each."""
    count = max(10, 5 * len(os.sched_getaffinity(0)))
    others = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()


@pytest.mark.slow
@pytest.mark.skipif(
    not clock.cores_had([os.getpid()]), reason="needs schedstat, by which Linux tells who waits for a core"
)
def test_a_busy_machine_takes_longer_and_gives_the_same():
    """A page may take three times the work that it is; by the wall clock it then takes more. Its work, and not how long
    it took alone: where the machine is busy already, that is as long as it takes beside others."""
    heavy = "".join(f"<div style='box-shadow:0 0 {n % 40}px red;filter:blur({n % 3}px)'>{n}</div>" for n in range(300))
    job = Job(PAGE.format(heavy), steps=(SHOT,) * 2)
    with Renderer(1) as renderer:
        renderer.render(PAGE.format("warm"))
        before = threads_of_children()
        alone = renderer.render(job)
        work = sum(ran - before.get(thread, (0, 0))[0] for thread, (ran, _) in threads_of_children().items())
        renderer.seconds_per_page = 3 * work / 1e9
        with busy_machine():
            render = renderer.render(job)
    assert alone.failure is None and render.failure is None
    assert render.seconds > renderer.seconds_per_page, "else the machine was not busy"
    assert np.array_equal(render.image, alone.image)


def threads_of_children() -> dict[str, tuple[int, int]]:
    """As `clock.cores_had` tells it, of all processes that this one has started: a worker and its browser."""
    import psutil

    return clock.cores_had([process.pid for process in psutil.Process().children(recursive=True)])


def test_leaving_early_leaves_nobody(monkeypatch):
    monkeypatch.setenv(MARK, "early")
    with pytest.raises(KeyboardInterrupt), Renderer() as renderer:
        for _ in renderer.map([Job(PAGE.format("x"))] * 8):
            raise KeyboardInterrupt
    assert marked("early") == []


def test_a_missing_browser_is_named_with_its_remedy(tmp_path):
    with pytest.raises(renders.BrowserMissing, match="no such browser"):
        renders.find_chromium(str(tmp_path / "nowhere"))


# -----------------------------------------------------------------------------
# Hostile pages. {at} is a listener's address, {port} its port, {file} a file whose only content is magenta.


def huge_png() -> str:
    """A data URI of a PNG of 20,000 x 20,000 pixels in some 50 KB."""
    import base64

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 2501 * 20_000))
    return "data:image/png;base64," + base64.b64encode(png + chunk(b"IEND", b"")).decode()


LAUGHS = "<svg width=9 height=9><defs><g id=a0><rect width=9 height=9 /></g>" + "".join(
    f"<g id=a{n}>{f'<use href=#a{n - 1} />' * 10}</g>" for n in range(1, 8)
)
WITHOUT_SCRIPTS = {
    "endless height": "<div style='height:1000000px;background:#eee'></div>",
    "endless width": "<div style='width:1000000px;height:9px'></div>",
    "50,000 elements": "<div>" + "<p>x</p>" * 50_000 + "</div>",
    "5,000 levels": "<div>" * 5_000 + "x",
    "100,000 cells": "<table>" + ("<tr>" + "<td>x" * 100) * 1_000 + "</table>",
    "a billion laughs": LAUGHS + "</defs><use href=#a7 /></svg>",
    "turbulence": "<svg width=3000 height=3000><filter id=f><feTurbulence baseFrequency=.9 numOctaves=99 /></filter>"
    "<rect width=3000 height=3000 filter=url(#f) /></svg>",
    "a huge blur": "<div style='filter:blur(5000px);width:9000px;height:9000px;background:red'></div>" * 20,
    "gradients": "<div style='background:" + ",".join(["linear-gradient(#f00,#0f0)"] * 999) + ";height:5000px'></div>",
    "nested :has": "<style>" + "div:has(div:not(:has(p))) " * 30 + "{{color:red}}</style>" + "<div>" * 300,
    "nested calc": "<div style='width:" + "calc(1px + " * 900 + "1px" + ")" * 900 + "'>x</div>",
    "an image bomb": f"<img src='{huge_png()}'>",
    "a CSS image bomb": f"<div style='height:900px;background:url({huge_png()})'></div>",
    "endless animation": "<style>@keyframes k{{to{{transform:rotate(1turn)}}}}p{{animation:k 1ms infinite}}</style>"
    + "<p>x</p>" * 500,
    "meta refresh": "<meta http-equiv=refresh content='0;url={at}/refresh'>",
    "meta refresh to a file": "<meta http-equiv=refresh content='0;url=file://{file}'>",
    "an iframe of a file": "<iframe src='file://{file}' width=500 height=500></iframe>",
    "an iframe of the network": "<iframe src='{at}/frame' width=500 height=500></iframe>",
    "an iframe by srcdoc": "<iframe srcdoc=\"<img src='{at}/srcdoc'><iframe src='file://{file}'></iframe>\"></iframe>",
    "an iframe by data": "<iframe src=\"data:text/html,<img src='{at}/data'>\"></iframe>",
    "an object": "<object data='file://{file}' width=500 height=500></object><object data='{at}/object'></object>",
    "an embed": "<embed src='file://{file}' width=500 height=500><embed src='{at}/embed'>",
    "a picture file": "<img src='file://{file}' width=500 height=500>",
    "a picture of the network": "<img src='{at}/img'><img srcset='{at}/srcset 1x'><input type=image src='{at}/input'>",
    "a picture element": "<picture><source srcset='{at}/source'><img src='{at}/img'></picture>",
    "an SVG picture": "<svg width=500 height=500><image href='{at}/svg' width=500 height=500 />"
    "<image href='file://{file}' width=500 height=500 /><use href='{at}/use#a' /></svg>",
    "a background": "<div style='background:url({at}/background);height:99px'></div>"
    "<div style='background:url(file://{file});height:99px'></div>",
    "more of CSS": "<style>p{{cursor:url({at}/c),auto;list-style:url({at}/l);content:url({at}/k);mask:url({at}/m);"
    "border-image:url({at}/b) 1;shape-outside:url({at}/s)}}p::before{{content:url({at}/before)}}</style><p>x",
    "an import": "<style>@import '{at}/import';@import url(file://{file});</style>",
    "a font": "<style>@font-face{{font-family:f;src:url({at}/font)}}p{{font-family:f}}</style><p>x",
    "a style sheet": "<link rel=stylesheet href='{at}/css'><link rel=stylesheet href='file://{file}'>",
    "hints": "".join(f"<link rel={kind} href='{{at}}/{kind}' as=image>" for kind in (
        "preload", "prefetch", "preconnect", "dns-prefetch", "prerender", "modulepreload", "icon", "manifest", "next")),
    "speculation": "<script type=speculationrules>{{\"prefetch\":[{{\"source\":\"list\",\"urls\":[\"{at}/spec\"]}}]}}"
    "</script>",
    "media": "<video src='{at}/v' poster='{at}/p' autoplay></video><audio src='{at}/a' autoplay></audio>"
    "<video autoplay><source src='{at}/s'><track src='{at}/t' default></video>",
    "a script": "<script src='{at}/script'></script><script type=module src='{at}/module'></script>",
    "handlers": "<img src=x onerror=\"fetch('{at}/onerror')\"><body onload=\"fetch('{at}/onload')\">"
    "<svg onload=\"fetch('{at}/svgload')\"></svg><details open ontoggle=\"fetch('{at}/toggle')\">",
    "a base": "<base href='{at}/'><img src=relative><a href=x ping='{at}/ping'>x</a>",
    "a form": "<form action='{at}/form' id=f><input name=q autofocus onfocus='f.submit()'></form>",
    "other schemes": "".join(f"<iframe src='{scheme}'></iframe>" for scheme in (
        "javascript:alert(1)", "view-source:file://{file}", "chrome://settings", "ftp://127.0.0.1:{port}/", "blob:x",
        "about:blank", "filesystem:x")),
    "frames": "<!DOCTYPE html><frameset><frame src='{at}/frame'><frame src='file://{file}'></frameset>",
    "a portal": "<portal src='{at}/portal'></portal><fencedframe src='{at}/fenced'></fencedframe>",
}  # fmt: skip
WITH_SCRIPTS = {
    "an endless loop": "while (true);",
    "endless timers": "setInterval(() => {{ const t = Date.now(); while (Date.now() - t < 500); }}, 0)",
    "an endless document": "for (;;) document.write('<p>x</p>'.repeat(1e4))",
    "endless memory": "const a = []; for (;;) a.push(new Array(1e6).fill(a.length))",
    "alert": "for (;;) alert('x')",
    "beforeunload": "onbeforeunload = () => 'x'; confirm('x'); prompt('x'); print()",
    "fetch": "fetch('{at}/fetch', {{mode: 'no-cors'}}); new Image().src = '{at}/image'",
    "XMLHttpRequest": "const r = new XMLHttpRequest(); r.open('GET', '{at}/xhr'); r.send()",
    "a beacon": "navigator.sendBeacon('{at}/beacon', 'x')",
    "a web socket": "new WebSocket('ws://127.0.0.1:{port}/socket')",
    "server events": "new EventSource('{at}/events')",
    "WebRTC": "const c = new RTCPeerConnection({{iceServers: [{{urls: 'stun:127.0.0.1:{port}'}}, {{urls: "
    "'turn:127.0.0.1:{port}?transport=tcp', username: 'u', credential: 'c'}}]}}); c.createDataChannel('x'); "
    "c.createOffer().then((offer) => c.setLocalDescription(offer))",
    "a window": "open('{at}/open'); open('file://{file}')",
    "going elsewhere": "location = '{at}/location'",
    "going to a file": "location = 'file://{file}'",
    "a form by script": "const f = document.createElement('form'); f.action = '{at}/f'; document.body.append(f); "
    "f.submit()",
    "a worker": "new Worker(URL.createObjectURL(new Blob([`fetch('{at}/worker')`]))); "
    "navigator.serviceWorker?.register('{at}/sw.js')",
    "a frame by script": "const f = document.createElement('iframe'); f.src = 'file://{file}'; "
    "f.width = f.height = 500; document.body.append(f)",
    "clicks": "const a = document.createElement('a'); a.href = '{at}/a'; a.ping = '{at}/ping'; a.download = 'x'; "
    "document.body.append(a); a.click()",
    "hints by script": "for (const rel of ['prefetch', 'preconnect', 'dns-prefetch', 'preload', 'prerender']) {{ "
    "const l = document.createElement('link'); l.rel = rel; l.as = 'image'; l.href = '{at}/' + rel; "
    "document.head.append(l) }}",
    "WebTransport": "new WebTransport('https://127.0.0.1:{port}/')",
}
HOSTILE = {name: (body, False) for name, body in WITHOUT_SCRIPTS.items()}
HOSTILE |= {name: (f"<script>{body}</script>", True) for name, body in WITH_SCRIPTS.items()}


class Listener:
    """A TCP and a UDP socket on one loopback port, and who has knocked."""

    def __init__(self):
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
        self.port = self.tcp.getsockname()[1]
        self.udp.bind(("127.0.0.1", self.port))
        self.seen: list[str] = []
        for knocks in (self.connections, self.datagrams):
            threading.Thread(target=knocks, daemon=True).start()

    def connections(self):
        while True:
            connection, _ = self.tcp.accept()
            connection.settimeout(1)
            try:
                self.seen.append(connection.recv(200).decode("latin-1"))
            except OSError as error:
                self.seen.append(repr(error))
            connection.close()

    def datagrams(self):
        while True:
            self.seen.append(repr(self.udp.recv(200)))


@pytest.fixture(scope="module")
def listener():
    return Listener()


def test_the_listener_hears(listener):
    with socket.create_connection(("127.0.0.1", listener.port)) as connection:
        connection.sendall(b"hello")
    deadline = time.monotonic() + 5
    while not listener.seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert listener.seen == ["hello"]
    listener.seen.clear()


def test_there_are_sixty_of_them():
    assert len(HOSTILE) >= 60


@pytest.mark.first
@pytest.mark.slow
def test_hostile_pages_reach_nothing_and_end(renderer, listener, tmp_path, monkeypatch):
    canary = tmp_path / "canary.svg"
    magenta = "<svg xmlns='http://www.w3.org/2000/svg' width='500' height='500'><rect width='500' height='500' "
    canary.write_text(magenta + "fill='#ff00ff'/></svg>")
    places = {"at": f"http://127.0.0.1:{listener.port}", "port": listener.port, "file": canary}
    bodies = [(body.format(**places), scripts) for body, scripts in HOSTILE.values()]
    jobs = [Job(body if body.startswith("<!") else PAGE.format(body), scripts=scripts) for body, scripts in bodies]
    listener.seen.clear()
    monkeypatch.setattr(renderer, "seconds_per_page", 7.0)  # ten of these pages take whatever they are given
    found = dict(zip(HOSTILE, renderer.map(jobs)))
    time.sleep(1)
    assert listener.seen == [], "what knocked, with the path that names it"
    # The clock of 7 s stands still while a page waits for a core, so on a busy machine it ends later.
    assert {name: render.seconds for name, render in found.items() if render.seconds >= 60} == {}
    pictures = {name: render.image for name, render in found.items() if render.failure is None}
    assert len(pictures) > len(HOSTILE) / 2 and all(found[name].values == () for name in found.keys() - pictures.keys())
    seen = [name for name, image in pictures.items() if (image == MAGENTA).all(axis=2).any()]
    assert seen == [], "a local file is in these pictures"
    print({name: render.failure for name, render in found.items() if render.failure})


@pytest.mark.slow
def test_the_canary_would_be_seen(renderer):
    render = renderer.render(PAGE.format("<div style='background:#ff00ff;height:50px'></div>"))
    assert (render.image == MAGENTA).all(axis=2).any()
