"""A box for programs that nobody has read: what a model wrote.

    outcome = sandbox.run(["/usr/bin/python3", "/data/program.py"], b"input", Limits(seconds=10), [Path("/data")])

Inside, a program has no network, sees no other process, and is one process: it can make threads, but not fork. Of the
machine's files it sees those of the system and the ones it was given, all read-only; it can write into an empty /tmp of
limited size that ends with it. Memory, time and output are limited. It has no privileges and cannot gain any.

This is Linux' own means without a daemon: namespaces (mount, PID, network, IPC, UTS), a small root of read-only mounts,
resource limits, a seccomp filter. They need either root, which is given up inside for a user that owns nothing, or
unprivileged user namespaces, which most distributions allow and most containers do not. `missing` tries all of it and
says what is not there; `run` never runs a program with less.

The program is started by this file as a program of its own (`_outside`, `_inside`), which needs nothing but Python's
standard library. What the box does not keep out: faults of the kernel, and waste of the limits' worth of CPU time.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import platform
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
# Debian gives these out on demand, to no one else. Each box has its own: limits on threads count by user.
FIRST_USER, USERS = 60_000, 5_000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CLONE_THREAD = 0x10000

# By machine: the kernel's name for its calls (AUDIT_ARCH), the number of clone, and of calls that are refused: new
# processes and namespaces, and memory outside of the address space, which its limit does not count. io_uring makes
# calls that no filter sees.
CALLS = {
    "x86_64": (0xC000003E, 56, {
        "fork": 57, "vfork": 58, "unshare": 272, "memfd_create": 319, "shmget": 29, "semget": 64, "msgget": 68,
        "mq_open": 240, "add_key": 248, "bpf": 321,
    }),
    "aarch64": (0xC00000B7, 220, {
        "unshare": 97, "memfd_create": 279, "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180,
        "add_key": 217, "bpf": 280,
    }),
}  # fmt: skip
REFUSED = {"memfd_secret": 447, "io_uring_setup": 425}  # numbers that all machines share, as clone3's
CLONE3 = 435


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float
    memory: int = 4 << 30  # bytes of address space
    files: int = 64 << 20  # bytes in /tmp, and of any one file
    threads: int = 64
    output: int = 1 << 20  # bytes


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit status (128 and more for a signal, as in a shell), its stdout, the limit that
    ended it."""

    status: int
    output: bytes
    exceeded: str = ""  # time, output


class SandboxError(Exception):
    """The box could not be made: nothing was run."""


def run(command: Sequence[str], data: bytes, limits: Limits, readable: Sequence[Path] = ()) -> Outcome:
    """Run `command` in a box of its own with `data` on stdin; it is gone, with all it made, when this returns.

    `command` is looked for as it stands; `readable` are files and folders that it may read, besides the system's. What
    it writes to stderr must come from code that is trusted, before it runs any that is not: it is taken as a failure
    of the box. Raises SandboxError then, and where the machine does not allow a box.
    """
    request = {"command": list(command), "readable": [str(path) for path in readable], "limits": asdict(limits)}
    box = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), json.dumps(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )
    exceeded = []

    def stop(limit: str) -> None:
        exceeded.append(limit)
        os.killpg(box.pid, signal.SIGKILL)  # not yet waited for: the number is still its own

    timer = threading.Timer(limits.seconds, stop, ["time"])
    timer.start()
    with box.stdout, box.stderr:
        with contextlib.suppress(BrokenPipeError), box.stdin:
            box.stdin.write(data)
        output = box.stdout.read(limits.output + 1)
        if len(output) > limits.output:
            stop("output")
        complaint = b"" if exceeded else box.stderr.read(1 << 16)
        # A program can close what it writes to and go on. This waits for its end, and leaves it its number for `stop`.
        os.waitid(os.P_PID, box.pid, os.WEXITED | os.WNOWAIT)
        timer.cancel()
        timer.join()
    status = box.wait()
    if complaint:
        raise SandboxError(complaint.decode(errors="replace").strip())
    return Outcome(status, output[: limits.output], exceeded[0] if exceeded else "")


# What `run` starts. `_outside` makes the namespaces and waits; `_inside`, process 1 of its own, makes the root, gives
# up what it may, and becomes the program.


def _outside(parent: int, request: dict) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    _die_with_parent(libc)
    if os.getppid() != parent:
        return 1  # it ended before we could ask to end with it
    _make_namespaces()
    alive, held = os.pipe()
    outside = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(held)
        _inside(libc, alive, outside, request)
    for number in (0, 1, 2, alive):
        os.close(number)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def _make_namespaces() -> None:
    """Root needs no user namespace, and gives up more than one could: anybody else becomes himself in a new one."""
    rest = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    user, group = os.geteuid(), os.getegid()
    with _saying("make namespaces (root, or unprivileged user namespaces; containers often forbid both)"):
        if user == 0:
            os.unshare(rest)
            return
        os.unshare(os.CLONE_NEWUSER | rest)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _inside(libc: ctypes.CDLL, alive: int, outside: int, request: dict) -> None:
    """Becomes the program, or writes why not to stderr and ends."""
    try:
        limits = Limits(**request["limits"])
        _make_root(libc, request["readable"], limits)
        _set_limits(limits)
        if os.geteuid() == 0:
            user = FIRST_USER + outside % USERS
            with _saying("become a user without rights"):
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
        _die_with_parent(libc)  # asked for again: the kernel forgets it when the user changes
        if select.select([alive], [], [], 0)[0]:
            os._exit(1)  # the pipe has closed: the parent is gone
        _filter_calls(libc)
        os.execv(request["command"][0], request["command"])
    except BaseException as error:
        os.write(2, f"sandbox: {error or type(error).__name__}\n".encode())
    os._exit(1)


