#!/usr/bin/env python
"""Run training commands side by side, each into its own log, with a progress bar for each, or lines in a file.

    python tools/side_by_side.py --run FP8 exp/A/log.txt "bash scripts/CPT/InfiR2_CPT_FP8_tiny.sh" \
        --run BF16 exp/B/log.txt "bash scripts/CPT/InfiR2_CPT_BF16_tiny.sh"

When one fails the others are ended, the last lines of its log are shown, and its exit status is ours. Ctrl-C ends all.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from infir2.events import logged_steps


class Run:
    """A command in a process group of its own, with a bar that follows its log; without one where nobody watches."""

    def __init__(self, label: str, log: Path, command: str, position: int):
        self.label, self.log, self.offset = label, log, 0
        self.step, self.steps = 0, 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command_words(command), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.bar = tqdm(desc=f"{label}: starting", unit="step", position=position, leave=False, disable=None)

    def update(self) -> None:
        """Move the bar to what the log says last."""
        with open(self.log, "rb") as file:
            file.seek(self.offset)
            lines = file.read()
        complete = lines.rfind(b"\n") + 1
        self.offset += complete
        found = logged_steps(lines[:complete].decode(errors="replace"))
        if not found:
            self.bar.refresh()
            return
        last = found[-1]
        if not self.steps:
            self.bar.reset(total=last.steps)
            self.bar.initial = self.bar.n = last.step  # the rate counts from here: a resumed run starts late
        self.step, self.steps, self.said = last.step, last.steps, f"{last.what} {last.value:.3f}"
        self.bar.set_description(f"{self.label}: {self.said}", refresh=False)
        self.bar.update(last.step - self.bar.n)

    def stop(self) -> None:
        """End the command and what it started; politely first."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, sign)
                try:
                    self.process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    continue


def command_words(command: str) -> list[str]:
    """The words of a command line. ValueError where a shell could not read it, and for an empty one."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"the command {command!r} cannot be read: {error}") from None
    if not words:
        raise ValueError(f"the command {command!r} is empty")
    return words


class Quarters:
    """Where there is no terminal for bars: a line at each quarter of the way, with the time left."""

    def __init__(self) -> None:
        self.began, self.first, self.next = 0.0, 0, 0.25

    def update(self, runs: list[Run]) -> None:
        if not all(run.steps for run in runs):
            return
        behind = min(runs, key=lambda run: run.step / run.steps)
        if not self.began:
            self.began, self.first = time.monotonic(), behind.step
        share = behind.step / behind.steps
        if share < self.next or behind.step == self.first:
            return
        self.next = share // 0.25 * 0.25 + 0.25
        left = (time.monotonic() - self.began) / (behind.step - self.first) * (behind.steps - behind.step)
        said = ", ".join(f"{run.label} step {run.step} of {run.steps}, {run.said}" for run in runs)
        print(f"  {said}; about {left:.0f} s left", file=sys.stderr, flush=True)


def follow(runs: list[Run]) -> Run | None:
    """Show the way until all have ended; returns the first that failed, having stopped the others."""
    quarters = None if sys.stderr.isatty() else Quarters()
    while True:
        ended = [run.process.poll() for run in runs]  # before reading the logs: nothing that was written is missed
        for run in runs:
            run.update()
        if quarters:
            quarters.update(runs)
        failed = [run for run, status in zip(runs, ended, strict=True) if status]
        if failed or None not in ended:
            return failed[0] if failed else None
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=3, action="append", required=True, metavar=("LABEL", "LOG", "COMMAND"))
    wanted = parser.parse_args().run
    runs: list[Run] = []
    try:
        for position, (label, log, command) in enumerate(wanted):
            try:
                runs.append(Run(label, Path(log), command, position))
            except (OSError, ValueError) as error:
                parser.exit(2, f"error: {label}: {error}; give --run LABEL LOG COMMAND\n")
        failed = follow(runs)
    finally:
        for run in runs:
            run.stop()
            run.bar.close()
    if failed:
        tail = failed.log.read_text(errors="replace").splitlines()[-25:]
        print("\n".join([f"{failed.label} failed; the end of {failed.log}:", *tail]), file=sys.stderr)
        sys.exit(failed.process.returncode if failed.process.returncode > 0 else 1)


if __name__ == "__main__":
    main()
