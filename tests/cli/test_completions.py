"""What generate writes: whole at the end, kept on the way, never over something of somebody else's."""

import json
from pathlib import Path

import pytest

from flora_jax.cli.completions import CompletionsFile, StandardOutput, open_output
from flora_jax.errors import InputError

JOB = {"seed": 0, "model": "a"}


def line(index, text="é"):
    return {"index": index, "text": text}


def write(path, indices, job=JOB, finish=False, overwrite=False):
    """Writes some lines; returns the indices that were there before."""
    sink = CompletionsFile(path, overwrite)
    try:
        before = sink.begin(job)
        for index in indices:
            sink.add(line(index))
        if finish:
            sink.finish()
    finally:
        sink.close()
    return sorted(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_lines_are_kept_as_they_come_and_stand_in_order_at_the_end(tmp_path):
    path = tmp_path / "out"
    assert write(path, [4, 1]) == []
    assert names(tmp_path) == ["out.part"]
    assert write(path, [0]) == [1, 4]
    with (tmp_path / "out.part").open("a") as file:
        file.write('{"index": 2, "te')  # What a killed process leaves.
    assert write(path, [3, 2], finish=True) == [0, 1, 4]
    assert names(tmp_path) == ["out"]
    found = path.read_text()
    assert [json.loads(text) for text in found.splitlines()] == [line(index) for index in range(5)]
    assert "é" in found


def test_a_part_of_another_job_is_named_and_left_unless_told_to_overwrite(tmp_path):
    path = tmp_path / "out"
    write(path, [0, 1])
    with pytest.raises(InputError, match=r"out\.part: left by a run with other seed; the same"):
        write(path, [], {"seed": 1, "model": "a"})
    assert write(path, []) == [0, 1]
    assert write(path, [0], {"seed": 1, "model": "a"}, overwrite=True) == []
    assert write(path, [], {"seed": 1, "model": "a"}) == [0]


@pytest.mark.parametrize("content", ["notes", "{}\n", '{"jobs": 3}\n'])
def test_a_file_of_somebody_elses_is_left_as_it_is(tmp_path, content):
    (tmp_path / "out.part").write_text(content)
    with pytest.raises(InputError, match=r"out\.part: no file that this command left"):
        write(tmp_path / "out", [0], overwrite=True)
    assert (tmp_path / "out.part").read_text() == content


def test_nothing_is_left_where_nothing_was_completed(tmp_path):
    path = tmp_path / "out"
    CompletionsFile(path, False).close()
    write(path, [])
    assert names(tmp_path) == []


def test_a_second_process_is_refused(tmp_path):
    first = CompletionsFile(tmp_path / "out", False)
    first.begin(JOB)
    with pytest.raises(InputError, match="another process is writing"):
        CompletionsFile(tmp_path / "out", False)
    first.close()
    write(tmp_path / "out", [0])


def test_an_output_that_exists_or_cannot_be_is_refused(tmp_path):
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(InputError, match="out, which exists already; --overwrite replaces it"):
        CompletionsFile(path, False)
    write(path, [0], finish=True, overwrite=True)
    assert json.loads(path.read_text()) == line(0)
    for wrong in (tmp_path, tmp_path / "none" / "out"):
        with pytest.raises(InputError, match="expected a file in an existing directory"):
            CompletionsFile(wrong, True)
    with pytest.raises(InputError, match="/proc/x, which cannot be written: "):
        CompletionsFile(Path("/proc/x"), True)


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "out")
    write(tmp_path / "link", [0], finish=True)
    assert names(tmp_path / "real") == ["out"]
    assert (tmp_path / "link").is_symlink()


def test_standard_output_has_lines_in_order_as_soon_as_they_can_be(capsys):
    sink = open_output(Path("-"), False)
    assert isinstance(sink, StandardOutput)
    assert sink.begin(JOB) == {}
    found = []
    for index in (1, 0, 2):
        sink.add(line(index))
        found.append([json.loads(text)["index"] for text in capsys.readouterr().out.splitlines()])
    assert found == [[], [0, 1], [2]]
