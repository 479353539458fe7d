"""Folders of torch_dist checkpoints: which iteration is taken, and what is refused."""

import os

import pytest

from infir2.checkpoint import TRACKER, CheckpointError, complete_iterations, repair_tracker, tracked


def run_folder(folder, tracker, complete=(10, 20), half_written=()):
    for iteration in (*complete, *half_written):
        (folder / f"iter_{iteration:07d}").mkdir()
    for iteration in complete:
        (folder / f"iter_{iteration:07d}" / "metadata.json").write_text("{}")
    (folder / TRACKER).write_text(tracker)
    return folder


def test_a_tracker_set_back_by_hand_is_obeyed(tmp_path):
    """Pins: a run set back to an older checkpoint goes on from the newest one all the same."""
    run = run_folder(tmp_path, "10")
    assert repair_tracker(run) is None
    assert tracked(run) == 10
    assert complete_iterations(run) == [10, 20]


@pytest.mark.parametrize("text", ["iter_0000010", "0000010", " 10\n"])
def test_other_spellings_of_an_iteration_are_obeyed(tmp_path, text):
    """Pins: a run set back by a folder's name goes on from the newest checkpoint."""
    run = run_folder(tmp_path, text)
    assert repair_tracker(run) is None
    assert (run / TRACKER).read_text().strip() == "10"


@pytest.mark.parametrize("text", ["10 # the good one", "10.0", "checkpoint 10", "10\n20"])
def test_what_somebody_wrote_is_not_repaired(tmp_path, text):
    """Pins: a run set back in other words goes on from the newest checkpoint."""
    with pytest.raises(CheckpointError, match="holds '"):
        repair_tracker(run_folder(tmp_path, text))


@pytest.mark.parametrize(
    ("tracker", "named"), [("", "nothing"), ("30", "iteration 30"), ("15", "iteration 15"), ("\ufffd", "nothing")]
)
def test_a_tracker_that_names_no_complete_checkpoint_is_repaired(tmp_path, tracker, named):
    """Pins: a start from scratch after a kill, and a stop where the newest checkpoint was lost."""
    run = run_folder(tmp_path, tracker, half_written=[30])
    previous = os.umask(0o027)
    try:
        assert named in repair_tracker(run)
    finally:
        os.umask(previous)
    assert tracked(run) == 20
    assert [path.name for path in run.iterdir() if path.is_file()] == [TRACKER]
    assert repair_tracker(run) is None
