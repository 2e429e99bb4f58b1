"""Folders of adapters from people one does not know: none of them harms anything."""

import json
import os
import struct

import numpy as np
import pytest

from flora_jax.errors import InputError
from flora_jax.peft.write import write_adapter
from flora_jax.serve.http.adapters import check_folder
from tests.helpers.broken_folders import edit, edit_tensors
from tests.helpers.http_server import CONFIG, KINDS, RANK, TARGETS
from tests.helpers.random_adapters import random_adapter


def write(folder, kind="lora", rank=RANK, seed=0):
    adapter = random_adapter(kind, seed, CONFIG.projections(), 2, rank=rank, targets=TARGETS)
    write_adapter(adapter, folder)
    return folder


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    write(tmp_path / "root/good")
    write(tmp_path / "outside")
    return tmp_path / "root"


def check(root, folder, max_rank=RANK):
    return check_folder(str(folder), root, CONFIG, max_rank)


def refused(root, folder, match, max_rank=RANK):
    with pytest.raises(InputError, match=match):
        check(root, folder, max_rank)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_below_the_root_is_taken_by_relative_and_by_whole_path(root, kind):
    folder = write(root / f"some/{kind}", kind)
    assert check(root, f"some/{kind}") == check(root, folder) == folder
    (root / "link").symlink_to(folder)
    assert check(root, "link") == folder


@pytest.mark.parametrize(
    "folder",
    [
        "../outside",
        "good/../../outside",
        "/etc",
        "missing",
        "",
        "x\0y",
        "\ud800",
        "a" * 5000,
        "~",
        ".",
    ],
)
def test_nothing_outside_the_root_is_looked_at(root, folder):
    refused(root, folder, "below the adapters' root|is missing, or lies outside")


def test_a_link_out_of_the_root_is_not_followed(root):
    (root / "away").symlink_to(root.parent / "outside")
    refused(root, "away", "below the adapters' root")
    (root / "circle").symlink_to(root / "circle")
    refused(root, "circle", "below the adapters' root")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = write(root / f"linked-{name}")
        (folder / name).unlink()
        (folder / name).symlink_to(root.parent / "outside" / name)
        refused(root, folder, f"{name} is missing, or lies outside the root")


def test_a_link_within_the_root_is_followed(root):
    folder = write(root / "cached")
    blob = root / "blob"
    (folder / "adapter_model.safetensors").rename(blob)
    (folder / "adapter_model.safetensors").symlink_to("../blob")
    assert check(root, folder) == folder


def test_pickles_are_not_read(root):
    folder = write(root / "pickled")
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/harm'\ntR.")
    refused(root, folder, "found adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    refused(root, folder, "found adapter_model.bin")


def test_a_pipe_in_place_of_a_file_is_not_opened(root):
    folder = write(root / "piped")
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    refused(root, folder, "is no file")


def test_sizes_are_bounded_before_anything_is_read(root):
    folder = write(root / "huge")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 10 << 30) + whole[8:])
    refused(root, folder, "the header of adapter_model.safetensors has 10737418240 bytes")
    path.write_bytes(whole)
    os.truncate(path, 10 << 30)  # Sparse.
    refused(root, folder, "has 10737418240 bytes, expected at most")
    path.write_bytes(b"\x01\x02")
    refused(root, folder, "expected at most -6|not a whole safetensors file")
    path.write_bytes(whole)
    os.truncate(folder / "adapter_config.json", 1 << 31)
    refused(root, folder, "adapter_config.json has 2147483648 bytes")


def test_ranks_above_the_bound_are_refused(root):
    write(root / "wide", rank=RANK + 1)
    refused(root, "wide", "has rank 3, at most 2 is served")
    assert check(root, "wide", RANK + 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(root, value):
    folder = write(root / "broken")

    def spoil(tensors):
        next(iter(tensors.values())).flat[0] = np.float32(value)

    edit_tensors(folder, spoil)
    refused(root, folder, "not finite")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.*a?)*b(c|d)+e"},
        {"target_modules": r".*.*.*.*c_attn"},
        {"target_modules": "(?=a)b"},
        {"target_modules": "a" * 300},
        {"rank_pattern": {"((a+)+)+$": 2}},
        {"alpha_pattern": {f"x{n}.*": 1 for n in range(20)}},
    ],
)
def test_a_pattern_that_could_match_for_ever_is_refused(root, fields):
    folder = write(root / "slow")
    edit(folder, **fields)
    refused(root, folder, "may take long to match")


def test_a_plain_pattern_is_taken(root):
    folder = write(root / "pattern")
    edit(folder, target_modules=r".*\.(attn\.c_attn|mlp\.c_proj)$")
    assert check(root, folder) == folder


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, json.dumps({"peft_type": "LORA", "r": 10**9})]
)
def test_a_damaged_configuration_is_refused(root, text):
    folder = write(root / "damaged")
    (folder / "adapter_config.json").write_text(text)
    refused(root, folder, "adapter_config.json|damaged")
