"""The sandbox for model-written code: what it keeps in, and that nothing runs where it cannot be made."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infir2.evaluation import code_review, sandbox
from infir2.evaluation.sandbox import Limits

pytest_plugins = ["eval_fixtures"]

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no sandbox here: {sandbox.missing()}")


def run(program: str, data: bytes = b"", **limits) -> sandbox.Outcome:
    command = [sys.executable, "-I", "-c", program]
    return sandbox.run(command, data, Limits(**{"seconds": 20, "memory": 1 << 30, **limits}), sandbox.python_files())


def test_an_honest_program_runs():
    """With its input, threads, numpy and a file of its own. Pins a box so tight that right answers fail in it."""
    program = """
import sys, threading, numpy
thread = threading.Thread(target=lambda: open("/tmp/sum", "w").write(str(numpy.array([2, 3]).sum())))
thread.start()
thread.join()
print(open("/tmp/sum").read() + sys.stdin.read())
"""
    outcome = run(program, b" apples")
    assert (outcome.status, outcome.output, outcome.exceeded) == (0, b"5 apples\n", "")


ATTEMPTS = {
    "write beside it": "open({outside!r}, 'w').write('x')",
    "read a home": "open({secret!r}).read()",
    "write to the system": "open('/usr/bin/x', 'w')",
    "remount": "assert ctypes.CDLL(None).mount(None, b'/', None, 32 | 4096, None) == 0",
    "fork": "assert ctypes.CDLL(None).fork() >= 0",
    "fork by its number": "assert ctypes.CDLL(None).syscall(57 if platform.machine() == 'x86_64' else 220) >= 0",
    "become another": "os.setuid(0); assert os.getuid() == 0 and open('/usr/x', 'w')",
    "new namespace": "os.unshare(os.CLONE_NEWUSER)",
    "connect": "socket.create_connection(('127.0.0.1', {port}), 2)",
    "see processes": "open('/proc/1/cmdline').read()",
    "take memory": "bytearray(2 << 30)",
    "take memory in files without a name": "os.write(os.memfd_create('x'), bytes(1 << 20))",
    "take memory that processes share": "assert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0",
    "take memory of the kernel": "assert ctypes.CDLL(None).msgget(0, 0o1600) >= 0",
    "take memory that is mapped and shared": "import mmap; mmap.mmap(-1, 2 << 30)",
    "take memory in a folder of memory": "open('/dev/shm/x', 'w')",
    "start a program": "os.posix_spawn('/bin/true', ['true'], {{}})",
    "fill the disk with files that are removed": (
        "for _ in range(100): file = os.open('/tmp', os.O_TMPFILE | os.O_RDWR); os.write(file, bytes(1 << 20))"
    ),
    "fill the disk": "[open(f'/tmp/{{n}}', 'wb').write(bytes(1 << 20)) for n in range(100)]",
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_attempt_fails(attempt, tmp_path):
    """Each pins one hole. The program says if its attempt succeeds, and that it began: silence would be no proof."""
    secret, outside = tmp_path / "secret", tmp_path / "outside"
    secret.write_text("secret")
    with sandbox.socket.create_server(("127.0.0.1", 0)) as listener:
        action = ATTEMPTS[attempt].format(outside=str(outside), secret=str(secret), port=listener.getsockname()[1])
        program = f"""
import ctypes, os, platform, socket
print("began", flush=True)
try:
    {action}
except BaseException:
    os._exit(7)
print("escaped", flush=True)
"""
        outcome = run(program)
    assert outcome.output == b"began\n"
    assert outcome.status == 7
    assert not outside.exists()


def test_threads_are_limited():
    """Pins that this limit ends it and no other. With stacks of the usual size memory ends first, and a thread that
    begins without memory leaves Python's `Thread.start` waiting for it without end."""
    program = """
import os, threading, time
threading.stack_size(1 << 16)
started = 0
try:
    for _ in range(5000):
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        started += 1
except RuntimeError:
    pass
print(started, flush=True)
os._exit(0)
"""
    outcome = run(program, threads=10)
    assert outcome.status == 0
    assert 1 <= int(outcome.output) <= 9


