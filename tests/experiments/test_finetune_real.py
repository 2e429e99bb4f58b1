"""The study of a real model: its results are told apart by what they are of."""

import pytest

from experiments import finetune_real
from experiments.finetune_real import Results, Run
from flora_jax.errors import InputError

SETTINGS = {"model": "one", "preset": "cpu", "steps": 20}
RUN = Run("FLoRA r 1", ("perl", "lua"), {"kind": "flora"})


def line(rate, bits, kind="flora", init=None):
    return {
        "kind": kind, "rank": 1, "init": init, "learning_rate": rate, "tokens_trained": 10,
        "parameters": 5, "bits_per_byte": bits, "bits_per_byte_change": -0.1,
        "bits_per_byte_change_95": [-0.2, -0.1], "accuracy": 0.5, "accuracy_change": 0.1,
        "accuracy_change_95": [0.0, 0.2],
    }  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "lines.jsonl"


def test_a_run_is_there_with_all_its_languages_of_the_same_model_preset_and_steps(path):
    found = Results(path, SETTINGS)
    found.add("main", RUN, {"perl": line(0.1, 1.0)})
    assert not found.has("main", RUN)
    found.add("main", RUN, {"lua": line(0.1, 1.0)})
    assert found.has("main", RUN)
    assert not found.has("sweep", RUN)
    for other in ({"model": "two"}, {"preset": "gpu"}, {"steps": 40}):
        assert not Results(path, SETTINGS | other).has("main", RUN)


def test_a_rate_is_of_the_same_model_preset_kind_and_start(path):
    found = Results(path, SETTINGS)
    frozen = {"kind": "flora", "init": "frozen_ones"}
    for name, own in (
        ("a", line(0.1, 1.3)), ("b", line(0.2, 1.2)), ("c", line(0.3, 1.1, init="frozen_ones")),
        ("d", line(0.4, 1.0, kind="lora")),
    ):  # fmt: skip
        found.add("sweep", Run(name, ("perl",), {}), {"perl": own})
    Results(path, SETTINGS | {"model": "two"}).add("sweep", RUN, {"perl": line(0.5, 0.1)})
    assert found.rate({"kind": "flora"}) == 0.2
    assert found.rate(frozen) == 0.3
    # Longer runs have the sweep's rate.
    assert Results(path, SETTINGS | {"steps": 99}).rate({"kind": "lora"}) == 0.4
    with pytest.raises(InputError, match="kind hira"):
        found.rate({"kind": "hira"})
    text = path.with_suffix(".md").read_text()
    assert "## sweep: one, preset cpu, 10 tokens" in text
    assert "## sweep: two, preset cpu, 10 tokens" in text


def test_every_shape_has_a_swept_rate():
    def known(shape):
        return shape["kind"], shape.get("init")

    swept = {known(finetune_real.SHAPES[name]) for name in finetune_real.SWEPT}
    for preset in finetune_real.PRESETS.values():
        assert {known(shape) for shape in preset.shapes.values()} <= swept
