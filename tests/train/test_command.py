"""``flora-jax train`` as its users meet it: folders out, one line for bad input."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flora_jax
from flora_jax.checkpoints.checkpoint import load_model
from flora_jax.train import results
from flora_jax.train.data.tokens import tokenize
from flora_jax.train.interrupt import InterruptedRun
from flora_jax.train.options import make_options, read_file
from flora_jax.train.step import GroupedBatch, make_scorer
from tests.helpers.byte_tokenizer import PIECES, byte_tokenizer
from tests.helpers.torch_models import flax_logits, random_tokens, tiny_torch_model, torch_logits
from tests.helpers.training_home import (
    LENGTH,
    NAMES,
    ROOT,
    SIZES,
    data_of,
    fill,
    lines_of,
    program,
    read_for,
    snapshot,
)

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5 by a name that is on its way out.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

STEPS, EVERY = 12, 5
OPTIONS = [
    "--kind", "lora", "--rank", "2", "--alpha", "3", "--targets", "c_attn,c_fc", "--steps", STEPS,
    "--batch-size", "8", "--seq-len", LENGTH, "--learning-rate", "0.02", "--eval-every", EVERY,
    "--save-every", "6",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    fill(home)
    return home


@pytest.fixture(scope="module")
def both(home):
    """The output of a run of two adapters with validation."""
    code = program(
        home, "train", "text", "--output", "both", *data_of(*NAMES),
        *data_of(*NAMES, option="validation"), *OPTIONS,
    )  # fmt: skip
    assert code == 0
    return home / "both"


@pytest.fixture(scope="module")
def model(home):
    return load_model(home / "text")


def test_the_output_has_a_folder_for_each_adapter_and_the_runs_files(both):
    assert sorted(path.name for path in both.iterdir()) == sorted(
        [*NAMES, "checkpoints", "config.json", "curve.png", "data.json", "metrics.jsonl"]
    )
    assert (both / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    remembered = json.loads((both / "data.json").read_text())
    assert remembered["training"]["perl"]["documents"] == 20
    for name in NAMES:
        card = (both / name / "README.md").read_text()
        assert all(
            word in card
            for word in (name, "lora", "text", "attn.c_attn", "---|", '"learning_rate"')
        )
        assert f"{lines_of(both)[-1]['losses'][name]:.4f} at step {STEPS}" in card


@pytest.mark.parametrize("name", NAMES)
def test_pefts_logits_under_a_trained_adapter_are_ours(name, both, model):
    peft = pytest.importorskip("peft")
    adapter, tokens = read_for(model, both / name), random_tokens(1, vocabulary=PIECES)
    wrapped = peft.PeftModel.from_pretrained(
        tiny_torch_model(0, vocab_size=PIECES, **SIZES), both / name
    )
    ours = flax_logits(model, tokens, adapter.layers)
    np.testing.assert_allclose(ours, torch_logits(wrapped.eval(), tokens), rtol=1e-4, atol=1e-4)
    assert np.abs(ours - flax_logits(model, tokens)).max() > 0.05
    assert adapter.targets() == ("attn.c_attn", "mlp.c_fc")
    assert adapter.settings["base_model_name_or_path"] == "text"


def test_metrics_have_the_first_every_tenth_every_validated_and_the_last_step(both):
    lines = lines_of(both, speed=True)
    assert [line["step"] for line in lines] == [0, 1, 5, 10, 12]
    assert [line["step"] for line in lines if "validation" in line] == [0, 5, 10, 12]
    for line in lines[1:]:
        assert {"step", "loss", "losses", "grad_norm", "learning_rate", "tokens_per_second"} <= set(
            line
        )
        assert line["loss"] == pytest.approx(np.mean([line["losses"][name] for name in NAMES]))
        assert line["tokens_per_second"] > 0
        # One step of warm-up, then a cosine to the end.
        place = (line["step"] - 2) / (STEPS - 1)
        rate = 0.02 * (1 + math.cos(math.pi * place)) / 2 if line["step"] > 1 else 0
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-5)
    for line in lines:
        for found in line.get("validation", dict.fromkeys(NAMES, None)).values():
            if found is not None:
                assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
                assert 0 <= found["accuracy"] <= 1
    assert "loss" not in lines[0]
    for name in NAMES:
        assert lines[-1]["validation"][name]["loss"] < lines[0]["validation"][name]["loss"] - 0.1
        assert lines[-1]["losses"][name] < lines[1]["losses"][name] - 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_validation_before_the_first_step_is_the_bases(name, both, home, model):
    packed, _ = tokenize(home / f"{name}.validation.jsonl", byte_tokenizer(), 0)
    score, sums = make_scorer(model.graph), np.zeros(3)
    for batch in packed.evaluation(LENGTH, 4):
        one = GroupedBatch(*(jnp.asarray(leaf[:, None]) for leaf in batch))
        sums += np.array([float(value[0]) for value in score(None, model.params, one)])
    found = lines_of(both)[0]["validation"][name]
    assert found["loss"] == pytest.approx(sums[0] / sums[2], rel=1e-5)
    assert (found["accuracy"], found["tokens"]) == (pytest.approx(sums[1] / sums[2]), sums[2])
    # All bytes but those of the first token of each document and of each window it is cut in.
    text = "".join(
        json.loads(line)["content"]
        for line in (home / f"{name}.validation.jsonl").read_text().splitlines()
    )
    text_bytes = sums[0] / math.log(2) / found["bits_per_byte"]
    assert 0.85 * len(text.encode()) < text_bytes <= len(text.encode())
    assert text_bytes == pytest.approx(round(text_bytes), abs=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_a_run_of_two_is_that_of_a_run_alone(name, both, home, model):
    """Its options are those of the run of two, read from its config.json, but for its own data."""
    output = home / f"{name}-alone"
    code = program(
        home, "train", "--config", both / "config.json", "--output", output, *data_of(name),
        *data_of(name, option="validation"), "--batch-size", "4",
    )  # fmt: skip
    assert code == 0
    for line, pair in zip(lines_of(output), lines_of(both), strict=True):
        assert line["step"] == pair["step"]
        if "loss" in line:
            assert line["loss"] == pytest.approx(pair["losses"][name], rel=1e-4)
        if "validation" in line:
            assert line["validation"][name] == pytest.approx(pair["validation"][name], rel=1e-3)
    for a, b in zip(
        jax.tree.leaves(read_for(model, output / name).layers),
        jax.tree.leaves(read_for(model, both / name).layers),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)


def test_a_finished_run_is_left_as_it_is(both, home, capsys):
    before = snapshot(both)
    arguments = ["train", "--config", both / "config.json", "--output", both, "--resume"]
    assert program(home, *arguments) == 0
    assert "this run is finished, nothing to do" in capsys.readouterr().err
    assert snapshot(both) == before
    # The same from Python, with the directory as text.
    said, options = [], make_options(read_file(both / "config.json"))
    folders = flora_jax.train(options, str(both), resume=True, say=said.append)
    assert folders == {name: both / name for name in NAMES}
    assert said == [f"{both}: this run is finished, nothing to do"]
    assert snapshot(both) == before


def test_resuming_needs_no_more_than_the_directory(both, home, capsys):
    before = snapshot(both)
    arguments = ["train", "--output", both, "--resume"]
    for given in ([], ["--targets", "c_attn,c_fc", "--learning-rate", "0.02", "--keep", "1"]):
        assert program(home, *arguments, *given) == 0
        assert "this run is finished, nothing to do" in capsys.readouterr().err
    assert snapshot(both) == before


@pytest.mark.parametrize(
    "output, words, said",
    [
        ("both", [], "both --resume"),
        ("both", ["--num-processes", "1"], None),
        ("not-yet", [], None),
    ],
)
def test_a_run_that_is_stopped_says_how_it_goes_on(
    output, words, said, both, home, monkeypatch, capsys
):
    def stopped(*_, **__):
        raise InterruptedRun("stopped at step 45 of 2000; --resume goes on", 15)

    monkeypatch.setattr("flora_jax.train.run.train", stopped)
    monkeypatch.setattr("flora_jax.train.processes.join", lambda *_: None)
    arguments = ["--config", both / "config.json", "--output", output, *words]
    assert program(home, "train", *arguments) == 128 + 15
    command = "" if said is None else f": flora-jax train --output {said}"
    expected = f"flora-jax: stopped at step 45 of 2000; --resume goes on{command}\n"
    assert capsys.readouterr().err == expected


@pytest.fixture(scope="module")
def unfinished(both, home):
    """What a run killed just before it wrote its adapters leaves."""
    return shutil.copytree(
        both, home / "unfinished", ignore=shutil.ignore_patterns(*NAMES, "*.png")
    )


GOOD = ["text", *data_of("perl"), "--kind", "flora", "--steps", "2", "--seq-len", LENGTH]
AGAIN = ["--config", "unfinished/config.json", "--output", "unfinished", "--resume"]
BAD = {
    "output is taken": ([*GOOD, "--output", "both"], "both: exists already"),
    "output is a file": ([*GOOD, "--output", "notes.txt"], "notes.txt: is a file, expected a directory"),
    "nothing to resume": ([*GOOD, "--output", "taken", "--resume"], "taken: exists already"),
    "damaged run": ([*GOOD, "--output", "broken", "--resume"], "broken/config.json: Expecting"),
    "another rate": ([*AGAIN, "--learning-rate", "1"], "learning_rate 0.02, now 1.0"),
    "another kind": ([*GOOD, "--output", "unfinished", "--resume"], "the run to resume has"),
    "another rank": (["--output", "unfinished", "--resume", "--rank", "1"], "has rank 2, now 1"),
    "no run": (["--output", "out", "--resume"], "out/config.json: no such file, so there is no run"),
    "other targets": ([*AGAIN, "--targets", "c_fc"], 'targets ["c_attn", "c_fc"], now ["c_fc"]'),
    "another order": ([*AGAIN, *data_of("ruby", "perl")], "the run to resume has data"),
    "other data": ([*AGAIN, "--data", "perl=perl.data.jsonl", "--data", "ruby=perl.data.jsonl"],
                   'has data {"perl"'),
    "no model": (["./none", *GOOD[1:]], "none: no such file or directory"),
    "no tokenizer": (["bare", *GOOD[1:]], "bare: training needs tokenizer.json"),
    "no data file": ([*GOOD, "--data", "lua=lua.jsonl"], "lua.jsonl: no such file"),
    "no data file in a folder": ([*GOOD, "--data", "lua=./data/lua"], "./data/lua: no such file"),
    "another file": ([*GOOD, "--data", "lua=notes.txt"], "notes.txt: expected .jsonl"),
    "a folder without documents": ([*GOOD, "--data", "lua=./nothing"], "./nothing: no documents"),
    "output below a file": ([*GOOD, "--output", "notes.txt/x"], "notes.txt/x: "),
    "output that cannot be": ([*GOOD, "--output", "/proc/x"], "/proc/x: cannot be written to"),
    "corrupt lines": ([*GOOD, "--data", "lua=corrupt.jsonl"], "corrupt.jsonl, line 2: malformed JSON"),
    "no documents": ([*GOOD, "--data", "lua=empty.jsonl"], "empty.jsonl: no documents"),
    "column": ([*GOOD, "--text-column", "code"], "no column 'code'"),
    "data twice": ([*GOOD, *data_of("perl")], "the name is given twice"),
    "data without name": ([*GOOD, "--data", "perl.jsonl"], "expected NAME=PATH"),
    "long rows": ([*GOOD, "--seq-len", "49"], "seq_len is 49, the model's context has 48"),
    "target": ([*GOOD, "--targets", "c_attn,q_proj"], "target 'q_proj': expected the end of one of"),
    "devices": ([*GOOD, "--mesh", "tensor=99"], "mesh tensor=99 needs 99 devices, found"),
    "uneven rows": ([*GOOD, "--batch-size", "3", *data_of("ruby")], "batch_size is 3"),
    "kind": ([*GOOD, "--kind", "vera"], "kind is 'vera'"),
    "a wide rank": ([*GOOD, "--kind", "lora", "--rank", "17"], "rank is 17, expected at most 16: attn"),
    "an endless run": ([*GOOD, "--steps", "1" + 20 * "0"], "expected at most 1,000,000,000"),
    "a value of a file": ([*GOOD, "--config", "untrue.json"], "untrue.json: rank is True, expected"),
    "an option of a file": ([*GOOD, "--config", "unknown.json"], "unknown.json: ranks (found 1) is no"),
    "a folder of options": ([*GOOD, "--config", "text"], "text: is a directory, expected"),
    "a long name": ([*GOOD, "--data", 250 * "n" + "=perl.data.jsonl"], "at most 240 bytes, found 250"),
    "a reserved name": ([*GOOD, "--data", "checkpoints=perl.data.jsonl"], "the run itself writes that"),
    "rank": ([*GOOD, "--rank", "two"], "--rank"),
    "config": ([*GOOD, "--config", "none.toml"], "none.toml"),
    "config type": ([*GOOD, "--config", "notes.txt"], "notes.txt: expected a .toml or a .json"),
    "no kind": (GOOD[:3], "kind is missing, expected one of lora, flora, "),
    "no model at all": (GOOD[1:], "model is missing, expected a checkpoint's"),
    "nothing": ([], "missing, expected at least one NAME=PATH"),
    "no output": ([*GOOD, "--config", "empty.toml"], "output is missing"),
    "output in a file": ([*GOOD, "--config", "output.toml"], "both: exists already"),
    "output of a number": ([*GOOD, "--config", "number.toml"], "output is 5, expected a directory"),
    "no targets": ([*GOOD, "--config", "untargeted.toml"], "untargeted.toml: targets is ()"),
    "resume in a file": ([*AGAIN[2:4], "--config", "resume.json", *data_of("ruby", "perl")],
                         "the run to resume has data"),
    "resume is no truth": ([*GOOD, "--config", "perhaps.toml"], "resume is 'perhaps', expected true"),
    "an end token of another vocabulary": (["endless", *GOOD[1:]], "the end token is 50256, expected"),
    "nothing to predict": ([*GOOD, "--data", "lua=blank.jsonl"],
                           "data lua=blank.jsonl: 1 tokens of 1 documents hold nothing to predict"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def bad_files(home, unfinished):
    files = {
        "number.toml": "output = 5", "untargeted.toml": "targets = []",
        "untrue.json": '{"rank": true}', "unknown.json": '{"ranks": 1}',
        "perhaps.toml": 'resume = "perhaps"', "blank.jsonl": '{"content": ""}',
        "resume.json": json.dumps(
            json.loads((unfinished / "config.json").read_text()) | {"resume": True}
        ),
    }  # fmt: skip
    for name, text in files.items():
        (home / name).write_text(text)
    (home / "nothing").mkdir()
    endless = shutil.copytree(home / "text", home / "endless")
    for file in ("config.json", "generation_config.json"):
        raw = json.loads((endless / file).read_text())
        (endless / file).write_text(json.dumps(raw | {"eos_token_id": 50256}))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_and_exit_code_2(case, home, both, unfinished, capsys):
    arguments, named = BAD[case]
    named_there = ("no output", "output in a file", "output of a number")
    if "--output" not in arguments and case not in named_there:
        arguments = [*arguments, "--output", "out"]
    kept = [both, unfinished, home / "text"]
    before = [snapshot(path) for path in kept]
    assert program(home, "train", *arguments) == 2
    out, err = capsys.readouterr()
    assert not (home / "out").exists()
    last = err.splitlines()[-1]
    assert out == ""
    assert last.startswith("flora-jax: ")
    assert named in last
    assert "hub" not in last
    assert err.count("\n") == 1 or err.startswith("data perl: ")
    assert [snapshot(path) for path in kept] == before


def test_changed_data_are_refused_on_resume(home, unfinished, capsys):
    path = home / "ruby.data.jsonl"
    before, held = path.read_text(), snapshot(unfinished)
    path.write_text(before.replace("a", "b"))
    try:
        assert program(home, "train", *AGAIN) == 2
    finally:
        path.write_text(before)
    err = capsys.readouterr().err
    assert "training data of 'ruby' are not what they were" in err
    assert err.count("\n") == 1
    assert snapshot(unfinished) == held


def test_another_base_in_the_place_of_the_old_is_refused_on_resume(home, unfinished, capsys):
    held = snapshot(unfinished)
    (home / "text").rename(home / "aside")
    try:
        shutil.copytree(home / "aside", home / "text")
        other = tiny_torch_model(1, vocab_size=PIECES, **SIZES)
        other.save_pretrained(home / "text")
        assert program(home, "train", *AGAIN) == 2
    finally:
        shutil.rmtree(home / "text")
        (home / "aside").rename(home / "text")
    err = capsys.readouterr().err
    assert "the weights of text are not what they were" in err.splitlines()[-1]
    assert snapshot(unfinished) == held


def test_a_base_that_differs_in_one_embedding_row_is_refused_on_resume(home, unfinished, capsys):
    held = snapshot(unfinished)
    weights = home / "text" / "model.safetensors"
    before = weights.read_bytes()
    tensors = load_file(weights)
    tensors["transformer.wte.weight"][PIECES - 1, 3] += 0.5
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        assert program(home, "train", *AGAIN) == 2
    finally:
        weights.write_bytes(before)
    err = capsys.readouterr().err
    assert "the weights of text are not what they were" in err.splitlines()[-1]
    assert snapshot(unfinished) == held


def test_a_second_run_in_one_directory_is_told_who_has_it(home, unfinished, capsys):
    held = snapshot(unfinished)
    code = """
