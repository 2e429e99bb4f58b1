"""The measurements on a GPU: the whole rehearsal, the runner's limits, the report of what it wrote."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.gpu import items, report, run
from experiments.gpu.compiling import compiled_first
from experiments.gpu.run import Plan, Runner
from flora_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {"stage": "run", "card": "NVIDIA H100", "driver": "580", "commit": "abc", "date": "today",
         "rehearse": False, "versions": {"jax": "0.11.2"}}  # fmt: skip


def lines_of(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path, 60.0, rehearse=False)


def test_the_rehearsal_runs_every_stage_and_its_report_has_every_table(tmp_path):
    command = [sys.executable, "experiments/gpu/run.py", "--output", str(tmp_path), "--rehearse"]
    # A minute or two on two idle cores; the others' tests may want them as well.
    command += ["--seconds", "1200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1300)
    log = (tmp_path / "log.txt").read_text()[-3000:]
    assert done.returncode == 0, done.stderr + log
    lines = lines_of(tmp_path / "results.jsonl")
    stages = {line["stage"]: line for line in lines if "rc" in line}
    assert tuple(stages) == run.NAMES
    assert len(stages) >= 8
    assert all(line["rc"] == 0 and line["took_s"] > 0 for line in stages.values()), log
    found = [line for line in lines if "item" in line]
    assert {line["stage"] for line in found} == set(run.NAMES)
    assert [line for line in found if "failed" in line] == []
    skipped = {line["skipped"] for line in found if "skipped" in line}
    assert {"a CPU has no cuDNN", "a CPU has no CUDA graphs"} <= skipped
    assert not any("ms_step" in line and "skipped" in line for line in found)
    # No row broke off, and nothing was compiled within what was timed.
    assert {line["broken"] for line in found if "broken" in line} == {0}
    assert {line["compilations"] for line in found if "compilations" in line} == {0}
    assert {line["prompts"] for line in found if "prompts" in line} == {"read"}
    about = json.loads((tmp_path / "device.json").read_text())
    assert about["rehearse"] is True
    assert {"card", "driver", "versions", "commit"} <= set(about)
    shown = report.text(report.read([tmp_path]))
    for title in ("Ceilings", "A decode step", "One projection", "Eq. 7", "A prompt", "A training step",
                  "The peers' decode step", "The engine\n",
                  "What launching costs the host"):  # fmt: skip
        assert f"## {title}" in shown, title
    assert "its numbers mean nothing" in shown


def test_a_stage_that_breaks_off_costs_the_others_nothing(runner, capsys):
    assert runner.run(Plan("broken", 30, "x"), python("raise SystemExit(3)")) == 3
    assert runner.run(Plan("whole", 30, "x"), python("pass")) == 0
    lines = lines_of(runner.results)
    assert [(line["stage"], line["rc"]) for line in lines] == [("broken", 3), ("whole", 0)]
    assert [json.loads(text) for text in capsys.readouterr().out.splitlines()] == lines


def test_a_stage_that_runs_past_its_limit_is_ended_with_all_that_it_started(runner, monkeypatch):
    monkeypatch.setattr(run, "LEAST_S", 0.1)
    monkeypatch.setattr(run, "GRACE_S", 1.0)
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    began = time.monotonic()
    assert runner.run(Plan("late", 3.0, "x"), python(code)) == -signal.SIGKILL
    assert time.monotonic() - began < 10
    (line,) = lines_of(runner.results)
    assert line["timed_out"] is True
    assert line["rc"] == -signal.SIGKILL
    child = int(runner.log.read_text().split()[-1])
    status = Path(f"/proc/{child}/status")
    for _ in range(50):  # Its end is seen once the system has cleared it away.
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process that the stage started lives on")


def test_a_stage_knows_its_deadline_and_writes_beside_the_others(runner):
    code = (
        "import time; from experiments.gpu import items; own = items.from_environment(); "
        "own.put('x', left=own.left, name=own.name, rehearse=own.rehearse)"
    )
    assert runner.run(Plan("one", 20, "x"), python(code)) == 0
    item, stage = lines_of(runner.results)
    assert item["stage"] == stage["stage"] == item["name"] == "one"
    assert 5 < item["left"] < 20 - run.GRACE_S
    assert item["rehearse"] is False


def test_all_stages_together_are_bounded_and_those_left_out_are_said(tmp_path):
    runner = Runner(tmp_path, run.LEAST_S + 4, rehearse=False)
    assert runner.run(Plan("first", 100, "x"), python("import time; time.sleep(3)")) == 0
    assert runner.run(Plan("second", 100, "x"), python("pass")) is None
    first, second = lines_of(runner.results)
    assert first["limit_s"] <= run.LEAST_S + 4
    assert (second["rc"], second["took_s"]) == (None, 0.0)
    assert "s left" in second["skipped"]


def test_a_line_after_half_a_one_stands_on_its_own(tmp_path):
    path = tmp_path / "results.jsonl"
    items.append(path, {"stage": "a"})
    with path.open("a") as file:
        file.write('{"stage": "b", "us": 1')
    items.append(path, {"stage": "c"})
    texts = path.read_text().splitlines()
    assert [json.loads(texts[0]), texts[1], json.loads(texts[2])] == [
        {"stage": "a"}, '{"stage": "b", "us": 1', {"stage": "c"},
    ]  # fmt: skip
    with pytest.raises(ValueError):
        items.append(path, {"us": float("nan")})


def test_an_item_that_fails_or_cannot_be_done_is_a_line_with_its_reason(tmp_path, capsys):
    own = items.Stage("s", tmp_path / "r.jsonl", time.time() + 5, rehearse=False)

    def broken():
        raise RuntimeError("out of\nmemory")

    def impossible():
        raise items.Skip("a CPU has no cuDNN")

    own.attempt("a", broken, kind="x")
    own.attempt("b", impossible)
    own.attempt("c", lambda: {"us": 1.0}, need_s=60)
    own.attempt("d", lambda: {"us": 1.0}, kind="y")
    own.attempt("e", lambda: items.require("no_such_package_at_all"))
    a, b, c, d, e = lines_of(own.results)
    assert a["failed"] == "RuntimeError: out of memory"
    assert (a["kind"], b["skipped"], d["us"], d["kind"]) == ("x", "a CPU has no cuDNN", 1.0, "y")
    assert "it needs 60" in c["skipped"]
    assert e["skipped"] == "no no_such_package_at_all"
    assert "RuntimeError" in capsys.readouterr().err


class Program:
    """A lowered program, which compiles when it may."""

    def __init__(self, may=None, error=None):
        self.may, self.error, self.compiled = may, error, False

    def compile(self):
        if self.may is not None:
            assert self.may.wait(60)
        if self.error is not None:
            raise self.error
        self.compiled = True


def test_all_programs_are_compiled_before_the_first_case_and_each_case_has_its_own_reason(tmp_path):
    own = items.Stage("s", tmp_path / "r.jsonl", time.time() + 60, rehearse=False)
    never = threading.Event()
    programs = {"a": Program(), "b": Program(error=RuntimeError("no memory")), "last": Program()}
    late = Program(never)

    def begin(name):
        if name == "wrong":
            raise ValueError("no such kind")
        return name.upper(), [late if name == "late" else programs[name]]

    cases = [("a",), ("b",), ("wrong",), ("late",), ("last",)]
    found = compiled_first(own, cases, begin, threads=2, need_s=58)
    first, ready = next(found)
    assert (first, programs["last"].compiled) == (("a",), True)
    assert ready().made == "A"
    assert ready().compiled_s >= 0
    reasons = {}
    for (name,), ready in found:
        try:
            ready()
        except Exception as error:
            reasons[name] = (type(error), str(error))
    never.set()
    assert reasons == {
        "b": (RuntimeError, "no memory"),
        "wrong": (ValueError, "no such kind"),
        "late": (items.Skip, "it was still compiling"),
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["--stages", "ceilings,foo"], "--stages has 'foo', expected of ceilings, ceilings-torch"),
        (["--seconds", "0"], "--seconds is 0, expected more than 0"),
        (["--seconds", "x"], "argument --seconds: invalid float value: 'x'"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_run(words, message, tmp_path, capsys):
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        run.main(["--output", str(output), *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not output.exists()
    with pytest.raises(SystemExit) as ended:
        run.main([])
    assert ended.value.code == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run.main(["--output", str(blocked)]) == 2
    assert str(blocked) in capsys.readouterr().err


def test_ending_the_runner_ends_its_stage(tmp_path):
    code = (
        "import sys; from pathlib import Path; from experiments.gpu import run\n"
        "runner = run.Runner(Path(sys.argv[1]), 60.0, False)\n"
        "with run.ending_by_exception():\n"
        "    runner.run(run.Plan('long', 50, 'x'), [sys.executable, '-c', "
        "'import os, time; print(os.getpid(), flush=True); time.sleep(60)'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    log = tmp_path / "log.txt"
    for _ in range(200):
        if log.exists() and log.read_text().split()[-1].isdigit():
            break
        time.sleep(0.1)
    child = int(log.read_text().split()[-1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_readme_tells_every_stage_and_its_limit():
    text = (ROOT / "experiments/gpu/README.md").read_text()
    told = {}
    for line in text.splitlines():
        if line.startswith("| ") and "stage" not in line.split("|")[1]:
            names, limits = (cell.strip().split(", ") for cell in line.split("|")[1:3])
            told |= dict(zip(names, map(float, limits), strict=True))
    assert told == {plan.name: plan.limit_s for plan in run.STAGES}


def test_the_runner_needs_nothing_but_the_standard_library():
    code = (
        "import sys; import experiments.gpu.run; "
        "print(*{'jax', 'numpy', 'torch', 'typer', 'flax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def decode(kind, rank, ms, **more):
    about = {"preset": "15b", "layers": 40, "rows": 32, "positions": 512, "attention": "auto"}
    about |= {"stage": "decode-whole", "item": "decode", "kind": kind, "rank": rank}
    return about | {"ms_step": ms, "tok_s": 32e3 / ms, "at_s": ms} | more


def case(kind, rank, us, form="batched", **more):
    about = {"stage": "layer", "item": "case", "preset": "15b", "target": "attn.c_attn", "rows": 32}
    about |= {"tokens": 1, "inputs": 6144, "outputs": 6400, "dtype": "float16"}
    return about | {"kind": kind, "rank": rank, "form": form, "us": us} | more


def written(place, *lines, about=ABOUT, end=""):
    place.mkdir(exist_ok=True)
    texts = [json.dumps(line) for line in (about, *lines)]
    (place / "results.jsonl").write_text("\n".join(texts) + "\n" + end)
    return place


def test_a_later_figure_replaces_an_earlier_one_but_a_failure_does_not(tmp_path):
    place = written(
        tmp_path / "a", decode("none", 0, 12.0), decode("none", 0, 11.0),
        {**decode("none", 0, 1.0), "failed": "it broke", "ms_step": None}, decode("flora", 8, 13.0),
    )  # fmt: skip
    found = report.read([place]).items
    assert [line["ms_step"] for line in found] == [11.0, 13.0]
    shown = report.decode(found)
    assert "1.182" in shown
    assert "it broke" not in report.missing(report.read([place]))


def test_cut_results_give_all_that_is_whole(tmp_path):
    place = written(
        tmp_path / "a", decode("none", 0, 12.0), {"stage": "x", "item": "y", "failed": "no memory"},
        {"stage": "late", "rc": -9, "took_s": 3, "timed_out": True},
        {"stage": "last", "rc": None, "took_s": 0, "skipped": "3 s left"},
        end='{"stage": "decode-whole", "item": "dec',
    )  # fmt: skip
    results = report.read([place])
    assert (len(results.items), results.broken) == (2, 1)
    shown = report.text(results)
    for words in (
        "1 lines are not whole",
        "late: ran past its limit",
        "last: 3 s left",
        "no memory",
    ):
        assert words in shown
    assert "NVIDIA H100" in shown
    assert "| 15b | 40 | 32 | 512 | auto | none | 0 | 12 |" in shown


def test_two_cards_never_stand_in_one_table(tmp_path):
    first = written(tmp_path / "a", decode("none", 0, 12.0))
    other = written(tmp_path / "b", decode("none", 0, 9.0), about=ABOUT | {"card": "NVIDIA H200"})
    with pytest.raises(InputError, match=r"NVIDIA H200.*NVIDIA H100.*two cards"):
        report.read([first, other])
    rehearsed = written(tmp_path / "c", about=ABOUT | {"rehearse": True})
    with pytest.raises(InputError, match="two cards"):
        report.read([first, rehearsed])
    again = written(tmp_path / "d", decode("flora", 8, 9.0), about=ABOUT | {"date": "later"})
    assert len(report.read([first, again]).items) == 2
    (tmp_path / "e").mkdir()
    with pytest.raises(InputError, match="No such file"):
        report.read([tmp_path / "e"])
    (tmp_path / "e" / "results.jsonl").write_text('{"stage": "x", "rc": 0}\n')
    with pytest.raises(InputError, match="no line says which card"):
        report.read([tmp_path / "e"])


def test_eq_7_is_fitted_to_all_ranks_of_a_shape_and_form(tmp_path):
    # FLoRA costs a base product a rank, LoRA an eighth of one: they cross at 8/7.
    lines = [case("base", None, 26.0, "plain")]
    for rank in (1, 2, 4, 8):
        lines += [case("flora", rank, 26.0 * rank), case("lora", rank, 26.0 + 26.0 * rank / 8)]
    lines += [case("flora", 8, 30.0, "merged"), case("lora", 8, 30.0, "merged")]
    lines += [case("lora", 8, 99.0, "ragged")]
    (found,) = report.crossovers(lines)
    assert found["by"] == "batched"
    assert found["fit_error"] < 1e-6
    assert found["predicted_rank"] == pytest.approx(8 / 7)
    assert 1 < found["measured_rank"] < 2
    panels = report.eq7_panels(lines)
    assert list(panels) == ["32 rows of 1"]
    assert panels["32 rows of 1"]["batched, Eq. 7"] == [(6144, pytest.approx(8 / 7))]


def test_torch_cases_are_compared_with_their_own_base():
    def torch(kind, rank, us, how):
        made = case(kind, rank, us) | {"stage": "layer-torch", "how": how}
        del made["form"]
        return made

    lines = [
        torch("base", None, 20.0, "graph"), torch("base", None, 40.0, "eager"),
        torch("lora", 1, 30.0, "graph"), torch("lora", 1, 80.0, "eager"),
        torch("lora", 1, 25.0, "compiled graph"),
    ]  # fmt: skip
    shown = report.layers(lines)
    assert "| torch, graph | lora | 1 | 30 | 1.5 |" in shown
    assert "| torch, eager | lora | 1 | 80 | 2 |" in shown
    assert "| torch, compiled graph | lora | 1 | 25 | 1.25 |" in shown


def test_figure_2_has_whole_models_and_says_where_layers_are_missing(tmp_path):
    whole = [decode("none", 0, 12.0), decode("flora", 1, 12.0), decode("flora", 8, 13.0)]
    part = [decode("flora", rank, 4.0, layers=10, stage="decode-ranks") for rank in (1, 2, 4, 8)]
    panels = report.figure2(whole + part)
    assert list(panels) == ["15b: tokens/s", "15b: ms a token"]
    assert panels["15b: ms a token"]["flora"] == [(1, 12.0), (8, 13.0)]
    assert panels["15b: ms a token"]["none"] == [(1, 12.0), (8, 12.0)]
    assert list(report.figure2(part)) == [
        "15b: tokens/s, 10 of 40 layers", "15b: ms a token, 10 of 40 layers",
    ]  # fmt: skip
    paper = [{"model": "15b", "metric": "throughput", "kind": "flora", "rank": "1", "value": "5"}]
    assert report.figure2(whole, paper)["15b: tokens/s"]["paper: flora"] == [(1, 5.0)]
    assert report.figure2([]) == {}


def test_the_papers_points_are_numbers_or_none(tmp_path):
    assert report.read_paper() == []
    path = tmp_path / "paper.csv"
    path.write_text("model,metric,kind,rank,value\n15b,throughput,flora,1,many\n")
    with pytest.raises(InputError, match="line 2: expected model,metric,kind,rank,value"):
        report.read_paper(path)


def test_the_report_writes_tables_and_pictures(tmp_path, capsys):
    lines = [decode("none", 0, 12.0), decode("flora", 8, 13.0), case("base", None, 26.0, "plain")]
    lines += [case(kind, rank, 20.0 + rank) for kind in ("flora", "lora") for rank in (1, 8)]
    place = written(tmp_path / "a", *lines)
    report.main([place], tmp_path / "out")
    assert (tmp_path / "out" / "report.md").read_text().startswith("# NVIDIA H100")
    for name in ("figure2.png", "eq7.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
        assert name in capsys.readouterr().out or name == "eq7.png"
