"""The program as its users meet it: whole files out, or one line on stderr and exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from flora_jax.cli import completions
from flora_jax.serve.options import EngineOptions
from flora_jax.shipped import ASSETS
from tests.cli.conftest import KINDS
from tests.helpers.byte_tokenizer import PIECES, byte_tokenizer
from tests.helpers.torch_models import TINY

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = TINY["n_positions"]


def write_requests(path, requests):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in requests]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.fixture
def generate(program, tmp_path):
    """Runs ``generate`` on these requests; returns the completions."""

    def run(model, requests, *options):
        output = tmp_path / "out.jsonl"
        code, out, err = program(
            "generate", model, "--input", write_requests(tmp_path / "in.jsonl", requests),
            "--output", output, "--overwrite", *options,
        )  # fmt: skip
        assert (code, out) == (0, ""), err
        assert f"{len(requests)} completions" in err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


ADAPTERS = [word for name in KINDS for word in ("--adapter", f"{name}={name}")]
# Sampled, and in batches of 4 with these adapters or of 1 without any: few programs in all.
MIXED = [
    {
        "prompt_token_ids": [3, 1, 4, 1, 5],
        "adapter": [None, *KINDS][index % 3],
        "max_tokens": 14 - index,
        "temperature": 0.05,
        "seed": 7,
        "ignore_eos": True,
    }
    for index in range(6)
]
PLAIN = {"max_tokens": 12, "ignore_eos": True, "seed": 7, "temperature": 3}


@pytest.fixture
def mixed(generate):
    return generate("bare", MIXED, *ADAPTERS, "--batch-size", "4")


def test_completions_come_in_the_order_of_the_requests_with_all_fields(mixed):
    for index, (request, completion) in enumerate(zip(MIXED, mixed, strict=True)):
        tokens = completion.pop("token_ids")
        assert len(tokens) == request["max_tokens"]
        assert all(0 <= token < PIECES for token in tokens)
        assert completion == {
            "index": index,
            "adapter": request["adapter"],
            "text": None,
            "finish_reason": "length",
            "prompt_tokens": len(request["prompt_token_ids"]),
            "completion_tokens": request["max_tokens"],
        }


def test_the_adapter_decides_and_the_batch_does_not(mixed):
    starts = [tuple(completion["token_ids"][:9]) for completion in mixed]
    assert len(set(starts[:3])) == 3
    assert starts[3:] == starts[:3]


def test_a_row_is_cut_at_the_context(generate):
    rows = [PLAIN | {"prompt_token_ids": [1] * length} for length in (CONTEXT - 8, CONTEXT)]
    found = generate("bare", rows, "--batch-size", "1")
    assert [c["completion_tokens"] for c in found] == [8, 0]
    assert [c["finish_reason"] for c in found] == ["length", "length"]


def test_text_comes_from_the_tokenizer_beside_the_weights(generate):
    tokenizer = byte_tokenizer()
    plain = PLAIN | {"prompt": "abd"}
    (found,) = generate("text", [plain], "--batch-size", "1")
    assert found["prompt_tokens"] == len(tokenizer.encode("abd").ids) == 2
    assert found["text"] == tokenizer.decode(found["token_ids"])
    stop = next(c for c in reversed(found["text"]) if c.isascii() and found["text"].count(c) == 1)
    place = found["token_ids"].index(found["token_ids"][4])
    stops = [{"stop": [stop]}, {"stop_token_ids": [found["token_ids"][place]]}]
    said = {"messages": [{"role": "user", "content": "ab"}], "prompt": None}
    at_text, at_token, chat = generate(
        "text", [*(plain | own for own in stops), plain | said], "--batch-size", "1"
    )
    assert at_text["finish_reason"] == at_token["finish_reason"] == "stop"
    assert at_text["text"] == found["text"].partition(stop)[0]
    assert at_token["token_ids"] == found["token_ids"][: place + 1]
    assert at_token["text"] == tokenizer.decode(found["token_ids"][:place])
    assert chat == found | {"index": 2}  # What the chat template makes of it is the same text.


def test_log_probabilities_are_written_for_the_lines_that_ask(generate):
    ids = {"prompt_token_ids": [5, 6, 7], "max_tokens": 2, "ignore_eos": True}
    plain, scored = generate("bare", [ids, ids | {"logprobs": 2, "prompt_logprobs": 0}])
    assert plain == {k: v for k, v in scored.items() if "logprobs" not in k} | {"index": 0}
    assert [one["token_id"] for one in scored["logprobs"]] == scored["token_ids"]
    for one in scored["logprobs"]:  # Greedy: the token itself is the likeliest.
        assert one["top"][0] == [one["token_id"], one["logprob"]]
        assert len(one["top"]) == 2
    first, *others = scored["prompt_logprobs"]
    assert first is None
    assert [(one["token_id"], one["top"]) for one in others] == [(6, []), (7, [])]
    assert all(one["logprob"] < 0 for one in (*others, *scored["logprobs"]))


def test_batch_invariance_has_the_same_shapes_for_every_file(generate, monkeypatch):
    found = []
    checked = EngineOptions.__post_init__
    monkeypatch.setattr(
        EngineOptions, "__post_init__", lambda own: found.append(own) or checked(own)
    )
    row = {"prompt_token_ids": [5, 6], "max_tokens": 2}
    for rows in ([row], [row, row | {"max_tokens": 9}]):
        generate("bare", rows, "--batch-size", "4", "--batch-invariant")
    assert found[0] == found[-1]
    assert (found[0].max_num_seqs, found[0].batch_invariant) == (4, True)


def test_the_seed_decides_what_is_sampled(generate):
    row = PLAIN | {"prompt_token_ids": [5, 6]}
    rows = [row | {"seed": None}] * 2 + [row | {"seed": 2**32 - 1}] * 2
    first, same, other = (
        [c["token_ids"] for c in generate("bare", rows, "--batch-size", "1", "--seed", seed)]
        for seed in (0, 0, 2**32 - 1)
    )
    assert first == same
    assert first[0] != first[1]
    assert first[:2] != other[:2]
    assert first[2] == first[3] == other[2]


GOOD = {"prompt_token_ids": [1, 2]}
THIRD = [GOOD, b"", {**GOOD, "adapter": "nobody"}]
BAD = {
    "no input": ("bare", None, ["--input", "none.jsonl"], "none.jsonl: no such file"),
    "input is a directory": ("bare", None, ["--input", "bare"], "bare: is a directory"),
    "no model": ("./none", [GOOD], [], "./none: no such file or directory"),
    "no hub model": ("nobody/none", [GOOD], [], "nobody/none: no such file or directory"),
    "no config": ("no-config", [GOOD], [], "no config.json"),
    "model is a file": ("bare/config.json", [GOOD], [], "is a file, expected a directory"),
    "architecture": ("mamba", [GOOD], [], "'mamba'"),
    "truncated weights": ("truncated", [GOOD], [], "model.safetensors: truncated"),
    "tokenizer": ("bad-tokenizer", [GOOD], [], "tokenizer.json: not a tokenizer"),
    "adapter width": ("bare", [GOOD], ["--adapter", "a=wide"], "found shape (2, 32), expected (2, 16)"),
    "no adapter": ("bare", [GOOD], ["--adapter", "a=none"], "none"),
    "unused adapter is broken": ("bare", [GOOD], ["--adapter", "a=broken"], "broken"),
    "adapter twice": ("bare", [GOOD], ["--adapter", "a=loris", "--adapter", "a=flo"], "twice"),
    "adapter without name": ("bare", [GOOD], ["--adapter", "=loris"], "'=loris', expected NAME=DIR"),
    "adapter without folder": ("bare", [GOOD], ["--adapter", "a="], "'a=', expected NAME=DIR"),
    "adapter without either": ("bare", [GOOD], ["--adapter", "loris"], "expected NAME=DIR"),
    "unknown adapter": ("bare", THIRD, ["--adapter", "a=loris"], "line 3: unknown adapter 'nobody'"),
    "no template": (
        "bare",
        [GOOD, {"messages": [{"role": "user", "content": "a"}]}],
        [],
        "line 2: bare: has no chat template",
    ),
    "empty prompt": ("text", [GOOD, {"prompt": ""}], [], "line 2: the prompt is empty"),
    "long prompt": (
        "bare", [{"prompt_token_ids": [1] * (CONTEXT + 1)}], [],
        f"line 1: the prompt has {CONTEXT + 1} tokens, the context {CONTEXT}",
    ),
    "token id": ("bare", [{"prompt_token_ids": [PIECES]}], [], f"prompt_token_ids holds {PIECES}"),
    "no tokenizer": ("bare", [{"prompt": "a"}], [], "line 1: the checkpoint has no tokenizer.json"),
    "malformed line": ("bare", [GOOD, b"{"], [], "line 2: malformed JSON"),
    "not utf-8": ("bare", [GOOD, b"\xff"], [], "line 2: not UTF-8"),
    "no requests": ("bare", [], [], "no requests"),
    "temperature": ("bare", [GOOD], ["--temperature", "-1"], "temperature is -1.0"),
    "temperature nan": ("bare", [GOOD], ["--temperature", "nan"], "temperature is nan"),
    "top-p": ("bare", [GOOD], ["--top-p", "2"], "top_p is 2.0"),
    "top-k": ("bare", [GOOD], ["--top-k", "-2"], "top_k is -2"),
    "max-tokens": ("bare", [GOOD], ["--max-tokens", "0"], "max_tokens is 0"),
    "max-tokens word": ("bare", [GOOD], ["--max-tokens", "many"], "--max-tokens"),
    "seed": ("bare", [GOOD], ["--seed", "-1"], "greater than or equal to 0, found '-1'"),
    "dtype": ("bare", [GOOD], ["--dtype", "int8"], "'--dtype': "),
    "batch size 0": ("bare", [GOOD], ["--batch-size", "0"], "greater than or equal to 1, found '0'"),
    "batch size 257": ("bare", [GOOD], ["--batch-size", "257"], "less than or equal to 256, found '257'"),
    "option": ("bare", [GOOD], ["--tempreature", "1"], "--tempreature"),
    "output directory": ("bare", [GOOD], ["--output", "none/o.jsonl"], "none/o.jsonl, expected a file"),
    "output that cannot be": ("bare", [GOOD], ["--output", "/proc/o"], "/proc/o, which cannot be"),
    "output before model": ("./none", [GOOD], ["--output", "none/x"], "none/x, expected"),
    "on-error": ("bare", [GOOD], ["--on-error", "wait"], "'--on-error': "),
    "output is a directory": ("bare", [GOOD], ["--output", "bare"], "bare, expected a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_and_exit_code_2(case, program, home, tmp_path):
    model, requests, options, named = BAD[case]
    before = sorted(home.rglob("*"))
    path = tmp_path / "in.jsonl"
    if requests is not None:
        write_requests(path, requests)
    code, out, err = program(
        "generate", model, "--input", path, "--output", tmp_path / "out.jsonl", *options
    )
    assert (code, out) == (2, "")
    assert err.startswith("flora-jax: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert named in err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"] * path.exists()
    assert sorted(home.rglob("*")) == before


def test_an_output_that_exists_is_replaced_only_when_told_to(program, tmp_path):
    path, output = write_requests(tmp_path / "in.jsonl", [GOOD]), tmp_path / "out.jsonl"
    output.write_text("mine")
    code, _, err = program("generate", "bare", "--input", path, "--output", output)
    assert (code, err) == (
        2,
        f"flora-jax: --output is {output}, which exists already; --overwrite replaces it\n",
    )
    assert output.read_text() == "mine"
    output.unlink()
    part = tmp_path / "out.jsonl.part"
    part.write_text("somebody's notes")
    code, _, err = program("generate", "bare", "--input", path, "--output", output)
    assert (code, err.count("\n")) == (2, 1)
    assert "out.jsonl.part: no file that this command left" in err
    assert part.read_text() == "somebody's notes"


def test_standard_output_has_the_completions_and_nothing_else(program, tmp_path, monkeypatch):
    rows = [PLAIN | {"prompt_token_ids": [5, 6], "max_tokens": n} for n in (7, 2)]
    path = write_requests(tmp_path / "in.jsonl", rows)
    code, out, err = program("generate", "bare", "--input", path, "--output", "-")
    assert (code, "2 completions" in err) == (0, True)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(c["index"], c["completion_tokens"]) for c in lines] == [(0, 7), (1, 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_requests_can_be_passed_over_and_long_prompts_cut(generate, program, tmp_path):
    long = {"prompt_token_ids": [*range(1, 60)] * 4, "max_tokens": 3}
    good = {"prompt_token_ids": [5, 6], "max_tokens": 3}
    rows = [good, long, good | {"seed": -1}, good]
    path = write_requests(tmp_path / "in.jsonl", rows)
    output = tmp_path / "out.jsonl"
    command = ["generate", "bare", "--input", path, "--output", output, "--on-error", "skip"]
    code, _, err = program(*command)
    assert (code, "2 completions" in err, "2 requests refused" in err) == (0, True, True)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["index"] for line in found] == [0, 1, 2, 3]
    assert found[0]["token_ids"] == found[3]["token_ids"]
    assert f"line 2: the prompt has {59 * 4} tokens" in found[1]["error"].replace("request 1: ", "")
    assert "line 3: seed is -1" in found[2]["error"]
    assert [line["finish_reason"] for line in found[1:3]] == ["error", "error"]
    code, _, err = program(*command, "--truncate-prompt", "left", "--overwrite")
    assert code == 0, err
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert (found[1]["prompt_tokens"], found[1]["completion_tokens"]) == (CONTEXT - 3, 3)


def test_the_same_command_goes_on_with_what_a_killed_one_left(
    generate, program, tmp_path, monkeypatch
):
    whole = generate("bare", MIXED, *ADAPTERS, "--batch-size", "1")
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    output.unlink()
    command = [
        "generate", "bare", "--input", tmp_path / "in.jsonl", "--output", output, *ADAPTERS,
        "--batch-size", "1",
    ]  # fmt: skip
    add = completions.CompletionsFile.add

    def killed(self, line):
        if line["index"] == 3:
            os.write(self._journal._file.fileno(), b'{"index": 3, "tok')
            raise SystemExit(137)
        add(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(completions.CompletionsFile, "add", killed)
        assert program(*command)[0] == 137
    assert not output.exists()
    assert part.read_text().count("\n") == 4
    code, _, err = program(*command, "--temperature", "0.5")
    assert code == 2
    assert "out.jsonl.part: left by a run with other default" in err
    weights = next(Path.cwd().glob("*/adapter_model.safetensors"))
    before, times = weights.read_bytes(), (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    os.utime(weights, ns=times)  # Size and date tell nothing.
    code, _, err = program(*command)
    assert code == 2
    assert "out.jsonl.part: left by a run with other adapters" in err
    weights.write_bytes(before)
    added = []
    monkeypatch.setattr(
        completions.CompletionsFile, "add", lambda self, line: added.append(line) or add(self, line)
    )
    code, _, err = program(*command)
    assert (code, "6 completions, 3 of them from before" in err) == (0, True)
    assert [line["index"] for line in added] == [3, 4, 5]
    assert [json.loads(line) for line in output.read_text().splitlines()] == whole
    assert not part.exists()


def test_the_input_is_not_overwritten(program, tmp_path):
    path = write_requests(tmp_path / "in.jsonl", [GOOD])
    code, _, err = program("generate", "bare", "--input", path, "--output", path)
    assert (code, err.count("\n")) == (2, 1)
    assert "--output is the file of --input" in err
    assert json.loads(path.read_text()) == GOOD


def test_an_error_while_writing_keeps_an_older_output_and_leaves_nothing_else(
    program, tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError("no space left on device")

    output = tmp_path / "out.jsonl"
    output.write_text("older")
    path = write_requests(tmp_path / "in.jsonl", [PLAIN | GOOD])
    monkeypatch.setattr("flora_jax.serve.request.Completion.to_json", fail)
    code, _, err = program(
        "generate", "bare", "--input", path, "--output", output, "--overwrite", "--batch-size", "1"
    )
    assert (code, err.splitlines()[-1]) == (2, "flora-jax: no space left on device")
    assert output.read_text() == "older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_shipped_model_is_written_in_its_own_layout_too(program, tmp_path):
    code, _, err = program("convert", "mini", tmp_path / "mine", "--to", "hf")
    assert (code, err) == (0, "")
    found, expected = (
        load_file(directory / "model.safetensors")
        for directory in (tmp_path / "mine", ASSETS / "mini")
    )
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)


def test_the_demo_shows_any_model_under_the_base_and_under_every_adapter(program):
    words = ["--adapter", "loris=loris", "--prompt", "ab", "--max-tokens", "2"]
    code, out, err = program("demo", "text", *words)
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert "2 rows of one batch, 2 adapters" in said
    assert "loris" in said
    assert "2 of 2 rows have the same tokens as when they run alone" in said


@pytest.mark.parametrize(
    "words, named",
    [
        (["bare", "--prompt", "a"], "the checkpoint has no tokenizer.json"),
        (["text", "--prompt", "a" * 90], "the prompt has 91 tokens, the context 48"),
        (
            ["text", "--language", "lua"],
            "--language is 'lua', which is of 'mini' without --adapter",
        ),
        (["text", "--language", "c"], "--language is 'c', expected one of d, perl"),
        (["text", "--adapter", "wide=wide"], "wide"),
    ],
)
def test_a_demo_that_cannot_be_ends_in_one_line(words, named, program):
    code, out, err = program("demo", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert named in err


def test_a_name_near_a_shipped_adapter_s_is_told(program, tmp_path):
    code, out, err = program("generate", "bare", "--adapter", "perl=flora/pearl", "--input",
                             write_requests(tmp_path / "in.jsonl", [GOOD]), "--output", "-")  # fmt: skip
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "near it: flora/perl, " in err


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate"], ["generate", "bare"]])
def test_incomplete_commands_end_in_one_line(arguments, program):
    code, out, err = program(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("flora-jax: ")


@pytest.mark.parametrize("arguments, code", [([], 2), (["--help"], 0), (["info", "--help"], 0)])
def test_help_is_printed(arguments, code, program):
    found, out, err = program(*arguments)
    assert (found, err) == (code, "")
    assert "Usage" in out


def test_help_of_the_installed_program_needs_no_heavy_package():
    code = """
