"""A model directory's digest tells apart what would complete in other ways, however little differs."""

import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flora_jax.checkpoints import digest
from flora_jax.checkpoints.digest import model_digest
from flora_jax.errors import InputError
from flora_jax.shipped import ASSETS


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ASSETS / "mini", tmp_path / "model")
    return tmp_path / "model"


def test_a_copy_has_the_same_digest_and_its_readme_is_not_of_the_model(folder):
    (folder / "README.md").write_text("other words")
    assert model_digest(folder) == model_digest(ASSETS / "mini")


def test_one_number_in_the_last_row_of_the_embedding_counts(folder):
    file = folder / "model.safetensors"
    tensors = {name: np.array(value) for name, value in load_file(file).items()}
    save_file(tensors, file)
    before, stat = model_digest(folder), file.stat()
    name = next(name for name in tensors if name.endswith("wte.weight"))
    tensors[name][-1, -1] += 1
    save_file(tensors, file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (stat.st_mtime_ns, stat.st_size)
    assert model_digest(folder) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_what_decides_tokens_and_their_end_counts(folder, name):
    before = model_digest(folder)
    with (folder / name).open("a") as file:
        file.write("\n")
    assert model_digest(folder) != before


def test_parts_in_parallel_are_all_of_a_file(folder, monkeypatch):
    file = folder / "model.safetensors"
    monkeypatch.setattr(digest, "_PART", file.stat().st_size // 3)
    before = model_digest(folder)
    for place in (0.1, 0.5, 0.9, 1.0):
        at = int(place * (file.stat().st_size - 1))
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)
        assert model_digest(folder) != before
        content[at] ^= 1
        file.write_bytes(content)
    assert model_digest(folder) == before


def test_a_directory_without_weights_has_none(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        model_digest(folder)
