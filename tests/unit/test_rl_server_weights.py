"""Where a run hands its weights to a server."""

from pathlib import Path

from hba.rl.server import served_folder


def test_runs_of_one_name_do_not_share_a_folder_in_memory(tmp_path):
    one, other = (served_folder(tmp_path / place / "rl", str(tmp_path / "shm")) for place in ("a", "b"))
    assert one != other and {one.parent, other.parent} == {tmp_path / "shm"}
    assert one == served_folder(tmp_path / "a" / ".." / "a" / "rl", str(tmp_path / "shm"))


def test_without_such_a_place_it_is_the_runs_own():
    assert served_folder(Path("runs/rl"), None) == Path("runs/rl/served")