import pathlib, sys
from flora_jax.files import directory_lock
with directory_lock(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(unfinished)], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout.readline() == "locked\n"
        assert program(home, "train", *AGAIN) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"flora-jax: unfinished: in use by process {holder.pid} on ")
        assert err.count("\n") == 1
        holder.stdin.close()
    assert snapshot(unfinished) == held


def test_a_run_inside_its_own_data_resumes(home):
    """Nothing that the run writes there is read as data, nor is what a killed run left."""
    (home / "sources" / "sub").mkdir(parents=True)
    for name in ("a.py", "sub/b.py"):
        (home / "sources" / name).write_text(f"# {name}\nprint({name!r})\n" * 4)
    arguments = [
        "train", "flat", "--data", "perl=sources", "--kind", "lora", "--steps", "4", "--seq-len",
        LENGTH, "--output", "sources/sub/run", "--save-every", "2", "--resume",
    ]  # fmt: skip
    assert program(home, *arguments) == 0
    run = home / "sources" / "sub" / "run"
    before = snapshot(run / "perl")
    assert json.loads((run / "data.json").read_text())["training"]["perl"]["documents"] == 2
    shutil.rmtree(run / "perl")
    shutil.rmtree(run / "checkpoints" / "4")
    (run / "half.part").mkdir()
    assert program(home, *arguments) == 0
    assert snapshot(run / "perl") == before


