"""What a run says of its data, and what of its options a run to resume has already."""

import json

import numpy as np
import pytest

from flora_jax.errors import InputError
from flora_jax.train.data.packing import PackedTokens
from flora_jax.train.directory import options_to_resume, report_documents

PACKED = PackedTokens(np.zeros(5, np.uint16), np.zeros(2, np.int64), ("a", "b"), 3)
RUN = {
    "model": "mini", "kind": "lora", "data": {"b": "b.jsonl", "a": "a.jsonl"}, "rank": 2,
    "targets": ["c_attn", "c_fc"], "learning_rate": 1.0, "alpha": None, "keep": 2,
}  # fmt: skip


def said_of(skipped, where="data.json"):
    said = []
    report_documents("data mine", PACKED, skipped, said.append, where)
    assert said[0] == "data mine: 2 documents, 5 tokens"
    return said[1:]


def test_what_is_skipped_for_one_reason_is_one_line():
    binary = [f"assets/{n}.safetensors: binary, has a zero byte" for n in range(26)]
    lines = [f"d.jsonl, line {n}: malformed JSON: bad at character {n}" for n in (3, 17)]
    skipped = ["c.rs: not UTF-8 at byte 2", *binary[:13], *lines, *binary[13:]]
    assert said_of(skipped) == [
        "data mine: skipped c.rs: not UTF-8 at byte 2",
        "data mine: 26 files skipped: binary, has a zero byte (assets/0.safetensors, 25 more); "
        "see data.json",
        "data mine: 2 lines skipped: malformed JSON: bad at character 3 (d.jsonl, line 3, 1 more); "
        "see data.json",
    ]
    assert not any("see" in line for line in said_of(skipped, None))
    assert said_of([]) == []


def test_lines_about_what_is_skipped_are_few_whatever_the_reasons():
    skipped = [f"d.jsonl, row {n}: {chr(97 + n)}" for n in range(9)]
    assert said_of(skipped)[4:] == [
        "data mine: skipped d.jsonl, row 4: e",
        "data mine: skipped 4 more for other reasons; see data.json",
    ]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    return tmp_path


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rank": 2, "targets": "c_attn, c_fc", "learning_rate": 1, "alpha": None, "kind": None},
        {"data": {"b": "b.jsonl", "a": "a.jsonl"}, "targets": ["c_attn", "c_fc"]},
    ],
)
def test_what_is_not_given_is_the_runs(run, given):
    found = options_to_resume(run, given)
    assert found | {"targets": [*found["targets"]]} == RUN
    assert [*found["data"]] == ["b", "a"]


def test_what_does_not_touch_the_result_may_be_given_anew(run):
    assert options_to_resume(run, {"keep": 5, "ranks": 1}) == RUN | {"keep": 5, "ranks": 1}


@pytest.mark.parametrize(
    "given, found",
    [
        ({"rank": 3}, "rank 2, now 3"),
        ({"targets": "c_fc"}, 'targets ["c_attn", "c_fc"], now ["c_fc"]'),
        (
            {"data": {"a": "a.jsonl", "b": "b.jsonl"}},
            'data {"b": "b.jsonl", "a": "a.jsonl"}, now {"a"',
        ),
        ({"alpha": 3.0}, "alpha null, now 3.0"),
    ],
)
def test_what_is_given_must_be_the_runs(run, given, found):
    with pytest.raises(InputError) as caught:
        options_to_resume(run, given)
    assert f"{run}/config.json: the run to resume has {found}" in str(caught.value)


def test_without_a_run_there_must_be_enough_to_start_one(tmp_path):
    assert options_to_resume(tmp_path, {"kind": "lora"}) == {"kind": "lora"}
    with pytest.raises(InputError, match="no such file, so there is no run to resume"):
        options_to_resume(tmp_path, {"keep": 3})