import sys
sys.argv = ["flora-jax", "--help"]
from flora_jax.cli import main
try:
    main()
finally:
    heavy = {"jax", "numpy", "transformers", "torch", "tokenizers", "rich", "pydantic"}
    print(*(heavy & set(sys.modules)), "HEAVY")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(verb in done.stdout for verb in ("generate", "info", "demo"))
    assert done.stdout.splitlines()[-1].split() == ["HEAVY"]


def test_a_process_of_its_own_gives_the_same_completions(home, generate, tmp_path):
    (tmp_path / "own").mkdir()
    rows = [PLAIN | {"prompt_token_ids": [5, 6]}]
    path = write_requests(tmp_path / "own" / "in.jsonl", rows)
    done = subprocess.run(
        [sys.executable, "-m", "flora_jax.cli", "generate", "bare", "--input", path,
         "--output", path.with_name("out.jsonl"), "--batch-size", "1"],
        cwd=home, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in path.with_name("out.jsonl").read_text().splitlines()]
    shutil.rmtree(path.parent)
    assert found == generate("bare", rows, "--batch-size", "1")


def test_a_process_of_its_own_ends_bad_input_with_code_2(home, tmp_path):
    path = write_requests(tmp_path / "in.jsonl", [GOOD, {"prompt": "a"}])
    done = subprocess.run(
        [sys.executable, "-m", "flora_jax.cli", "generate", "bare", "--input", path,
         "--output", tmp_path / "out.jsonl"],
        cwd=home, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "line 2: the checkpoint has no tokenizer.json" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
