"""Results that are collected line by line."""

import functools

import pytest

from flora_jax.bench.receipts import machine
from flora_jax.bench.receipts.collected import (
    append_line,
    by_preset,
    find,
    made,
    read_lines,
    run_presets,
)
from flora_jax.errors import InputError
from flora_jax.files import directory_lock


def test_collected_lines_are_found_by_their_key_and_stay(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    keys = [{"kind": kind, "targets": ("a", "b"), "rank": rank} for kind in "xy" for rank in (1, 2)]
    for number, key in enumerate(keys):
        append_line(path, key, {"value": number})
        assert [line["value"] for line in read_lines(path)] == list(range(number + 1))
    assert [find(path, key)["value"] for key in keys] == [0, 1, 2, 3]
    assert find(path, {"kind": "z"}) is None
    assert find(path, {"absent": None}) is None
    assert {"command", "date", "machine", "versions"} <= set(read_lines(path)[0])
    with pytest.raises(ValueError, match="JSON compliant"):
        append_line(path, {}, {"value": float("nan")})
    path.write_text('{"a": 1}\n{"a"')
    with pytest.raises(InputError, match=r"lines\.jsonl, line 2: malformed JSON"):
        read_lines(path)


def test_a_line_of_another_machine_is_another_line(tmp_path, monkeypatch):
    path, key = tmp_path / "lines.jsonl", {"preset": "p"}
    own = machine.describe()
    append_line(path, key, {"value": 0})
    assert list(by_preset(read_lines(path))) == ["p"]
    for change in ({"cpu": "another"}, {"cores": 999}, {"devices": ["gpu: H100"]}):
        monkeypatch.setattr(machine, "describe", functools.partial(dict, own, **change))
        assert find(path, key) is None
    append_line(path, key, {"value": 1})
    assert find(path, key)["value"] == 1
    monkeypatch.setattr(machine, "describe", lambda: own | {"memory_gib": 1})
    assert find(path, key)["value"] == 0
    groups = by_preset(read_lines(path))
    assert [[line["value"] for line in group] for group in groups.values()] == [[0], [1]]
    assert all(title.startswith("p, ") for title in groups)
    assert list(groups)[1].endswith("gpu: H100")


def test_a_line_of_another_commit_is_another_line(tmp_path, monkeypatch):
    path, key = tmp_path / "lines.jsonl", {"preset": "p"}
    for number, commit in enumerate(("a" * 40, "b" * 40, "b" * 40 + "+", None)):
        monkeypatch.setattr(
            machine, "versions", lambda commit=commit: {"flora_jax": "0.1", "commit": commit}
        )
        assert find(path, key) is None
        append_line(path, key, {"value": number})
        assert find(path, key)["value"] == number
    # What is no time is found all the same.
    monkeypatch.setattr(machine, "versions", lambda: {"flora_jax": "0.1", "commit": "c" * 40})
    assert find(path, key) is None
    assert made(path, key)["value"] == 3
    assert made(path, {"preset": "q"}) is None
    groups = by_preset(read_lines(path))
    assert list(groups) == [f"p, commit {c}" for c in ("a" * 12, "b" * 12, "b" * 12 + "+", "0.1")]


def test_presets_run_while_no_other_process_measures(tmp_path):
    ran = []
    results = tmp_path / "lines.jsonl"
    run_presets(results, ["a", "b"], {"a": 1, "b": 2}, 2, lambda *one: ran.append(one))
    assert ran == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    with pytest.raises(InputError, match="PRESET is 'c', expected some of a, b"):
        run_presets(results, ["a", "c"], ["a", "b"], 1, lambda *one: ran.append(one))
    with directory_lock(tmp_path), pytest.raises(InputError, match="in use by process"):
        run_presets(results, ["a"], ["a"], 1, lambda *one: ran.append(one))
    assert len(ran) == 4


def test_lines_of_other_settings_are_not_mixed():
    def line(preset, scale, seed, value):
        return {"preset": preset, "workload": {"scale": scale, "seed": seed}, "value": value}

    lines = [line("a", 1, 0, 0), line("a", 1, 1, 1), line("a", 0.5, 0, 2), line("b", 0.5, 0, 3)]
    groups = by_preset(lines)
    assert {title: [one["value"] for one in own] for title, own in groups.items()} == {
        "a, scale 1": [0, 1], "a, scale 0.5": [2], "b": [3]
    }  # fmt: skip
