"""The model of Figure 2: labelled as one wherever it appears, and its points are the simulation's."""

import importlib.util
import json
from pathlib import Path

import pytest

from flora_jax.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "fig2_model.py"


@pytest.fixture
def script(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("fig2_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "NAMES", ("1b",))
    return module


def test_it_writes_points_and_pictures_that_say_what_they_are(script, tmp_path, capsys):
    script.main(num_prompts=3, ranks="1,16")
    assert {path.name for path in tmp_path.iterdir()} == {
        "fig2_model.json", "fig2_model_throughput.png", "fig2_model_latency.png",
        "fig2_model_ratio.png",
    }  # fmt: skip
    found = json.loads((tmp_path / "fig2_model.json").read_text())
    assert "nothing was measured" in found["what"]
    assert "a model, nothing measured" in capsys.readouterr().out
    rate = {(r["kind"], r["lora"], r["rank"]): r["output_throughput"] for r in found["results"]}
    assert len(rate) == 7
    assert max(rate.values()) == rate["none", None, 0]
    assert rate["flora", None, 16] < rate["flora", None, 1]
    assert rate["lora", "bmm", 16] < rate["lora", "fused", 16] < rate["lora", "fused", 1]


def test_the_papers_points_are_those_of_the_report(script):
    report = (SCRIPT.parent / "figure2.md").read_text()
    for words in ("above 3x bmm-LoRA at rank 1", "2.5x at rank 2", "crossover near rank 8 for 15B"):
        assert words in report
    assert script.PAPER == ((1, 3.0), (2, 2.5), (8, 1.0))


def test_an_unknown_card_is_refused(script):
    with pytest.raises(InputError, match="--gpu is 'none'"):
        script.main(num_prompts=2, gpu="none")
