"""Generation with the engine: the same completions twice, in any order, and after any kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flora_jax.errors import InputError
from flora_jax.evaluate.completions import Sampling, complete_all
from flora_jax.evaluate.local import Job, Local, run
from flora_jax.evaluate.problems import Problem, first
from flora_jax.models.model import init_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.options import EngineOptions
from tests.helpers.requests import make_request
from tests.helpers.space_tokenizer import space_tokenizer

ASSETS = Path(__file__).parents[2] / "flora_jax" / "assets"
HEADS = {"pl": "sub sum {\n    my @numbers = @_;\n", "rb": "def sum(numbers)\n",
         "lua": "local function sum(numbers)\n"}  # fmt: skip
PROBLEMS = [
    Problem(f"p{i}", language, f"{head.replace('sum', name)}", "", ("\n\n",))
    for language, head in HEADS.items()
    for i, name in enumerate(("sum", "count", "largest"))
]
SAMPLING = Sampling(n_samples=3, temperature=0.8, max_tokens=12, seed=5)


@pytest.fixture(scope="module")
def local():
    adapters = {"pl": ASSETS / "adapters/flora/perl", "rb": ASSETS / "adapters/lora/ruby"}
    return Local(ASSETS / "mini", PROBLEMS, adapters, rows=4, dtype="float32")


@pytest.fixture(scope="module")
def completed(local):
    return {(one.language, one.name): one for one in local(PROBLEMS, SAMPLING)}


def test_every_sample_is_its_own_and_cut_at_a_stop(completed):
    assert len(completed) == len(PROBLEMS)
    texts = [text for one in completed.values() for text in one.completions]
    assert len(texts) == 27
    assert len(set(texts)) > 13
    assert not any("\n\n" in text for text in texts)


def test_any_part_in_any_order_gives_the_same(local, completed):
    for part in (PROBLEMS[::-1], PROBLEMS[3:5]):
        found = {(one.language, one.name): one for one in local(part, SAMPLING)}
        assert found == {(p.language, p.name): completed[p.language, p.name] for p in part}


def test_a_stream_mixes_adapters_and_the_base(local, completed):
    problem = PROBLEMS[0]
    jobs = [Job(problem, "pl"), Job(problem), Job(problem, "rb")]
    found = dict(local.stream(jobs, SAMPLING))
    assert found[jobs[0]] == completed["pl", "p0"]
    assert len({one.completions for one in found.values()}) == 3


def test_a_language_without_an_adapter_has_the_base(local, completed):
    job = Job(PROBLEMS[-1])
    assert dict(local.stream([job], SAMPLING))[job] == completed["lua", "p2"]


def test_a_run_that_was_stopped_ends_as_a_whole_one(local, completed, tmp_path):
    class Stops(Exception):
        pass

    def stopping(problems, sampling):
        for number, one in enumerate(local(problems, sampling)):
            if number == 4:
                raise Stops
            yield one

    with pytest.raises(Stops):
        complete_all(PROBLEMS, stopping, SAMPLING, tmp_path, source={})
    found = complete_all(PROBLEMS, local, SAMPLING, tmp_path, source={})
    assert found == [completed[p.language, p.name] for p in PROBLEMS]


def test_a_prompt_beyond_the_context_has_empty_completions(local):
    long = Problem("long", "lua", "-- a word\n" * 600, "", ("\n\n",))
    own = Local(local.directory, [PROBLEMS[0], long], rows=4, dtype="float32")
    assert own.beyond() == [long]
    found = {one.name: one.completions for one in own([long, PROBLEMS[0]], SAMPLING)}
    assert found["long"] == ("",) * 3
    ((_, alone),) = local.stream([Job(PROBLEMS[0])], SAMPLING)
    assert found["p0"] == alone.completions
    assert any(alone.completions)


def test_a_completion_keeps_the_space_that_its_prompt_goes_on_with():
    """Also where the tokenizer takes the first space from a whole text."""
    tokenizer = space_tokenizer()
    config = StarCoderConfig(
        vocab_size=tokenizer.get_vocab_size(), n_positions=32, n_embd=16, n_layer=1, n_head=2, n_inner=32
    )  # fmt: skip
    options = EngineOptions(max_num_seqs=2, chunk=8, prefill_chunks=2, block_size=8)
    problem = Problem("p", "py", "a b", "", ())
    sampling = Sampling(n_samples=40, temperature=2.0, max_tokens=2, seed=5)
    with Engine(init_model(config), tokenizer=tokenizer, options=options) as engine:
        ((_, found),) = run(engine, [Job(problem)], sampling)
        prompt = tokenizer.encode(problem.prompt).ids
        requests = [
            make_request(0, prompt, max_tokens=2, temperature=2.0, top_p=sampling.top_p,
                         seed=sampling.seed_of(problem, sample))
            for sample in range(40)
        ]  # fmt: skip
        tokens = [completion.token_ids for completion in generate(engine, requests)]
    spaces = [one for one in tokens if tokenizer.id_to_token(one[0]).startswith("▁")]
    assert spaces
    for own, text in zip(tokens, found.completions, strict=True):
        if own in spaces:
            assert problem.prompt + text == tokenizer.decode([*prompt, *own])


def test_a_stop_token_that_is_empty_is_refused(local):
    with pytest.raises(InputError, match="bad in pl: stop is"):
        list(local([Problem("bad", "pl", "a", "", ("",))], SAMPLING))


def test_the_first_problems_of_every_language_are_chosen():
    chosen = first(PROBLEMS, 2)
    assert [(p.language, p.name) for p in chosen] == [
        (language, name) for language in HEADS for name in ("p0", "p1")
    ]
    assert first(PROBLEMS, None) == PROBLEMS


def test_seeds_are_of_a_place_and_of_nothing_else():
    seeds = {SAMPLING.seed_of(p, i) for p in PROBLEMS for i in range(100)}
    assert len(seeds) == 900
    assert max(seeds) < 2**31
    assert Sampling(seed=6).seed_of(PROBLEMS[0], 0) not in seeds
    assert Sampling(n_samples=7, seed=5).seed_of(PROBLEMS[0], 0) == SAMPLING.seed_of(PROBLEMS[0], 0)


def test_the_command_killed_in_the_middle_goes_on_with_the_same_completions(tmp_path):
    for language, head in HEADS.items():
        lines = [
            {"name": f"p{i}", "language": language, "prompt": head.replace("sum", f"sum{i}"),
             "tests": "", "stop_tokens": ["\n\n"]}
            for i in range(12)
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"humaneval-{language}.jsonl").write_text(text)

    def command(output):
        return [
            sys.executable, "-m", "flora_jax.cli", "evaluate", "multipl-e", "mini",
            "--problems", str(tmp_path), "--language", "pl,rb,lua", "--adapter",
            f"rb={ASSETS / 'adapters/flora/ruby'}", "--n-samples", "4", "--max-tokens", "24",
            "--batch-size", "4", "--generation-only", "--output", str(tmp_path / output),
        ]  # fmt: skip

    partial = tmp_path / "killed/generations.partial.jsonl"
    # The programs compile longer than they run.
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(command("killed"), env=env, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not partial.is_file() or partial.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/generations.jsonl").exists()
    for output in ("killed", "whole"):
        subprocess.run(command(output), env=env, check=True, capture_output=True)
    made = [(tmp_path / name / "generations.jsonl").read_bytes() for name in ("killed", "whole")]
    assert made[0] == made[1]
    assert not partial.exists()
    again = [*command("whole"), "--temperature", "0.5"]
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert (done.returncode, "temperature 0.1, now 0.5" in done.stderr) == (2, True)
