"""The commands of the serving benchmarks, on a tiny model."""

import collections
import json

import pytest
import typer
from typer.testing import CliRunner

from flora_jax.cli import bench_serving
from flora_jax.errors import InputError

app = typer.Typer()
app.command()(bench_serving.throughput)
app.command()(bench_serving.latency)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from flora_jax.checkpoints.checkpoint import save_hf
    from flora_jax.models.model import init_model
    from flora_jax.models.starcoder.config import StarCoderConfig

    config = StarCoderConfig(vocab_size=80, n_positions=64, n_embd=16, n_layer=1, n_head=2,
                             n_inner=24, eos_token_ids=(0,))  # fmt: skip
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    save_hf(init_model(config), directory)
    return directory


@pytest.fixture
def program(monkeypatch, checkpoint):
    """Runs a verb on the tiny model."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")

    def run(verb, *words, model=checkpoint):
        fixed = [] if model is None else [str(model)]
        done = CliRunner().invoke(app, [verb, *fixed, *map(str, words)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done

    return run


SMALL = ["--num-prompts", 5, "--min-total", 12, "--max-total", 24, "--max-num-seqs", 2,
         "--max-num-batched-tokens", 80]  # fmt: skip


def check_receipt(result, benchmark):
    assert result["benchmark"] == benchmark
    assert {"command", "date", "machine", "versions", "workload", "engine"} <= set(result)
    assert (result["model"], result["weights"], result["dtype"]) == (
        "tiny",
        "checkpoint",
        "float32",
    )
    assert result["engine"]["max_num_seqs"] == 2


def test_throughput_has_a_line_for_each_rank(program, tmp_path):
    files = tmp_path / "t.json", tmp_path / "t.png"
    done = program("throughput", *SMALL, "--ranks", "1,2", "--output", files[0], "--plot", files[1])
    result = json.loads(files[0].read_text())
    check_receipt(result, "throughput")
    assert [(line["kind"], line["rank"]) for line in result["results"]] == [
        ("flora", 1),
        ("flora", 2),
    ]
    for line in result["results"]:
        assert (line["completed"], line["failed"], line["adapters"]) == (5, 0, 5)
        assert line["total_output_tokens"] == 5 * result["workload"]["mean_output_tokens"]
        assert line["output_throughput"] > 0
        assert 0 < line["share_of_limit"] < 1
        # All adapters lay on the device before, and all programs were compiled.
        assert (line["adapter_loads"], line["compilations"]) == (0, 0)
    assert "output tokens/s" in done.output
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_latency_has_vllms_keys(program, tmp_path):
    files = tmp_path / "l.json", tmp_path / "l.png"
    words = ["--kind", "lora", "--request-rate", 100, "--burstiness", 0.5, "--max-concurrency", 2]
    program("latency", *SMALL, *words, "--goodput", "ttft:60000 tpot:60000", "--resident-adapters",
            2, "--output", files[0], "--plot", files[1])  # fmt: skip
    result = json.loads(files[0].read_text())
    check_receipt(result, "latency")
    (line,) = result["results"]
    statistics = {
        f"{name}_{metric}_ms"
        for name in ("mean", "median", "std", "p90", "p99")
        for metric in ("ttft", "tpot", "itl", "e2el")
    }
    assert statistics <= set(line)
    assert (line["completed"], line["failed"]) == (5, 0)
    assert line["request_goodput"] == line["request_throughput"]
    assert (line["request_rate"], line["burstiness"], line["max_concurrency"]) == (100, 0.5, 2)
    assert line["max_concurrent_requests"] <= 2
    assert line["adapter_loads"] >= 3  # Room for two: the others come during the run.
    assert line["compilations"] == 0
    assert files[1].stat().st_size > 1000


def test_latency_is_drawn_for_whatever_percentiles_are_asked_for(program, tmp_path):
    done = program("latency", *SMALL, "--kind", "none", "--metric-percentiles", "50,90",
                   "--plot", tmp_path / "l.png")  # fmt: skip
    assert "p90 TTFT" in done.output
    assert (tmp_path / "l.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["none", "sequential", "unmerged"])
def test_the_baselines_run(kind, program, tmp_path):
    output = tmp_path / "t.json"
    mix = [] if kind == "none" else ["--adapter-distribution", "uniform", "--num-adapters", 2]
    program("throughput", *SMALL, "--kind", kind, "--no-limits", *mix, "--output", output)
    (line,) = json.loads(output.read_text())["results"]
    assert (line["completed"], line["failed"]) == (5, 0)
    assert (line["rank"], line["targets"]) == ((0, []) if kind == "none" else (1, ["c_attn"]))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--kind", "vera"], "--kind is 'vera', expected one of lora, flora"),
        (["--rank", "0"], "--rank is 0, expected at least 1"),
        (["--kind", "ia3", "--rank", "2"], "--rank is 2, expected 1 with --kind ia3"),
        (["--kind", "none", "--rank", "2"], "--rank is 2, expected none with --kind none"),
        (["--kind", "none", "--num-adapters", "2"], "--num-adapters is 2, expected none with"),
        (["--kind", "none", "--targets", "c_fc"], "--targets is c_fc, expected none with"),
        (["--burstiness", "0.5"], "--burstiness is 0.5, expected none with --request-rate inf"),
        (["--rank", "1", "--ranks", "1,2"], "--rank is 1 and --ranks is 1,2, expected one"),
        (["--ranks", "1,x"], "--ranks is '1,x', expected numbers"),
        (["--targets", "c_out"], "target 'c_out'"),
        (["--dtype", "int8"], "--dtype is 'int8', expected float32"),
        (["--num-prompts", "0"], "--num-prompts is 0, expected at least 1"),
        (["--preset", "mini"], "expected exactly one of them"),
        (["--output", "absent/x.json"], "--output is absent/x.json, expected a file in"),
        (["--lengths", "absent.csv"], "--lengths absent.csv"),
        (["--max-total", "2000"], "--max-total is 2000, and the longest .* 64 positions"),
        (["--max-num-batched-tokens", "8"], "max_num_batched_tokens is 8, expected at least"),
        (["--request-rate", "fast"], "--request-rate is 'fast', expected a number above 0"),
        (["--max-concurrency", "0"], "--max-concurrency is 0, expected at least 1"),
        (["--metric-percentiles", "101"], "--metric-percentiles is '101', expected"),
        (["--goodput", "itl:5"], "--goodput is 'itl:5', expected NAME:MILLISECONDS"),
    ],
)
def test_bad_input_is_one_error_with_what_was_found(words, message, program):
    given = dict(zip(words[::2], words[1::2]))
    small = [word for pair in zip(SMALL[::2], SMALL[1::2]) if pair[0] not in given for word in pair]
    with pytest.raises(InputError, match=message):
        program("latency", *small, *words)


def test_a_preset_or_a_model_is_needed(program):
    with pytest.raises(InputError, match="MODEL is None, --preset is None, expected exactly one"):
        program("throughput", model=None)
    with pytest.raises(InputError, match="--preset is '7b', expected one of mini, 164m"):
        program("throughput", "--preset", "7b", model=None)


def test_a_preset_gets_the_positions_that_its_requests_need():
    from flora_jax.bench.serving.setup import find_base, plan_workload
    from flora_jax.bench.serving.workload import WorkloadOptions

    base = find_base(None, "mini")
    workload, wide = plan_workload(base, WorkloadOptions(200), adapted=True)
    assert base.config.n_positions == 512 < wide.config.n_positions
    assert wide.config.n_positions == max(
        len(r.prompt_token_ids) + r.sampling_params.max_tokens for r in workload.requests
    )
    _, same = plan_workload(base, WorkloadOptions(20, scale=0.1), adapted=True)
    assert same == base


@pytest.mark.parametrize("kind", ["flora", "lora", "ia3", "hira", "sequential"])
def test_every_request_gets_other_factors(kind):
    import jax
    import numpy as np

    from flora_jax.bench.serving.setup import Contender, make_adapters
    from flora_jax.models.starcoder.config import PRESETS

    rank = 1 if kind == "ia3" else 3
    contender = Contender(kind, rank, ("c_attn", "mlp.c_proj"))
    made = make_adapters(PRESETS["mini"], contender, ["x", "y", "z"])
    first = collections.Counter(
        np.asarray(jax.tree.leaves(adapter.layers)[0]).tobytes() for adapter in made.values()
    )
    assert len(first) == 3
    assert {adapter.rank("attn.c_attn") for adapter in made.values()} == {rank}
    again = make_adapters(PRESETS["mini"], contender, ["x", "y", "z"])
    assert jax.tree.all(jax.tree.map(np.array_equal, made["y"].layers, again["y"].layers))
    assert make_adapters(PRESETS["mini"], Contender("none", 0), ["x"]) == {}
