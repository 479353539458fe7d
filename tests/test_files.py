import os
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
