"""Files are written whole or not at all."""

import os

import pytest

from lab.errors import LabError
from lab.files import write_whole


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    for content, bytes_ in (
        ("old", b"old"),
        ("n\u00e9w\n", "n\u00e9w\n".encode()),
        (b"\x00\xff", b"\x00\xff"),
    ):
        write_whole(path, content)
        assert path.read_bytes() == bytes_
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_is_not_there_is_made(tmp_path):
    write_whole(tmp_path / "absent" / "further" / "a.txt", "new")
    assert (tmp_path / "absent/further/a.txt").read_text() == "new"


def test_a_link_keeps_pointing(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_whole(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "new")
    assert os.read(reader, 9) == b"new" and pipe.is_fifo()
    os.close(reader)


def test_a_folder_is_one_line(tmp_path):
    with pytest.raises(LabError, match="cannot write .*: Is a directory"):
        write_whole(tmp_path, "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot write .*file/a.txt: Not a directory"):
        write_whole(tmp_path / "file" / "a.txt", "new")
