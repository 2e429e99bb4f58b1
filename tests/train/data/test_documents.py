"""Documents are read from every kind of source alike, and what cannot be read is named."""

import gzip
import json
import lzma
import os
import re
from pathlib import Path

import pytest

from flora_jax.errors import InputError
from flora_jax.train.data.documents import content_digest, read_documents

RECORDS = [{"content": "aé\n", "path": "x"}, {"text": "b"}, {"content": "", "text": "unread"}]


def write_lines(path, lines):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
    return path


def write_parquet(path, columns):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return path


def texts(source, **options):
    return [found.text for found in read_documents(source, **options)]


def named(source, **options):
    return [(found.name, found.text) for found in read_documents(source, **options)]


@pytest.fixture
def data_sets(tmp_path, monkeypatch):
    """The library, with its cache out of the user's home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.xz"])
def test_documents_are_the_text_column_of_each_line(name, tmp_path):
    path = write_lines(tmp_path / name, [*RECORDS[:2], b"", b" \r", RECORDS[2]])
    assert named(path) == [(f"{name}:1", "aé\n"), (f"{name}:2", "b"), (f"{name}:5", "")]
    assert named(str(path)) == named(path)


def test_a_column_can_be_named(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [{"content": "a", "code": "c"}] * 2)
    assert texts(path, column="code") == ["c", "c"]
    with pytest.raises(InputError, match=r"line 1: no column 'src'; the columns are 'content', 'c"):
        texts(path, column="src")


def test_parquet_gives_the_documents_that_json_lines_give(data_sets, tmp_path):
    rows = [f"text {n} é\n" for n in range(7)]
    lines = write_lines(tmp_path / "d.jsonl.gz", [{"content": row, "n": 1} for row in rows])
    name = "a [1]*.parquet"
    table = write_parquet(tmp_path / name, {"n": [1] * 7, "content": rows})
    assert texts(table) == texts(lines) == rows
    assert [found.name for found in read_documents(table)] == [f"{name}:{n}" for n in range(1, 8)]


def test_rows_without_text_and_tables_without_a_column_are_named(data_sets, tmp_path):
    table = write_parquet(tmp_path / "d.parquet", {"text": ["a", None, "b"], "code": [1, 2, 3]})
    skipped = []
    assert named(table, max_corrupt=0.5, corrupt=skipped) == [
        ("d.parquet:1", "a"),
        ("d.parquet:3", "b"),
    ]
    assert skipped == ["d.parquet, row 2: 'text' is of type NoneType, expected a string"]
    with pytest.raises(
        InputError, match=r"d\.parquet: no column 'src'; the columns are 'text', 'c"
    ):
        texts(table, column="src")


def test_a_damaged_table_is_named(data_sets, tmp_path, caplog):
    table = write_parquet(tmp_path / "d.parquet", {"text": [f"{n}" * 50 for n in range(99)]})
    raw = table.read_bytes()
    table.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match=r"d\.parquet: damaged \(after row 0\): ArrowInvalid"):
        texts(table)
    assert not caplog.records


def test_a_column_that_no_line_has_is_told_once_with_the_option(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [{"code": "a"}] * 3 + [{"code": "b", "x": 1}, b"["])
    with pytest.raises(InputError) as caught:
        texts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 5 of 5 lines cannot be used")
    assert "d.jsonl, line 1: no column 'content' or 'text'; the columns are 'code'; " in message
    assert "--text-column NAME reads another (and 2 more)" in message
    assert "line 2" not in message
    assert "line 4: no column" in message
    assert "line 5: malformed JSON" in message


def test_a_walk_leaves_out_caches_half_written_output_and_what_it_is_told_to(tmp_path):
    files = {
        "a.py": b"1", "b/c.py": b"2", "out/perl/README.md": b"no", "b/run/card.md": b"no",
        "b/__pycache__/c.pyc": b"no", "perl.1a2b3c4d.part/README.md": b"no", "x.npz.1a.part": b"no",
        "cache/CACHEDIR.TAG": b"Signature: 8a477f597d28d172789f06886806bc55\n", "cache/d.py": b"no",
        "other/CACHEDIR.TAG": b"no signature", "other/e.py": b"3",
    }  # fmt: skip
    for name, raw in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    leave_out = [tmp_path / "link", tmp_path / "b" / ".." / "b" / "run"]
    names = [name for name, _ in named(tmp_path, leave_out=leave_out)]
    assert names == ["a.py", "b/c.py", "other/CACHEDIR.TAG", "other/e.py"]
    before = content_digest(tmp_path, leave_out=leave_out)
    (tmp_path / "out" / "metrics.txt").write_text("more")
    assert content_digest(tmp_path, leave_out=leave_out) == before
    assert content_digest(tmp_path) != before


BAD = [
    (b"{", "malformed JSON: Expecting property name enclosed in double quotes at character 1"),
    (b"[]", "found a list, expected an object"),
    (b"3", "found a number, expected an object"),
    (b'"content"', "found a string, expected an object"),
    (b"\xff", "not UTF-8 at byte 0"),
    (b"[" * 200_000, "malformed JSON: nested too deeply"),
    (b'{"text": "a", "text": "b"}', "key 'text' is given twice"),
    (b'{"text": "\\ud83d"}', "'text' has half a surrogate pair at 0"),
    (
        {"path": "x"},
        "no column 'content' or 'text'; the columns are 'path'; --text-column NAME reads another",
    ),
    ({}, "no column 'content' or 'text'; the columns are none; --text-column NAME reads another"),
    ({"content": None, "text": "a"}, "'content' is of type NoneType, expected a string"),
    ({"text": 3}, "'text' is of type int, expected a string"),
]


@pytest.mark.parametrize("line, reason", BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_corrupt_line_is_named_with_its_reason(line, reason, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [RECORDS[0], line, RECORDS[1]])
    skipped = []
    assert texts(path, max_corrupt=0.4, corrupt=skipped) == ["aé\n", "b"]
    assert skipped == [f"d.jsonl, line 2: {reason}"]
    with pytest.raises(InputError) as caught:
        texts(path)
    assert str(caught.value) == (
        f"{path}: 1 of 3 lines cannot be used, over 0.01 of them: {skipped[0]}"
    )


@pytest.mark.parametrize("corrupt, share, stops", [(1, 0.01, 0), (2, 0.01, 1), (5, 0.05, 0),
                                                   (6, 0.05, 1), (0, 0.0, 0), (1, 0.0, 1)])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_more_than_the_share_of_corrupt_lines_stops(corrupt, share, stops, seed, tmp_path):
    import random

    numbers = sorted(random.Random(seed).sample(range(1, 101), corrupt))
    lines = [b"{" if n in numbers else {"text": str(n)} for n in range(1, 101)]
    path = write_lines(tmp_path / "d.jsonl.gz", lines)
    skipped = []
    if not stops:
        good = [str(n) for n in range(1, 101) if n not in numbers]
        assert texts(path, max_corrupt=share, corrupt=skipped) == good
    else:
        with pytest.raises(InputError) as caught:
            texts(path, max_corrupt=share, corrupt=skipped)
        first, *others = numbers
        assert f"d.jsonl.gz, line {first}: malformed JSON" in str(caught.value)
        assert not others or f"(and {len(others)} more)" in str(caught.value)
    assert [int(place.split("line ")[1].split(":")[0]) for place in skipped] == numbers


def test_a_hopeless_file_stops_before_its_end(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [{"text": "a"}] * 500 + [b"{"] * 500)
    skipped = []
    with pytest.raises(InputError, match=r"11 of 511 lines cannot be used.*\(and 10 more\)$"):
        texts(path, corrupt=skipped)
    assert len(skipped) == 11


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.xz"])
@pytest.mark.parametrize("damage", ["truncated", "not packed", "flipped"])
def test_a_damaged_archive_stops_at_once(damage, name, tmp_path):
    path = write_lines(tmp_path / name, [{"content": str(n)} for n in range(2000)])
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[len(raw) // 2] ^= 0xFF
    path.write_bytes({"truncated": raw[:-20], "not packed": b"{}\n", "flipped": raw}[damage])
    with pytest.raises(InputError, match=rf"{re.escape(name)}: damaged after line \d+: "):
        texts(path, max_corrupt=1.0)


def test_source_files_come_by_path_and_others_are_named(tmp_path):
    files = {
        "b/1.py": b"two", "a.py": "é".encode(), "a/z.py": b"", "n": b"4", "b/data.jsonl": b"{",
        "c.rs": b"ok\xff3", "d.png": b"\x89PNG\0", "e.js": b"x" * 1_000_001,
        ".git/config": b"no", ".env": b"no", "b/.x/y.py": b"no",
    }  # fmt: skip
    for name, raw in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "link.py").symlink_to(tmp_path / "absent")
    skipped = []
    assert named(tmp_path, corrupt=skipped) == [
        ("a/z.py", ""), ("a.py", "é"), ("b/1.py", "two"), ("n", "4"),
    ]  # fmt: skip
    assert skipped == [
        "b/data.jsonl: a table below the top level; give it as data of its own",
        "c.rs: not UTF-8 at byte 2",
        "d.png: binary, has a zero byte",
        "e.js: 1000001 bytes, at most 1000000 are read",
    ]
    assert texts(tmp_path, suffixes=(".py",)) == ["", "é", "two"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    (tmp_path / "a.py").write_text("a")
    scan = os.scandir

    def refusing(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="secret: cannot be read: Permission denied"):
        content_digest(tmp_path)


def test_a_file_that_cannot_be_read_is_skipped_with_its_reason(tmp_path, monkeypatch):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(name)
    first = content_digest(tmp_path)
    opened = Path.open

    def refusing(path, *arguments, **options):
        if path.name == "b.py":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    assert content_digest(tmp_path) != first
    skipped = []
    assert named(tmp_path, corrupt=skipped) == [("a.py", "a.py")]
    assert "b.py: " in skipped[0]


def test_a_directory_with_data_files_is_read_from_these(data_sets, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "b.jsonl", [{"text": "2"}, b"{"])
    write_lines(folder / "c.jsonl.gz", [{"text": "3"}])
    write_parquet(folder / "a.parquet", {"text": ["0", "1"]})
    for name in ("README.md", "LICENSE", "._b.jsonl", ".hidden.parquet", "d.jsonl.1a2b.part"):
        (folder / name).write_text("no")
    (folder / "old").mkdir()
    write_lines(folder / "old" / "d.jsonl", [b"no"])
    write_lines(folder / "out.jsonl", [b"no"])
    skipped = []
    leave_out = [folder / "out.jsonl"]
    assert named(folder, max_corrupt=0.2, corrupt=skipped, leave_out=leave_out) == [
        ("a.parquet:1", "0"), ("a.parquet:2", "1"), ("b.jsonl:1", "2"), ("c.jsonl.gz:1", "3"),
    ]  # fmt: skip
    assert len(skipped) == 2
    assert skipped[0].startswith("b.jsonl, line 2: malformed JSON")
    assert skipped[1] == "old/d.jsonl: a table below the top level; give it as data of its own"
    before = content_digest(folder, leave_out=leave_out)
    (folder / "README.md").write_text("more")
    write_lines(folder / "old" / "d.jsonl", [b"more"])
    assert content_digest(folder, leave_out=leave_out) == before
    assert content_digest(folder) != before


@pytest.mark.parametrize(
    "names, found",
    [
        (
            ["b.jsonl", "a.parquet", "src/x.py", "README.md"],
            "{0}: holds both tables (a.parquet) and source files (src/x.py); give one table, or a "
            "directory of nothing but tables or source files",
        ),
        (
            ["README.md", "deep/train/b.jsonl.gz", "deep/train/c.jsonl.gz"],
            "{0}: its tables are below its top level (deep/train/b.jsonl.gz); give {0}/deep/train "
            "or {0}/deep/train/b.jsonl.gz",
        ),
        (
            [
                "README.md",
                "t.csv",
                "tokenizer.json",
                *(f"{d}/{n}.jsonl" for d in "ab" for n in "12"),
            ],
            "{0}: 4 tables are below its top level (a/1.jsonl, a/2.jsonl, b/1.jsonl and 1 more), more "
            "than it has source files (2, the first is t.csv); give a directory that has its tables "
            "itself, such as {0}/a, or one table, such as {0}/a/1.jsonl",
        ),
    ],
)
def test_a_directory_of_which_it_is_not_plain_what_to_read_is_refused(names, found, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    for use in (texts, content_digest):
        with pytest.raises(InputError) as caught:
            use(tmp_path)
        assert str(caught.value) == found.format(tmp_path)


def test_no_more_tables_than_source_files_are_left_out(tmp_path):
    for name in ("a.py", "src/b.py", "data/1.jsonl", "data/2.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no")
    skipped = []
    assert [name for name, _ in named(tmp_path, corrupt=skipped)] == ["a.py", "src/b.py"]
    assert len(skipped) == 2


def test_folders_below_tables_need_not_be_readable(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", [{"text": "1"}])
    (tmp_path / "lost+found").mkdir()
    scan = os.scandir

    def refusing(path):
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert texts(tmp_path) == ["1"]


@pytest.mark.parametrize("lines", [[], [b""], [b"{"]])
def test_no_document_at_all_is_an_error(lines, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", lines)
    with pytest.raises(InputError, match=r"d\.jsonl: no documents"):
        texts(path, max_corrupt=1.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no documents$"):
        texts(tmp_path / "empty")


@pytest.mark.parametrize(
    "limit, count", [(None, 4), (0, 0), (1, 1), (3, 1), (4, 2), (5, 3), (100, 4)]
)
def test_whole_documents_are_taken_until_they_make_the_limit(limit, count, tmp_path):
    wanted = ["aé", "b", "cc", "d"]  # 3, 1, 2, 1 bytes
    path = write_lines(tmp_path / "d.jsonl", [{"text": text} for text in wanted])
    assert texts(path, limit_bytes=limit) == wanted[:count]


def test_corrupt_lines_before_a_limit_count_among_the_lines_read(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [{"text": "a"}, b"{", *[{"text": "a"}] * 998])
    assert len(texts(path)) == 999
    with pytest.raises(InputError, match="1 of 5 lines"):
        texts(path, limit_bytes=4)


@pytest.mark.parametrize("name", ["d.txt", "d.tar.gz", "d.json"])
def test_other_files_are_refused(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        InputError, match=r"expected \.jsonl, \.jsonl\.gz, \.jsonl\.xz, \.parquet or a dir"
    ):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["none.jsonl", "some/none.jsonl", "../x", "a/b/c", "/no/such", ""])
def test_what_is_neither_a_file_nor_a_hub_name_is_not_sought_on_the_hub(
    name, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    if name == "":
        with pytest.raises(InputError, match="no documents"):  # The empty working directory.
            texts(name)
        return
    for use in (texts, content_digest):
        with pytest.raises(InputError, match=f"^{name}: no such file or directory$"):
            use(name)


@pytest.mark.parametrize(
    "source, options",
    [
        ("owner/some.name", {}),
        ("owner/name:data/perl", {"data_dir": "data/perl"}),
        ("owner/name:perl/", {"data_dir": "perl"}),
        ("owner/name:perl", {"name": "perl"}),
    ],
)
def test_a_hub_data_set_is_read_row_by_row(source, options, data_sets, monkeypatch):
    calls = []

    def load_dataset(path, **given):
        calls.append((path, given))
        rows = [{"content": text, "n": 1} for text in ("a", None, "b")]
        return data_sets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(data_sets, "load_dataset", load_dataset)
    skipped = []
    found = named(source, max_corrupt=0.5, corrupt=skipped)
    assert found == [(f"{source}:1", "a"), (f"{source}:3", "b")]
    assert skipped == [f"{source}, row 2: 'content' is of type NoneType, expected a string"]
    assert calls == [(source.split(":")[0], {"split": "train", "streaming": True, **options})]
    with pytest.raises(
        InputError, match=f"{source}: no column 'x'; the columns are 'content', 'n'"
    ):
        texts(source, column="x")


@pytest.mark.parametrize("after", [0, 2])
def test_a_hub_that_fails_is_one_error_with_its_cause(after, data_sets, monkeypatch):
    def rows():
        for number in range(after):
            yield {"text": str(number)}
        raise ConnectionError("line\nbroke")

    monkeypatch.setattr(
        data_sets, "load_dataset", lambda path, **_: data_sets.IterableDataset.from_generator(rows)
    )
    found = read_documents("bigcode/the-stack-dedup:data/perl")
    assert [next(found).text for _ in range(after)] == [str(n) for n in range(after)]
    with pytest.raises(InputError) as caught:
        next(found)
    assert str(caught.value) == (
        "bigcode/the-stack-dedup:data/perl: no such file or directory, and not reachable as a data "
        f"set of the hub (after row {after}): ConnectionError: line broke"
    )


def test_a_network_that_does_not_answer_is_told_at_once(data_sets, monkeypatch, caplog):
    import huggingface_hub

    class Api:
        def dataset_info(self, name, timeout):
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        InputError, match=r"^owner/name: no such file .*: no route to host; HF_HUB_O"
    ):
        texts("owner/name")
    assert not caplog.records


def test_a_table_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "d.jsonl", RECORDS)
    path.chmod(0)

    def refusing(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(InputError, match=r"d\.jsonl: cannot be read: Permission denied$"):
        texts(path)


def test_the_hub_is_not_reachable_offline(data_sets):
    with pytest.raises(InputError, match=r"not reachable as a data set of the hub.*Couldn't reach"):
        texts("owner/name")
    assert content_digest("owner/name") is None


def test_the_digest_of_a_hub_data_set_is_of_its_revision(monkeypatch):
    import huggingface_hub

    class Api:
        def dataset_info(self, name, timeout):
            assert name == "owner/name"
            return type("Info", (), {"sha": revision})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    digests = set()
    for revision in ("1", "2"):  # noqa: B007 read by the class above
        digests |= {content_digest(source) for source in ("owner/name", "owner/name:perl")}
    assert len(digests) == 4


def test_the_digest_is_of_names_and_bytes(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b" / "c.py").write_text("2")
    seen = [content_digest(tmp_path)]

    def changed():
        seen.append(content_digest(tmp_path))
        return len(set(seen)) == len(seen)

    assert content_digest(tmp_path) == seen[0]
    (tmp_path / ".hidden").write_text("3")
    assert content_digest(tmp_path) == seen[0]
    (tmp_path / "a.py").write_text("2")
    assert changed()
    (tmp_path / "a.py").rename(tmp_path / "d.py")
    assert changed()
    (tmp_path / "d.py").write_bytes(b"x" * 1_000_001)
    assert changed()
    (tmp_path / "d.py").write_bytes(b"x" * 1_000_002)
    assert changed()
    table = write_lines(tmp_path / "b" / "e.jsonl", RECORDS)
    assert changed()
    assert content_digest(table) == content_digest(str(table))
