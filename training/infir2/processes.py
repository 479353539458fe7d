"""A program that never outlives the one that started it, however that one ends.

The program runs in a session and process group of its own. When we are killed with SIGKILL nothing of ours can run any
more, so a shell outside of our group waits on a pipe that only we hold open, and kills the group when the pipe closes.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

STOP_SECONDS = 20  # between SIGTERM and SIGKILL: a server has GPU memory and shared memory to give back

# Waits for a line, which says that the guard is there, then becomes the command. No line: we are gone.
_BECOME = 'read -r _ && exec "$@" </dev/null'

# $1: a process group. Kills it when our end of the pipe closes, unless a line came first.
_GUARD = 'read -r _ || kill -s KILL -- "-$1"'


def without_proxy() -> dict[str, str]:
    """What hides the web's proxy from a program that talks to this machine alone. Naming this machine in NO_PROXY is
    not enough: where no_proxy is set, Python's clients read that one."""
    return {name: "" for name in os.environ if name.lower().endswith("_proxy") and name.lower() != "no_proxy"}


class GuardedProcess:
    """A running program. A context manager: it is stopped, with all of its group, on the way out."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: IO | int):
        """Start `command` with `environment` on top of ours; stdout and stderr go to `output`."""
        self._process = subprocess.Popen(
            ["sh", "-c", _BECOME, "sh", *command],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT if output != subprocess.DEVNULL else output,
            start_new_session=True,
        )
        guard = ["sh", "-c", _GUARD, "sh", str(self._process.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        _write_line(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def status(self) -> int | None:
        """Exit status, negative for a signal; None while the program runs."""
        return self._process.poll()

    def wait(self, seconds: float | None = None) -> int | None:
        """As `status`, after at most `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll()

    def stop(self) -> None:
        """End the program: SIGTERM, then SIGKILL for what is left of its group. Returns when that is done."""
        if self.status() is None:
            self._signal(signal.SIGTERM)
            self.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        _write_line(self._guard)
        self._guard.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _write_line(process: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(b"\n")


def last_lines(path: Path, count: int = 20) -> str:
    """The end of a log."""
    return "\n".join(path.read_text("utf-8", errors="replace").splitlines()[-count:])


def exit_on_signals() -> None:
    """Let signals end this program through its `finally` and `with`; a second one does not interrupt that."""

    def leave(number, frame):
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, leave)
