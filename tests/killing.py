"""Death at a counted event, so that a test of kills does not depend on how fast the machine is.

INFIR2_TEST_KILL, in the environment of a rank, says which:

    step N     right after the N-th training step of this launch is logged
    file N     before the N-th change of a file or a folder in the run's checkpoints: an opening for writing, a
               renaming, a removal
    bytes N    in the middle of the write that would make a file longer than N bytes
"""

import builtins
import os
import resource
import signal
import sys

VARIABLE = "INFIR2_TEST_KILL"
_CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


def arm(wish: str) -> None:
    """Prepare this process, and its group, for its end; an empty wish is none."""
    if not wish:
        return
    kind, count = wish.split()
    {"step": _after_steps, "file": _before_changes, "bytes": _within_a_write}[kind](int(count))


def _die() -> None:
    os.killpg(0, signal.SIGKILL)


def _after_steps(count: int) -> None:
    original, left = builtins.print, count

    def counting(*words, **options):
        nonlocal left
        original(*words, **options)
        if words and "] iteration " in str(words[0]):
            left -= 1
            if left == 0:
                _die()

    builtins.print = counting


def _before_changes(count: int) -> None:
    left = count

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event not in _CHANGES or "/checkpoints" not in os.fsdecode(_path(arguments)):
            return
        if event == "open" and not _for_writing(arguments):
            return
        left -= 1
        if left == 0:
            _die()

    sys.addaudithook(hook)


def _path(arguments: tuple) -> str | bytes:
    return arguments[0] if arguments and isinstance(arguments[0], str | bytes | os.PathLike) else ""


def _for_writing(arguments: tuple) -> bool:
    _, mode, flags = arguments
    return any(letter in mode for letter in "wax+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))


def _within_a_write(count: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and would raise an error
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
