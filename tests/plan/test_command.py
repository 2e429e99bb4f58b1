"""``flora-jax plan`` as its users meet it: one JSON object or tables out, or one line and exit code 2."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flora_jax import cli
from flora_jax.errors import InputError
from flora_jax.models.family import presets
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.plan import ahead, memory, roofline, summary
from flora_jax.plan.cards import CARDS
from flora_jax.plan.setting import Setting

ROOT = Path(__file__).resolve().parents[2]
OTHERS = [name for name in presets() if name not in PRESETS]
MINI = ROOT / "flora_jax" / "assets" / "mini"


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs the program; returns exit code, stdout, stderr."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["flora-jax", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


def test_json_is_one_object_and_nothing_else():
    arguments = "15b --gpu h100 --json --kind flora --rank 8 --max-num-seqs 32 --max-model-len 2048"
    command = [sys.executable, "-m", "flora_jax.cli", "plan", *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    own = Setting("15b", PRESETS["15b"], CARDS["h100"], kind="flora", rank=8, max_num_seqs=32,
                  max_model_len=2048)  # fmt: skip
    assert found["fits"] is True
    assert set(found["bytes"]) == {"weights", "cache", "bank", "temporaries", "peak"}
    parts = [count for name, count in found["bytes"].items() if name != "peak"]
    assert found["bytes"]["peak"] == sum(parts) == memory.needed(own).peak
    assert found["bytes"]["weights"] == memory.weights_bytes(own)
    assert found["largest"]["max_num_seqs"] == memory.largest(own).max_num_seqs >= 32
    assert found["step_ms"] == pytest.approx(roofline.total(roofline.decode(own, 32, 2048)))
    assert found["step_ms"] == pytest.approx(sum(found["step_terms_ms"].values()))
    assert found["prefill_ms"] == pytest.approx(sum(found["prefill_terms_ms"].values()))
    assert "decode" not in found


@pytest.mark.parametrize(
    "preset, gpu", [*itertools.product(PRESETS, CARDS), *((p, "h100") for p in OTHERS)]
)
def test_every_preset_plans_for_every_card(program, preset, gpu):
    code, out, err = program(preset, "--gpu", gpu, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["model"], found["gpu"], found["dtype"]) == (preset, gpu, "float16")
    own = found["bytes"]["peak"] <= found["usable_bytes"]
    assert found["fits"] is own
    assert (found["largest"]["max_num_seqs"] >= 16) is own


def test_a_checkpoint_is_planned_from_its_configuration_alone(program, tmp_path):
    (tmp_path / "own").mkdir()
    shutil.copy(MINI / "config.json", tmp_path / "own")
    code, out, err = program(tmp_path / "own", "--gpu", "l4", "--batch-size", 3, "--json")
    assert (code, err) == (0, "")
    found, preset = json.loads(out), json.loads(program("mini", "--gpu", "l4", "--json")[1])
    assert found["max_num_seqs"] == 3
    assert found["bytes"]["weights"] == preset["bytes"]["weights"]


def test_people_get_tables(program):
    code, out, _ = program("1b", "--gpu", "a100", "--kind", "lora", "--rank", 16, "--devices", 4)
    assert code == 0
    for word in ("fits", "peak", "decode step", "modelled", "4 x a100", "16 of lora rank 16"):
        assert word in out
    code, out, _ = program("15b", "--gpu", "l4")
    assert "fits" in out
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in out


@pytest.mark.parametrize(
    "arguments, message",
    [(("15b", "--gpu", "b200"), "--gpu is 'b200', expected one of h100, h200, a100, l4"),
     (("16b", "--gpu", "h100"), "'16b', expected one of mini, 164m, 1b, 3b, 15b"),
     (("15b", "--gpu", "h100", "--kind", "flora"), "--rank is missing"),
     (("15b", "--gpu", "h100", "--kind", "flora", "--rank", 0), "--rank is 0, expected at least 1"),
     (("15b", "--gpu", "h100", "--rank", 4), "expected 0 with --kind none"),
     (("15b", "--gpu", "h100", "--kind", "x", "--rank", 1), "--kind is 'x'"),
     (("15b", "--gpu", "h100", "--max-model-len", 8193), "15b has 8192 positions"),
     (("15b", "--gpu", "h100", "--devices", 0), "--devices is 0"),
     (("15b", "--gpu", "h100", "--devices", 7), "divides the model's 48 heads"),
     (("15b", "--gpu", "h100", "--targets", "q_proj"), "target 'q_proj'"),
     (("15b", "--gpu", "h100", "--quantize", "int2"), "--quantize is 'int2'"),
     (("15b", "--gpu", "h100", "--dtype", "int8"), "--dtype is 'int8'"),
     (("15b", "--gpu", "h100", "--max-num-seqs", "many"), "--max-num-seqs"),
     (("15b",), "--gpu"), ((str(ROOT), "--gpu", "l4"), "no config.json")],
)  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(program, arguments, message):
    code, out, err = program(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


def test_compiling_without_a_compiler_is_one_line(program, monkeypatch):
    monkeypatch.setattr(ahead, "_PACKAGE", "jax-cuda13-nothing")
    code, out, err = program("mini", "--gpu", "h100", "--compile", "--json")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "pip install 'flora-jax[plan]'" in err


@pytest.mark.usefixtures("optimised")
class TestCompiled:
    """The real program; skipped where the extra ``plan`` is not installed."""

    @pytest.fixture(autouse=True)
    def compiler(self):
        try:
            ahead.check_compiler()
            ahead.find_toolkit()
        except InputError as error:
            pytest.skip(str(error))

    def test_layers_have_no_loop_and_copy_no_weight(self):
        found = {}
        for layers in (2, 4):
            config = dataclasses.replace(PRESETS["1b"], n_layer=layers)
            own = Setting("1b", config, CARDS["h100"], kind="flora", rank=8, max_num_seqs=32,
                          max_model_len=2048)  # fmt: skip
            found[layers] = summary.compile_decode(own)
            assert found[layers]["copies_of_weights"] == 0
            assert found[layers]["temporaries"] <= 64 << 20
            assert found[layers]["donated"] >= memory.cache_bytes(own) - 8192
        a_layer = (found[4]["launches"] - found[2]["launches"]) / 2
        modelled, _ = roofline.launches(own, 2048, roofline.whole_work(own, 32))
        modelled = (modelled - own.family.launches.other) / own.config.n_layer
        assert 10 < a_layer <= 17
        assert a_layer == pytest.approx(modelled, rel=0.1)
        assert found[2]["launches"] - 2 * a_layer <= 2 * own.family.launches.other
        assert found[4]["loops_in_a_step"] == found[2]["loops_in_a_step"] == 0

    def test_the_command_says_what_the_program_is(self, program):
        code, out, _ = program("mini", "--gpu", "l4", "--max-num-seqs", 2, "--compile", "--json")
        assert code == 0
        own = json.loads(out)["decode"]
        assert own["launches"] > 6 * 10
        assert own["copies_of_weights"] == 0
        assert own["temporaries"] > 0
