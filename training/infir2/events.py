"""Scalars of a run, read back from its TensorBoard folder."""

from pathlib import Path


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
