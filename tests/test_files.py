import os
import signal
import stat

import pytest

from infir2 import files


def break_off(path):
    with files.replacing(path) as partial:
        partial.write_text("ne")
        raise RuntimeError


def test_a_file_is_replaced_whole(tmp_path):
    """Pins: half a file after an error, a temporary file left behind, a file that its owner alone can read."""
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError):
        break_off(path)
    assert path.read_text() == "old"
    previous = os.umask(0o027)
    try:
        files.write_text(path, "new")
    finally:
        os.umask(previous)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_lines_end_at_line_feeds_alone(tmp_path, separator):
    """Pins: an answer that holds a line separator makes its file unreadable."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(f'{{"a": "x{separator}y"}}\n{{"b": 1}}\n'.encode())
    assert files.json_lines(path) == [f'{{"a": "x{separator}y"}}', '{"b": 1}']
    path.write_bytes(b"")
    assert files.json_lines(path) == []


def build(path, text="new"):
    with files.building(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text(text)


def kill_while(action, path):
    """Run `action(path)` in a process that is killed, as by SIGKILL, in the middle of it."""
    child = os.fork()
    if child == 0:
        with action(path) as partial:
            (partial / "half" if partial.is_dir() else partial).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("action", [files.building, files.replacing])
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, action):
    """Pins: `.NAME.partial-PID` that stays for good, and "File exists" for the process that has the same number."""
    path = tmp_path / "a"
    kill_while(action, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [".a.partial"]
    build(path) if action is files.building else files.write_text(path, "new")
    assert list(tmp_path.iterdir()) == [path]
    assert not (path / "half").exists()


def test_what_older_versions_left_is_removed(tmp_path):
    """Pins: folders of killed exports that nobody removes, because their names hold another process's number."""
    ours, gone, running = (tmp_path / f".a.partial-{number}" for number in (os.getpid(), 2**22 + 1, os.getppid()))
    others = [tmp_path / ".a.partial-x", tmp_path / ".ab.partial-1", tmp_path / ".a[b].partial-1"]
    for folder in (ours, gone, running, *others):
        folder.mkdir()
        (folder / "w").write_text("half")
    build(tmp_path / "a")
    assert set(tmp_path.iterdir()) == {running, *others, tmp_path / "a"}


def test_a_second_builder_is_refused_and_the_first_goes_on(tmp_path):
    """Pins: two runs at once that write into one another's folder."""
    path = tmp_path / "a"
    with files.building(path) as folder:
        (folder / "a").write_text("first")
        with pytest.raises(BlockingIOError, match="another process is building"):
            build(path)
        assert (folder / "a").read_text() == "first"
    assert (path / "a").read_text() == "first"
    with pytest.raises(FileExistsError, match="a exists; choose another"):
        build(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_follows_the_umask(tmp_path):
    """Pins: safetensors writes with mode 0600, so that colleagues cannot read an exported model."""
    previous = os.umask(0o027)
    try:
        with files.building(tmp_path / "a") as folder:
            (folder / "w").write_text("w")
            (folder / "w").chmod(0o600)
        with files.replacing(tmp_path / "b") as partial:
            partial.unlink()
            partial.touch(0o600)
    finally:
        os.umask(previous)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/w", "b")]
    assert modes == [0o750, 0o640, 0o640]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Pins: after a power cut a file that is complete by its name and empty."""
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    for name in ("replace", "rename"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda a, b, call=original: (seen.append("named"), call(a, b)))
    build(tmp_path / "a")
    partial = str(tmp_path / ".a.partial")
    assert set(seen[:-2]) == {partial, f"{partial}/inner", f"{partial}/inner/a"}
    assert seen[-2:] == ["named", str(tmp_path)]
    seen.clear()
    files.write_text(tmp_path / "b", "text")
    assert seen == [str(tmp_path / ".b.partial"), "named", str(tmp_path)]