def test_a_picture_that_cannot_be_drawn_costs_no_adapter(
    both, home, unfinished, monkeypatch, capsys
):
    def fail(*_):
        raise ValueError("no formula")

    output = shutil.copytree(unfinished, home / "undrawn")
    arguments = ["train", "--config", output / "config.json", "--output", output, "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(results, "draw_curve", fail)
        assert program(home, *arguments) == 0
    assert "curve.png is not drawn (ValueError: no formula)" in capsys.readouterr().err
    for name in NAMES:
        weights = "adapter_model.safetensors"
        assert snapshot(output / name)[weights] == snapshot(both / name)[weights]
    # The finished run draws it without the model.
    (home / "text").rename(home / "aside")
    try:
        assert program(home, *arguments) == 0
    finally:
        (home / "aside").rename(home / "text")
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_killed_before_its_folders_writes_them_on_resume(both, home, unfinished):
    """The kept number of checkpoints and how often they are saved may differ."""
    output = shutil.copytree(unfinished, home / "late")
    arguments = ["--config", output / "config.json", "--output", output, "--resume"]
    assert program(home, "train", *arguments, "--keep", "1", "--save-every", "4") == 0
    for name in NAMES:
        found, expected = (snapshot(run / name) for run in (output, both))
        assert found.keys() == expected.keys()
        weights = "adapter_model.safetensors"
        assert found[weights] == expected[weights]
    assert lines_of(output) == lines_of(both)


def test_a_finished_run_without_its_metrics_writes_its_folders_on_resume(both, home, capsys):
    output = shutil.copytree(both, home / "no-metrics")
    shutil.rmtree(output / "perl")
    for name in ("metrics.jsonl", "curve.png"):
        (output / name).unlink()
    arguments = ["--config", output / "config.json", "--output", output, "--resume"]
    assert program(home, "train", *arguments) == 0
    warning = "curve.png is not drawn: .*metrics.jsonl has no training losses"
    assert re.search(warning, capsys.readouterr().err.replace("\n", " "))
    weights = "adapter_model.safetensors"
    assert (output / "perl" / weights).read_bytes() == (both / "perl" / weights).read_bytes()
    found, expected = ((run / "perl" / "README.md").read_text() for run in (output, both))
    assert "losses are not known" in found
    # The last validation is made anew.
    assert expected.splitlines()[-3] in found.splitlines()
    assert f"| {STEPS} |" in expected.splitlines()[-3]


def test_training_that_diverges_ends_in_one_line_with_the_adapter_and_its_documents(home, capsys):
    code = program(
        home, "train", "flat", *GOOD[1:], "--output", "diverged", "--learning-rate", "1e30",
        "--weight-decay", "1e30", "--steps", "20",
    )  # fmt: skip
    err = capsys.readouterr().err
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("flora-jax: ")
    assert "adapter perl, batch of perl.data.jsonl:" in last


def test_the_help_tells_the_defaults(home, capsys):
    """Words in square brackets would vanish: the help is rendered as markup."""
    assert program(home, "train", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for value in (" 1500", ": PEFT's for LoRA", " float32 on CPU", " cosine"):
        assert f"efault{value}" in text
    for option in ("--output", "--kind", "--data"):
        assert re.search(rf"{option} \S+ Required", text)
    assert "Required: Hugging Face directory" in text
