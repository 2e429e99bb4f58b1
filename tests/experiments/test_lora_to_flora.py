"""The study of LoRAs as multiplicative adapters: what random weights keep, and its tables."""

from experiments import lora_to_flora


def test_of_a_random_weight_a_component_keeps_little_and_of_ones_everything(monkeypatch):
    monkeypatch.setattr(lora_to_flora, "SIZES", (40, 60))
    kept = dict(lora_to_flora.kept_of_random(rank=1, seed=0))
    assert kept["ones, normal change"] > 1 - 1e-5
    # One singular value of noise has 0.082 of it.
    assert 0.05 < kept["normal, change of signs"] < 0.15
    assert kept["normal, change of signs"] < kept["normal, normal change"]
    assert kept["normal, normal change"] < kept["its sizes, normal change"] < 0.9


def line(adapter, kept, seconds):
    return {
        "model": "mini", "source": "lora", "to": "flora", "way": "moments", "rank": 2,
        "adapter": adapter, "parameters": 1500, "kept": kept, "weights_error": 0.5, "seconds": seconds,
    }  # fmt: skip


def test_a_table_has_the_mean_and_the_range_over_adapters():
    title, table = lora_to_flora.conversion_tables([line("a", 0.5, 10.0), line("b", 0.25, 20.0)])
    assert title == "## lora as flora, mini"
    assert table.splitlines()[2] == (
        "| moments | 2 | 1,500 | 2 | 37.5% (25.0% to 50.0%) | 0.500 (0.500 to 0.500) | 15 (10 to 20) |"
    )
    # An adapter that gains nothing has no share of it.
    _, table = lora_to_flora.conversion_tables([line("a", None, 10.0)])
    assert table.splitlines()[2] == "| moments | 2 | 1,500 | 1 |  | 0.500 | 10 |"
