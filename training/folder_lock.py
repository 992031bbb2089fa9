"""One owner a folder: a lock that the system lets go of when its process ends, however it ends.

    own(output_dir, "--output_dir")             # (all ranks) raises SettingsError where another run owns it
    with alone_in(folder, "doing this"): ...    # (one process) waits for whoever else is at it

A POSIX record lock (fcntl.lockf) on a small file: it holds on NFS, too, is not inherited by data workers, and dies with
its process, so that a lock left behind keeps nobody out. The file tells the others who the owner is. fcntl is imported
on use: --help, which reads this room, too, is answered on systems that have none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from training.errors import SettingsError
from training.processes import gather, local_rank, on_main, say_from_here

AGAIN_S = 0.5  # until a lock that another process has is tried again
_held: dict[Path, int] = {}  # lock file -> descriptor, open for as long as this process owns the folder


def own(folder: Path, flag: str, name: str = ".owner") -> None:
    """(all ranks) Lock `folder` for this run, by one process of each machine that does not share its disk.

    Raises `SettingsError`, which names the owner and the `flag` to change, where another run has it. A file system
    without locks is said and trusted.
    """
    mark = on_main(lambda: _lock(folder, flag, name, uuid.uuid4().hex))
    failure = None
    if local_rank() == 0 and _owner(folder / name).get("run") != mark:  # a disk of its own
        try:
            _lock(folder, flag, name, mark)
        except SettingsError as error:
            failure = error
    for error in gather(failure):
        if error is not None:
            raise error


def _lock(folder: Path, flag: str, name: str, mark: str) -> str:
    """(one process of each disk) The mark of the run that owns the folder now: ours."""
    path = (folder / name).absolute()
    if path in _held:  # a second training in one process
        return str(_owner(path).get("run"))
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                say_from_here(f"{folder} cannot be locked ({error.strerror}): start no second run there")
                break
            os.close(number)
            raise SettingsError(_taken(folder, flag, _owner(path))) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(number), path.stat()):
                break
        os.close(number)  # its owner removed it between our two calls
    _held[path] = number
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T"), "run": mark}
    os.ftruncate(number, 0)
    os.pwrite(number, json.dumps(owner).encode(), 0)
    os.fsync(number)  # another machine reads it next
    return mark


@contextlib.contextmanager
def alone_in(folder: Path, doing: str, name: str = ".owner") -> Iterator[None]:
    """(one process of each disk) What happens inside happens in no other process at the same time; waits, and says for
    whom."""
    path, told = folder / name, False
    while (number := _lock_file(path)) is None:
        if not told:
            owner = _owner(path)
            who = f"process {owner.get('process')} on {owner.get('host')}" if owner else "another process"
            say_from_here(f"{who} is {doing} in {folder}: waiting for it")
            told = True
        time.sleep(AGAIN_S)
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}
    os.ftruncate(number, 0)
    os.pwrite(number, json.dumps(owner).encode(), 0)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(number)


def _lock_file(path: Path) -> int | None:
    """The descriptor of a lock file that is ours now; None while another process has it."""
    import fcntl

    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            say_from_here(f"{path} cannot be locked ({error.strerror}): start no second run with these pages")
            return number
        os.close(number)
        return None
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(number), path.stat()):
            return number
    os.close(number)  # its owner removed it between our two calls
    return None


def _owner(path: Path) -> dict[str, str | int]:
    # Closing any other descriptor of a file lets go of a process's own lock on it (POSIX), hence the one we have.
    try:
        number = _held.get(path.absolute())
        found = json.loads(os.pread(number, 4096, 0) if number is not None else path.read_bytes())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _taken(folder: Path, flag: str, owner: dict[str, str | int]) -> str:
    who = "another process"
    if owner:
        who = f"process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')}"
    return f"{flag} {folder}: a run is going on there ({who}); wait for it, stop it, or give another {flag}"


def let_go() -> None:
    """(any rank) At the end of a run; a process that is killed lets go, too, and leaves only the file."""
    for path, number in _held.items():
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(number)
    _held.clear()
