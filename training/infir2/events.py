"""What a run said: scalars from its TensorBoard folder, and the steps in its log."""

import re
from pathlib import Path
from typing import NamedTuple

_STEP = re.compile(  # of Megatron, and of infir2.rl
    r"iteration +(?P<i>\d+)/ *(?P<n>\d+) .*?\(ms\): (?P<ms>[0-9.]+) .*? lm loss: (?P<loss>[0-9.E+-]+)"
    r"|step (?P<step>\d+) of (?P<steps>\d+): reward (?P<reward>[0-9.]+).*?, (?P<s>[0-9.]+) s \("
)


class LoggedStep(NamedTuple):
    """A step that a run logged: its number from 1, of how many; its loss in nats or its reward; how long it took."""

    step: int
    steps: int
    what: str  # "loss" or "reward"
    value: float
    seconds: float


def logged_steps(text: str) -> list[LoggedStep]:
    """The steps in a log, in its order."""
    found = []
    for match in _STEP.finditer(text):
        if match["i"]:
            numbers = int(match["i"]), int(match["n"]), "loss", float(match["loss"]), float(match["ms"]) / 1000
        else:
            numbers = int(match["step"]), int(match["steps"]), "reward", float(match["reward"]), float(match["s"])
        found.append(LoggedStep(*numbers))
    return found


def read_scalars(folder: Path | str) -> dict[str, dict[int, float]]:
    """Tag to iteration to value (float32 as written), over all event files in `folder`.

    A resumed run repeats the iterations since its last checkpoint: what was written last counts. FileNotFoundError
    where there is no event file.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted(Path(folder).glob("events.out.tfevents.*"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no TensorBoard events; did the run start?")
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for file in files:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if not value.tensor.float_val:
                    continue
                series = found.setdefault(value.tag, {})
                if event.step not in series or event.wall_time >= series[event.step][0]:
                    series[event.step] = (event.wall_time, value.tensor.float_val[0])
    return {tag: {step: series[step][1] for step in sorted(series)} for tag, series in found.items()}
