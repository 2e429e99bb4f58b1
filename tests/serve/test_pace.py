"""Steps of a dispatch by time."""

from flora_jax.serve.pace import Pace


def test_as_many_steps_as_the_last_ones_say_fit_the_time():
    pace = Pace(0.05)
    assert pace.steps(16) == 1  # Nothing is known.
    pace.took(1, 0.0, 0.009)
    assert pace.steps(16) == 5
    assert pace.steps(3) == 3
    pace.took(5, 1.0, 1.5)  # Slower now: more rows, or longer ones.
    assert pace.steps(16) == 1
    pace.took(1, 2.0, 2.001)
    assert pace.steps(16) == 16


def test_a_dispatch_behind_another_begins_when_that_one_ends():
    pace = Pace(0.05)
    pace.took(1, 0.0, 0.1)
    pace.took(2, 0.01, 0.12)
    assert pace.steps(16) == 5


def test_dispatches_of_prompts_say_nothing_of_steps_but_keep_others_waiting():
    pace = Pace(0.05)
    pace.took(1, 0.0, 0.01)
    pace.took(0, 0.1, 3.0)
    assert pace.steps(16) == 5
    pace.took(1, 2.0, 3.025)
    assert pace.steps(16) == 2


def test_without_a_bound_time_decides_nothing():
    pace = Pace(None)
    assert pace.steps(16) == 16
    pace.took(16, 0.0, 1e9)
    assert pace.steps(16) == 16
