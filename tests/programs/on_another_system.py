"""One of our commands as on Windows or macOS: on_another_system.py PLATFORM COMMAND FLAGS...

sys.platform says so, and what POSIX alone has is not there (on "darwin": what Linux alone has): whatever asks for it
before the system is refused ends in a traceback.
"""

import importlib
import os
import runpy
import signal
import sys

MODULES = {"fcntl", "resource", "grp", "pwd", "termios", "tty", "pty"}
SIGNALS = {"SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGSTOP", "SIGCONT", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGQUIT"}
OF_OS = {"fork", "setsid", "getuid", "killpg", "getpgid", "sched_getaffinity", "sched_setaffinity", "register_at_fork"}
OF_OS |= {"mkfifo", "WNOHANG", "O_NOFOLLOW", "pread", "pwrite", "set_blocking"}

# Other people's code that asks on its import which system this is: this interpreter has not what Windows' or macOS' own
# would have. They know those systems; ours is what is tried here.
for one in ("asyncio", "filelock", "multiprocessing.connection", "subprocess", "tempfile", "urllib.request"):
    importlib.import_module(one)
platform, script, *flags = sys.argv[1:]
if platform == "win32":
    for one in MODULES:
        sys.modules[one] = None
    for one in SIGNALS & set(dir(signal)):
        delattr(signal, one)
for one in OF_OS & set(dir(os)) if platform == "win32" else {"sched_getaffinity", "sched_setaffinity"}:
    delattr(os, one)
sys.platform = platform
sys.argv = [script, *flags]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
