"""The study of LoRAs as multiplicative adapters: what random weights keep, and its tables."""

import gzip

from experiments import lora_to_flora


def test_of_a_random_weight_a_component_keeps_little_and_of_ones_everything(monkeypatch):
    monkeypatch.setattr(lora_to_flora, "SIZES", (40, 60))
    kept = dict(lora_to_flora.kept_of_random(rank=1, seed=0))
    assert kept["ones, normal change"] > 1 - 1e-5
    # One singular value of noise has 0.082 of it.
    assert 0.05 < kept["normal, change of signs"] < 0.15
    assert kept["normal, change of signs"] < kept["normal, normal change"]
    assert kept["normal, normal change"] < kept["its sizes, normal change"] < 0.9


def line(adapter, kept, seconds, **others):
    return {
        "model": "mini", "source": "lora", "to": "flora", "way": "moments", "rank": 2, "steps": 0,
        "rate": None, "rows": 8, "length": 256, "most_windows": 192, "adapter": adapter,
        "parameters": 1500, "kept": kept, "weights_error": 0.5, "seconds": seconds,
    } | others  # fmt: skip


def test_a_table_has_the_mean_and_the_range_over_adapters():
    title, table = lora_to_flora.conversion_tables([line("a", 0.5, 10.0), line("b", 0.25, 20.0)])
    assert title.startswith("## lora as flora, mini: rows of 8 x 256 tokens")
    assert table.splitlines()[2] == (
        "| moments | 2 |  |  | 1,500 | 2 | 37.5% (25.0% to 50.0%) | 0.500 (0.500 to 0.500) | "
        "15 (10 to 20) |"
    )
    # An adapter that gains nothing has no share of it.
    _, table = lora_to_flora.conversion_tables([line("a", None, 10.0)])
    assert table.splitlines()[2] == "| moments | 2 |  |  | 1,500 | 1 |  | 0.500 | 10 |"


def test_what_was_made_in_other_ways_is_not_one_mean():
    lines = [line("a", 0.5, 10.0), line("a", 0.6, 10.0, steps=200, rate=0.1)]
    _, table = lora_to_flora.conversion_tables(lines)
    assert [row.split(" | ")[5] for row in table.splitlines()[2:]] == ["1", "1"]
    lines[1]["length"] = 128
    assert len(list(lora_to_flora.conversion_tables(lines))) == 4


def test_a_conversion_is_made_once_also_where_fewer_windows_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_to_flora, "RESULTS", tmp_path / "results.jsonl")
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    for part in ("train", "validation"):
        with gzip.open(corpora / f"lua.{part}.jsonl.gz", "wt") as file:
            file.writelines('{"content": "local a = 1"}\n' for _ in range(40))

    def run(length):
        lora_to_flora.main(
            "convert", corpora, tmp_path / "out", adapters=["lua=lora/lua"], to="flora", ranks="1",
            ways="data-free", rows=2, length=length, windows=100,
        )  # fmt: skip

    run(32)
    (made,) = lora_to_flora.read_results("convert")
    assert made["windows"] < made["most_windows"] == 100
    assert made["kept"] is None or made["kept"] < 1
    run(32)
    assert len(lora_to_flora.read_results("convert")) == 1
    run(16)
    assert len(lora_to_flora.read_results("convert")) == 2
