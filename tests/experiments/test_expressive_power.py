"""Students of every kind fitted to teachers: what is exact is found, and results are made once."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import expressive_power
from experiments.expressive_power import Results, Setting, Student
from flora_jax.adapters.kind import kind_of
from tests.helpers.tiny_training import CONFIG, tiny_model

TARGET = "attn.c_attn"


@pytest.fixture
def setting():
    return Setting(types.SimpleNamespace(config=CONFIG), tiny_model(), TARGET)


def wanted(setting, kind, rank):
    params = setting.random(kind, rank).layers[0][TARGET]
    return kind_of(params).merge(params, setting.weight(0), None)[0]


def left(student, setting, wanted_IO):
    W_IO = setting.weight(0)
    found = expressive_power.fitted(student, W_IO, wanted_IO)
    return float(jnp.sum((found - wanted_IO) ** 2) / jnp.sum((W_IO - wanted_IO) ** 2))


def test_students_have_every_rank_but_ia3(setting):
    found = list(expressive_power.students((1, 4), ("lora", "ia3")))
    assert found == [("lora", 1), ("lora", 4), ("ia3", 1)]


@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_a_random_teacher_moves_every_weight_by_its_share(kind, setting):
    for number, layer in enumerate(setting.random(kind, 2).layers):
        W_IO = setting.weight(number)
        moved_IO = kind_of(layer[TARGET]).merge(layer[TARGET], W_IO, None)[0] - W_IO
        share = jnp.linalg.norm(moved_IO) / jnp.linalg.norm(W_IO)
        np.testing.assert_allclose(share, expressive_power.MOVED, rtol=1e-5)


# HiRA of rank 2 is FLoRA of rank 3.
@pytest.mark.parametrize(
    "teacher, enough, too_few",
    [
        (("lora", 2), [Student("lora", 2), Student("lora", 3)], [Student("lora", 1)]),
        (("hira", 2), [Student("hira", 2), Student("flora", 3)], [Student("flora", 2)]),
    ],
)
def test_a_student_of_enough_rank_is_its_teacher(teacher, enough, too_few, setting):
    changed_IO = wanted(setting, *teacher)
    for student in enough:
        assert left(student, setting, changed_IO) < 1e-4
    for student in too_few:
        assert left(student, setting, changed_IO) > 0.05


def test_more_components_than_a_change_has_leave_nothing(setting):
    assert left(Student("flora", 16), setting, wanted(setting, "hira", 2)) < 1e-3


def test_the_best_scales_of_outputs_are_found(setting):
    W_IO = setting.weight(0).at[:, 0].set(0.0)
    scale_O = jax.random.normal(jax.random.key(3), W_IO.shape[1:])
    found = expressive_power.best_scales(W_IO, W_IO * scale_O[None])
    np.testing.assert_allclose(found, W_IO * scale_O[None], rtol=1e-5, atol=1e-6)


def test_a_stage_is_made_once_and_written_as_a_table(setting, monkeypatch, tmp_path):
    monkeypatch.setattr(expressive_power, "RESULTS", tmp_path / "results" / "power.jsonl")
    monkeypatch.setattr(expressive_power, "RANKS", (1, 2))
    settings = {"stage": "layer", "model": "tiny", "target": TARGET}
    expressive_power.run_layer(setting, Results(settings), (), 2)
    expressive_power.write_tables()
    path = tmp_path / "results" / "power.md"
    assert f"## layer, tiny, {TARGET}; teacher: noise of full rank" in path.read_text()
    assert "| rank | lora | flora | hira | ia3 |" in path.read_text()
    again = []

    def fitted(student, W_IO, wanted_IO):
        again.append(student)
        return wanted_IO

    monkeypatch.setattr(expressive_power, "fitted", fitted)
    expressive_power.run_layer(setting, Results(settings), (), 2)
    assert not again
    # Another model's are others.
    expressive_power.run_layer(setting, Results(settings | {"model": "large"}), (), 2)
    assert again
