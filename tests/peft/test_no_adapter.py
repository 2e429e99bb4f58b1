"""A path that holds no adapter is told by what lies there, and by what is near it."""

import pytest

from flora_jax.errors import InputError
from flora_jax.peft.no_adapter import RUN_FILES, no_adapter
from flora_jax.peft.read import read_adapter, write_adapter
from flora_jax.serve.registry import digest
from flora_jax.shipped import near_adapters, shipped_adapters
from flora_jax.train.options import CONFIG, METRICS
from tests.helpers.broken_folders import PROJECTIONS, make


def told(path):
    """The message, which whoever reads the folder and whoever hashes it have alike."""
    found = []
    for use in (digest, lambda path: read_adapter(path, PROJECTIONS, 2)):
        with pytest.raises(InputError) as caught:
            use(path)
        found.append(str(caught.value))
    assert found[0] == found[1] == no_adapter(path)
    return found[0]


@pytest.mark.parametrize(
    "name, near",
    [
        ("flora/pearl", "flora/perl, lora/perl, dora/perl"),
        ("perl", ", ".join(n for n in shipped_adapters() if n.endswith("/perl"))),
        ("lora/cobol", ", ".join(n for n in shipped_adapters() if n.startswith("lora/"))),
    ],
)
def test_a_shipped_name_that_is_nearly_right_is_told_what_is_near(
    name, near, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    said = "no adapter folder is there, nor is one of this name shipped"
    assert told(name) == f"{name}: {said}; near it: {near}"


def test_a_kind_names_all_of_it_and_a_strange_word_none():
    assert near_adapters("Flora") == [n for n in shipped_adapters() if n.startswith("flora/")]
    assert near_adapters("runs/none") == near_adapters("nowhere") == []


def test_a_path_without_a_folder_or_with_a_file_is_told(tmp_path):
    is_none = "no adapter folder is there (adapter_config.json and its weights)"
    assert told(tmp_path / "flora/pearl") == f"{tmp_path}/flora/pearl: {is_none}"
    (tmp_path / "file").write_text("")
    assert told(tmp_path / "file") == f"{tmp_path}/file: is a file, expected an adapter's folder"


def test_a_run_of_training_is_told_with_its_adapters(tmp_path):
    assert RUN_FILES == (CONFIG, METRICS)
    for name in RUN_FILES:
        (tmp_path / name).write_text("")
    is_run = f"{tmp_path} is a run of flora-jax train; its adapters: "
    assert told(tmp_path) == f"{is_run}none yet"
    for name in ("b", "a"):
        write_adapter(make("lora"), tmp_path / name)
    assert told(tmp_path) == f"{is_run}{tmp_path}/a, {tmp_path}/b"
    (tmp_path / CONFIG).unlink()
    missing = f"{tmp_path}: no adapter folder: adapter_config.json is missing"
    assert told(tmp_path) == f"{missing}; adapters in it: {tmp_path}/a, {tmp_path}/b"


def test_weights_without_their_configuration_are_told(tmp_path):
    folder = write_adapter(make("lora"), tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    said = f"{folder}: no adapter folder: adapter_config.json is missing beside adapter_model.safetensors"
    assert no_adapter(folder) == said
    with pytest.raises(InputError) as caught:
        read_adapter(folder, PROJECTIONS, 2)
    assert str(caught.value) == said
