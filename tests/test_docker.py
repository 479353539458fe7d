"""docker/: an image that pins what the requirement files pin, and that is not built where a package does not import."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK = ROOT / "docker/check_imports.py"


def check(*files: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, CHECK, *files], capture_output=True, text=True, check=False)


def test_packages_that_are_missing_or_others_are_told(tmp_path):
    """Pins an image with another version than the pinned one, or without a package."""
    file = tmp_path / "requirements.txt"
    file.write_text("xxhash==0.0.1  # a comment\n\n# another\nabsent-package==1.0\ntqdm==4.70.1\n")
    done = check(file)
    assert done.returncode == 1
    assert re.search(r"^error: xxhash is [\d.]+, and 0.0.1 is pinned$", done.stderr, re.MULTILINE)
    assert "error: absent-package: PackageNotFoundError" in done.stderr
    assert done.stdout == "tqdm 4.70.1\n"


def test_modules_of_a_namespace_are_imported(tmp_path):
    """Pins `import megatron_core`, which no package is called."""
    file = tmp_path / "requirements.txt"
    file.write_text("safetensors==0.8.0\n")
    assert check(file).returncode == 0
    program = f"import sys; sys.path.insert(0, {str(CHECK.parent)!r}); import check_imports; "
    program += "print(check_imports.modules('megatron-core'), check_imports.modules('pyyaml'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "'megatron.core'" in done.stdout
    assert "'yaml'" in done.stdout


def test_every_requirement_file_is_exact_installed_and_checked():
    """Pins a file of pins that the image leaves out, and a range where a version belongs."""
    text = (ROOT / "docker/Dockerfile").read_text()
    for file in ("requirements.txt", "requirements-gpu.txt", "requirements-sglang.txt", "requirements-eval.txt"):
        assert len(re.findall(rf"\b{file}\b", text)) == 3, f"{file}: copied, installed, checked"
        for line in (ROOT / file).read_text().splitlines():
            words = line.partition("#")[0].strip()
            assert not words or re.fullmatch(r"[A-Za-z0-9._-]+(\[\w+\])?==[\w.+]+", words), f"{file}: {line}"
