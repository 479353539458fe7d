"""Files and folders that are whole or absent, and lines of JSON. The standard library alone.

Each is written under a temporary name beside it and renamed when its bytes are on the disk: a reader, a kill or a power
cut sees the old one or the new one. The temporary name is always the same, so what a killed run left is removed by the
next one. Permissions follow the umask, whatever the library that wrote the file thinks of them.

    replacing, write_text  one file, which may exist
    building               a folder, which must not
"""

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, to be written by the caller; then it becomes `path`. After an error the
    temporary file is removed, and `path` is as it was. Another process that writes the same file waits."""
    partial = partial_name(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _locked(partial, os.O_WRONLY | os.O_CREAT, wait=True) as lock:
        try:
            yield partial
            os.chmod(partial, os.fstat(lock).st_mode & 0o666)  # a library may have put another file there
            _sync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file of this text, UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def building(output: Path) -> Iterator[Path]:
    """Yields an empty folder beside `output`; renames it to `output` at the end, or removes it after an error.

    BlockingIOError while another process builds the same output; FileExistsError where `output` exists, unless it is an
    empty folder.
    """
    refuse_existing(output)
    with holding(output) as partial:
        clear(partial)
        try:
            yield partial
            publish(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def holding(output: Path) -> Iterator[Path]:
    """The folder beside `output` where it is made, with what a killed run left in it, held by this process alone.
    BlockingIOError while another one holds it."""
    partial = partial_name(output)
    partial.parent.mkdir(parents=True, exist_ok=True)
    _remove_older(output)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_locked(partial, os.O_RDONLY | os.O_DIRECTORY, wait=False))
        except BlockingIOError:
            raise BlockingIOError(f"another process is building {output}. Wait for it, or end it.") from None
        yield partial


def publish(made: Path, output: Path) -> None:
    """Give the folder `made` the name `output`, when all that is in it is on the disk and readable by the umask."""
    mode = made.stat().st_mode & 0o666
    for folder, _, names in os.walk(made):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(mode)
                _sync(path)
        sync_folder(Path(folder))
    refuse_existing(output)  # somebody may have made it since
    os.rename(made, output)
    sync_folder(output.parent)


def refuse_existing(output: Path) -> None:
    """FileExistsError unless there is nothing at `output`, or an empty folder."""
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise FileExistsError(f"{output} exists; choose another output folder or remove it")


def partial_name(path: Path) -> Path:
    """Where `path` is made."""
    return path.with_name(f".{path.name}.partial")


def _remove_older(output: Path) -> None:
    """Remove what killed runs of older versions left, `.NAME.partial-PID`, but not that of a process that runs."""
    for left in output.parent.glob(f"{glob.escape(partial_name(output).name)}-*"):
        number = left.name.rpartition("-")[2]
        if number.isdigit() and (int(number) == os.getpid() or not Path("/proc", number).exists()):
            _remove(left)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove everything in a folder, but not the folder."""
    for entry in folder.iterdir():
        _remove(entry)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    _sync(folder, os.O_DIRECTORY)


def json_lines(path: Path, errors: str = "strict") -> list[str]:
    """The lines of a JSON-lines file, without their line feeds.

    They end at line feeds alone: `str.splitlines` also cuts at U+2028, U+2029 and U+0085, which JSON leaves in strings.
    """
    text = path.read_bytes().decode("utf-8", errors)
    return text.removesuffix("\n").split("\n") if text else []


def _sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path, flags: int, *, wait: bool) -> Iterator[int]:
    """An open descriptor of `path`, made if it is not there, that one process has at a time. The kernel lets go of the
    lock when the process ends, however it ends."""
    descriptor = _lock(path, flags, wait)
    while not _is_at(descriptor, path):  # its last holder has renamed or removed it meanwhile
        os.close(descriptor)
        descriptor = _lock(path, flags, wait)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(path: Path, flags: int, wait: bool) -> int:
    if flags & os.O_DIRECTORY:
        path.mkdir(exist_ok=True)
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False