def _make_root(libc: ctypes.CDLL, readable: Sequence[str], limits: Limits) -> None:
    """A root of read-only mounts with an empty /tmp. It is made upon /proc, where nothing lies that we mount from, and
    which is always there; only this mount namespace sees it."""
    root = "/proc"
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    _mount(libc, "none", "/", None, MS_REC | MS_PRIVATE)
    _mount(libc, "tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.umask(0o022)
    os.mkdir(f"{root}/tmp")
    size = f"size={limits.files},nr_inodes=10000,mode=1777"
    _mount(libc, "tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    for path in (*SYSTEM, *DEVICES, *readable):
        _show(libc, root, path, [other for other in mounts if other.startswith(f"{path}/")])
    _mount(libc, None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chroot(root)
    os.chdir("/tmp")


def _show(libc: ctypes.CDLL, root: str, path: str, below: Sequence[str]) -> None:
    """Make `path` visible under `root`, read-only, with the mounts `below` it."""
    target = root + path
    if not os.path.exists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path) and path in SYSTEM:  # /bin -> usr/bin
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT))
    _mount(libc, path, target, None, MS_BIND | MS_REC)
    for place in (target, *(root + other for other in below)):
        keep = os.statvfs(place).f_flag & (MS_NODEV | MS_NOEXEC)  # what the kernel does not let a user namespace change
        nodev = 0 if path in DEVICES else MS_NODEV
        _mount(libc, None, place, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | nodev | keep)


def _mount(libc: ctypes.CDLL, source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    if libc.mount(*words, ctypes.c_ulong(flags), data.encode()):
        raise OSError(f"this machine does not let us mount {source or 'read-only'} on {target}: {_reason()}")


def _set_limits(limits: Limits) -> None:
    cpu = math.ceil(limits.seconds * (os.cpu_count() or 1)) + 1
    for name, value in (
        ("AS", limits.memory),
        ("FSIZE", limits.files),
        ("NPROC", limits.threads),
        ("CPU", cpu),
        ("NOFILE", 256),
        ("CORE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _filter_calls(libc: ctypes.CDLL) -> None:
    """Refuse new processes (clone3 is not there, so the C library uses clone, whose flags a filter can read), new
    namespaces and memory that no limit counts, for this process and all it becomes."""
    if platform.machine() not in CALLS:
        raise OSError(f"the filter of system calls knows {' and '.join(CALLS)}, this is {platform.machine()}")
    architecture, clone, refused = CALLS[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]  # the x32 table has these calls under other numbers
    program += [(equal, 0, 1, CLONE3), (answer, 0, 0, error | errno.ENOSYS)]
    for number in (refused | REFUSED).values():
        program += [(equal, 0, 1, number), (answer, 0, 0, error | errno.EPERM)]
    program += [
        (equal, 0, 3, clone),
        (load, 0, 0, 16),
        (any_bit, 1, 0, CLONE_THREAD),
        (answer, 0, 0, error | errno.EPERM),
    ]
    program += [(answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0):
        raise OSError(f"this kernel does not let us filter system calls (seccomp): {_reason()}")


def _die_with_parent(libc: ctypes.CDLL) -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@contextlib.contextmanager
def _saying(what: str):
    try:
        yield
    except OSError as error:
        raise OSError(f"this machine does not let us {what}: {error}") from error


def _reason() -> str:
    return os.strerror(ctypes.get_errno())


# Whether it holds


_TRIALS = """
import json, os, socket, sys, threading
port, memory, files, home = json.loads(sys.stdin.read())
held = {}

def fails(what, action):
    try:
        action()
    except (OSError, MemoryError):
        held[what] = True
    else:
        held[what] = False

def too_much():
    for number in range(2):
        with open(f"/tmp/{number}", "wb") as file:
            for _ in range(files // 2 ** 20):
                file.write(bytes(2 ** 20))

thread = threading.Thread(target=int)
thread.start()
thread.join()
fails("no network", lambda: socket.create_connection(("127.0.0.1", port), 1))
fails("no other process", os.fork)
fails("a limit on memory", lambda: bytearray(memory))
fails("a limit on memory without an address", lambda: os.memfd_create("trial"))
fails("a limit on files", too_much)
fails("read-only files", lambda: open("/usr/trial", "w"))
fails("a private root", lambda: os.stat(home) if home != "/" else os.stat("/proc/1"))
held["no privileges"] = os.geteuid() != 0
held["no other processes to see"] = os.getpid() == 1
print(json.dumps([what for what, holds in held.items() if not holds]))
"""


def missing() -> str:
    """What of the box this machine does not give, in words; empty where it holds. Tries each part; takes 0.2 s."""
    limits = Limits(seconds=20, memory=1 << 30, files=2 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        home = str(Path.home())
        visible = any(str(path) == home or Path(home) in Path(path).parents for path in python_files())
        trial = [listener.getsockname()[1], limits.memory, limits.files, "/" if visible else home]
        try:
            outcome = run([sys.executable, "-I", "-c", _TRIALS], json.dumps(trial).encode(), limits, python_files())
        except SandboxError as error:
            return str(error)
    try:
        return ", ".join(json.loads(outcome.output))
    except ValueError:
        return f"a trial program did not finish: status {outcome.status} {outcome.exceeded}"


def python_files() -> list[Path]:
    """The folders that this Python needs to run: its own and its environment's."""
    return [Path(folder) for folder in dict.fromkeys((sys.base_prefix, sys.prefix)) if folder != "/usr"]


if __name__ == "__main__":
    try:
        sys.exit(_outside(int(sys.argv[1]), json.loads(sys.argv[2])))
    except OSError as problem:
        sys.exit(f"sandbox: {problem}")
