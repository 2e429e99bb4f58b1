"""Lines of JSON: every bad one is named with its file, its line and what is wrong."""

import gzip
import re

import pytest

from flora_jax.errors import InputError
from flora_jax.jsonl import Journal, parse_lines, read_lines, read_objects


@pytest.mark.parametrize(
    "line, problem",
    [
        (b"{", "malformed JSON: Expecting property name enclosed in double quotes at character 1"),
        (b"[1]", "found a list, expected an object"),
        (b"3", "found a number, expected an object"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' is given twice"),
        (b"[" * 100_000, "malformed JSON: nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_named_with_its_number(tmp_path, line, problem, suffix):
    path = tmp_path / f"lines{suffix}"
    content = b'\xef\xbb\xbf{"a": 1}\n\n' + line + b'\n{"a": 2}\n'
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(InputError, match="^" + re.escape(f"{path}, line 3: {problem}")):
        list(read_objects(path))
    first, bad, last = read_lines(path)
    assert (first.value, last.value, last.number) == ({"a": 1}, {"a": 2}, 4)
    assert bad.problem.startswith(problem)


def test_what_is_no_file_of_lines_is_named(tmp_path):
    for path, said in ((tmp_path / "absent", "no such file"), (tmp_path, "is a directory")):
        with pytest.raises(InputError, match=re.escape(f"{path}: {said}")):
            list(read_objects(path))
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(b'{"a": 1}\n' * 3)[:-9])
    with pytest.raises(InputError, match=rf"{cut}: damaged after line \d: "):
        list(read_objects(cut))


def test_lines_of_text_are_read_as_those_of_a_file():
    (line,) = parse_lines(["\n", '{"a": "é"}'], "standard input")
    assert (line.where, line.value) == ("standard input, line 2", {"a": "é"})


def test_a_journal_loses_only_a_line_half_written(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"a": 1})
        with pytest.raises(InputError, match="another process is writing"):
            Journal(path)
    for half in (b'{"b": 2', b'{"b": 2}', b"\xff\xfe\n"):
        with path.open("ab") as file:
            file.write(half)
        with Journal(path) as journal:
            assert journal.read() == [{"a": 1}]
    assert path.read_text() == '{"a": 1}\n'


def test_a_journal_damaged_in_the_middle_is_left_as_it_is(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"a": 1}\n{"a" 2}\n{"a": 3}\n')
    with Journal(path) as journal, pytest.raises(InputError, match=f"{path}, line 2: malformed"):
        journal.read()
    assert path.read_text().count("\n") == 3


def test_a_journal_is_cut_to_its_first_lines_and_goes_on(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        for number in range(4):
            journal.append({"step": number})
        journal.cut(2)
        journal.append({"step": 9})
        assert [line["step"] for line in journal.read()] == [0, 1, 9]
        journal.cut(7)
        assert len(journal.read()) == 3
        with pytest.raises(ValueError, match="not JSON compliant"):
            journal.append({"step": float("nan")})
        assert len(journal.read()) == 3