def alive(mark: str) -> list[int]:
    """Processes whose command line holds `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("program", "exceeded"),
    [
        ("while True: pass", "time"),
        ("import os\nos.setsid()\nwhile True: pass", "time"),
        ("import signal\nfor n in range(1, 31):\n  n in (9, 19) or signal.signal(n, 1)\nwhile True: pass", "time"),
        ("import os\nos.closerange(0, 256)\nwhile True: pass", "time"),
        ("import os, time\nos.closerange(0, 256)\ntime.sleep(600)", "time"),
        ("import os\nwhile True: os.write(1, bytes(65536))", "output"),
    ],
)
def test_a_program_without_end_is_ended(program, exceeded):
    """Also one that left its session, one that ignores signals, and ones that close what they write to. Pins a killed
    parent whose program goes on, and a time limit that ended with the output: such a program ran on without end."""
    mark = f"mark-{time.monotonic_ns()}"
    begin = time.monotonic()
    outcome = run(f"{program}  # {mark}", seconds=2, output=1 << 20)
    assert outcome.exceeded == exceeded
    assert len(outcome.output) <= 1 << 20
    assert time.monotonic() - begin < 300
    deadline = time.monotonic() + 120
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(mark)


def test_box_ends_with_the_one_who_asked():
    """Pins code that runs on when evaluation is killed."""
    mark = f"mark-{time.monotonic_ns()}"
    caller = f"""
from infir2.evaluation import sandbox
import sys
program = "import time; print(open('/tmp/x', 'w')); time.sleep(60)  # {mark}"
sandbox.run([sys.executable, "-I", "-c", program], b"", sandbox.Limits(60), sandbox.python_files())
"""
    process = subprocess.Popen([sys.executable, "-c", caller])
    deadline = time.monotonic() + 120
    while len(alive(mark)) < 3 and time.monotonic() < deadline:  # the caller; the box, outside and inside
        time.sleep(0.05)
    assert len(alive(mark)) == 3
    time.sleep(0.3)  # the inside becomes the program
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(mark)


def test_holds_for_a_user_without_rights():
    """Another way in than root's: a user namespace. Pins a box that is whole for root alone."""
    if os.geteuid() != 0:
        pytest.skip("the other tests run as such a user")
    command = [sys.executable, "-c", "from infir2.evaluation import sandbox; print(repr(sandbox.missing()))"]
    done = subprocess.run(
        ["unshare", "--user", "--map-user=1000", "--map-group=1000", *command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "''\n"


@pytest.fixture
def powerless() -> list[str]:
    """A command's first words under which no namespace can be made, as in most containers."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root, to give up its rights, and setpriv")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def test_nothing_runs_where_no_box_can_be_made(powerless, tmp_path):
    """Pins a box that is quietly left out."""
    ran = tmp_path / "ran"
    caller = f"""
from infir2.evaluation import sandbox
import sys
print(sandbox.missing())
sandbox.run([sys.executable, "-I", "-c", "open({str(ran)!r}, 'w')"], b"", sandbox.Limits(9), sandbox.python_files())
"""
    done = subprocess.run([*powerless, sys.executable, "-c", caller], capture_output=True, text=True, check=False)
    assert "does not let us make namespaces" in done.stdout
    assert "SandboxError" in done.stderr
    assert not ran.exists()


# Reviews of programs by LiveCodeBench's checker

SUMS = {"inputs": ["1 2\n", "5 6\n"], "outputs": ["3\n", "11\n"], "fn_name": None}
FUNCTION = {"inputs": ["1\n2"], "outputs": ["3"], "fn_name": "add"}
NO_TESTS = {"inputs": [], "outputs": [], "fn_name": None}


@pytest.mark.parametrize(
    ("code", "tests", "right"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", SUMS, True),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", SUMS, True),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", SUMS, True),
        ("class Solution:\n    def add(self, a, b):\n        return a + b", FUNCTION, True),
        ("print(3)", SUMS, False),
        ("class Solution:\n    def add(self, a, b):\n        return a - b", FUNCTION, False),
        ("this is no program", SUMS, False),
        ("", SUMS, False),
        ("while True: pass", SUMS, False),
        ("import os\nos._exit(0)", SUMS, False),
        ("import ctypes\nwhile True: ctypes.CDLL(None).fork()", SUMS, False),
        ("pass", NO_TESTS, False),
    ],
)
def test_review(code, tests, right, checker):
    """Pins programs that count as right because they ended without a result, or without a test."""
    begin = time.monotonic()
    assert code_review.review(code, json.dumps(tests), checker, seconds=1 if "while" in code else 60).right is right
    assert time.monotonic() - begin < 300


def test_review_command_refuses_without_a_box(powerless, evalscope, tmp_path):
    """Status 2 and the reason, before evalscope touches a task."""
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"datasets": ["live_code_bench"], "work_dir": str(tmp_path / "out")}))
    command = [str(evalscope), str(ROOT / "tools/run_evalscope.py"), "--ask", "--review", str(task)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "training")}
    done = subprocess.run([*powerless, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "code written by a model is not run here: sandbox: this machine does not let us make" in done.stderr
    assert not (tmp_path / "out").exists()
