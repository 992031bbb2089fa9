"""A process that has loaded what every training loads, and forks on request: a training then begins in a tenth of a
second instead of ten seconds of CPU. tests/warm.py starts it and speaks with it; argv[1] is its end of a socket.

A request is JSON: `environment`, and either `script`, `arguments` and `folder`, for a child that runs the script as
`python script arguments` would, or `modules`, for a child that loads these and waits for requests of its own. With it
come file descriptors: stdout, stderr (or the child's own end of a socket), and a pipe that is told the child's id and
how it ended. When the other end of the socket is closed, this process ends and takes along what it has started.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
LONGEST_REQUEST = 1 << 18  # bytes; an environment takes some thousand
PR_SET_PDEATHSIG = 1


def load(modules: list[str]) -> None:
    """Import them in this process, for all children to come, and say so on stderr when that started a thread: a child
    has only the thread that forked it."""
    sys.path[0] = ROOT
    for name in modules:
        importlib.import_module(name)
    # What is loaded is garbage in no child: collecting would touch, and so copy, every page that is shared.
    gc.collect()
    gc.freeze()
    # jemalloc's is stopped and started anew around a fork, by jemalloc itself.
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    if others := [name for name in names[1:] if name != "jemalloc_bg_thd"]:
        print(f"loading {modules} started threads, which no fork has: {others}", file=sys.stderr, flush=True)


def tell(pipe: int, **facts: object) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for this child any more
        os.write(pipe, json.dumps(facts).encode() + b"\n")


def serve(control: socket.socket) -> tuple[dict, list[int]]:
    """Fork for each request. Returns in the children alone, with the request and its file descriptors."""
    poll, children = select.poll(), {}
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != control.fileno():
                poll.unregister(ready)
                pid, pipe = children.pop(ready)
                _, status, used = os.wait4(pid, 0)
                seconds = used.ru_utime + used.ru_stime
                tell(pipe, returncode=os.waitstatus_to_exitcode(status), cpu_seconds=seconds)
                os.close(pipe)
                os.close(ready)
                continue
            message, descriptors, *_ = socket.recv_fds(control, LONGEST_REQUEST, 8)
            if not message:
                for pid, _ in children.values():
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)  # what it has used of the CPU counts as this process's, and so as the tests'
                os._exit(0)
            *descriptors, pipe = descriptors
            has_session, told = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.close(told)
                os.close(has_session)
                for watched, (_, other) in children.items():
                    os.close(watched)
                    os.close(other)
                os.close(pipe)
                control.close()
                return json.loads(message), descriptors
            os.close(told)
            os.read(has_session, 1)  # its end: whoever is told the id may signal the whole group at once
            os.close(has_session)
            tell(pipe, pid=pid)
            for descriptor in descriptors:
                os.close(descriptor)
            watched = os.pidfd_open(pid)
            poll.register(watched, select.POLLIN)
            children[watched] = pid, pipe


def begin(environment: dict[str, str]) -> None:
    """As a process that has just been started: an environment and random numbers of its own."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    importlib.import_module("numpy").random.seed()  # Python's own generator sees to itself after a fork, numpy's not


def run(script: str, arguments: list[str], folder: str, descriptors: list[int]) -> None:
    """`python script arguments` in this folder, with these for stdout and stderr."""
    for place, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.chdir(folder)
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    sys.orig_argv = [sys.executable, *sys.argv]
    runpy.run_path(script, run_name="__main__")


def main(control: socket.socket, modules: list[str]) -> None:
    """Returns in a child, when its script has ended."""
    load(modules)
    while True:
        request, descriptors = serve(control)
        begin(request["environment"])
        if "script" in request:
            return run(request["script"], request["arguments"], request["folder"], descriptors)
        control = socket.socket(fileno=descriptors[0])
        load(request["modules"])


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
