"""Generations, problems, results and reports as files: what is read, refused, written and resumed."""

import contextlib
import csv
import dataclasses
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flora_jax.errors import InputError, RunError
from flora_jax.evaluate import client as client_module
from flora_jax.evaluate import tables
from flora_jax.evaluate.client import Client
from flora_jax.evaluate.completions import (
    Generation,
    Sampling,
    complete_all,
    export_bigcode,
    read_generations,
    truncate,
)
from flora_jax.evaluate.languages import select
from flora_jax.evaluate.problems import Problem, read_problems, with_stop_tokens
from flora_jax.evaluate.results import (
    Result,
    check_same_problems,
    check_same_stops,
    read_results,
    summarise,
)
from flora_jax.shipped import ASSETS
from tests.helpers.program import program_in

LINE = {"name": "one", "language": "pl", "prompt": "p", "tests": "t", "stop_tokens": ["\n\n"],
        "completions": ["c", "d"]}  # fmt: skip
PROBLEMS = [Problem(name, "pl", f"sub {name} {{\n", "t", ("\n\n", "\nsub")) for name in "abc"]


def written(tmp_path, *lines):
    path = tmp_path / "generations.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n")
    return path


def test_a_program_is_prompt_completion_newline_tests(tmp_path):
    (one,) = read_generations(written(tmp_path, LINE, ""))
    assert [one.program(0), one.program(1)] == ["pc\nt", "pd\nt"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "malformed JSON"),
        ("[1]", "found a list, expected an object"),
        ({**LINE, "language": "cobol"}, "language is 'cobol', expected one of d, lua, pl"),
        ({**LINE, "completions": []}, "completions is empty"),
        ({**LINE, "completions": "c"}, "completions is a string, expected a list of strings"),
        ({**LINE, "completions": ["c", None]}, "completions[1] is null, expected a string"),
        ({**LINE, "tests": 3}, "tests is a number, expected a string"),
        ({"name": "two", "language": "pl"}, "prompt is missing, found name, language"),
        ({**LINE, "name": "one"}, "one in pl is given twice, first at"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message):
    line = line if isinstance(line, str) else {"name": "two", **line}
    path = written(tmp_path, LINE, "", line)
    with pytest.raises(
        InputError, match=re.escape(f"{path}, line 3: ") + ".*" + re.escape(message)
    ):
        read_generations(path)


def test_an_absent_or_empty_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent.jsonl: no such file"):
        read_generations(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"generations.jsonl: no generations$"):
        read_generations(written(tmp_path, ""))
    with pytest.raises(InputError, match="no generations in d, rb"):
        read_generations(written(tmp_path, LINE), ["rb", "d"])


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(json.dumps(LINE).encode() + b'\n{"name": "\xff"}\n')
    with pytest.raises(InputError, match="line 2"):
        read_generations(tmp_path / "bad.jsonl")


def test_languages_are_selected_by_name():
    assert select(["rb", "pl", "rb"]) == ("rb", "pl")
    assert select(["all"]) == ("d", "lua", "pl", "rb", "rkt", "rs", "swift")
    with pytest.raises(InputError, match="'python', expected all or d, lua"):
        select(["python"])


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("ab\nsub c", ["\n\n", "\nsub"], "ab"),
        ("ab\n\nsub c\nsub", ["\nsub", "\n\n"], "ab"),
        ("ab", ["\nsub"], "ab"),
        ("\nsub", ["\nsub"], ""),
        ("ab", [], "ab"),
        ("abc", ["bc", "b"], "a"),
        ("abc", [""], ""),
    ],
)
def test_a_completion_ends_where_the_first_stop_token_begins(text, stops, expected):
    assert truncate(text, stops) == expected


def test_the_export_is_what_bigcode_reads(tmp_path):
    other = {**LINE, "language": "rb", "completions": ["e"]}
    generations = read_generations(written(tmp_path, LINE, {**LINE, "name": "two"}, other))
    paths = export_bigcode(generations, tmp_path / "bigcode")
    assert [path.name for path in paths] == [
        "generations_multiple-pl.json",
        "generations_multiple-rb.json",
    ]
    assert [json.loads(path.read_text()) for path in paths] == [[["pc", "pd"]] * 2, [["pe"]]]
    with pytest.raises(InputError, match="exists already"):
        export_bigcode(generations, tmp_path / "bigcode")


def test_problems_come_from_a_directory_by_language(tmp_path, shared_data):
    problems = read_problems(str(shared_data / "multipl-e"), ["rs", "pl"])
    assert [len([p for p in problems if p.language == name]) for name in ("rs", "pl")] == [156, 161]
    assert problems[0].model_prompt == problems[0].prompt.strip()
    assert problems[0].stop_tokens == ("\n}",)


def test_the_current_release_ends_no_body_of_lua_at_a_blank_line():
    """And changes nothing of any other language, or of a list that is current already."""
    old = [
        Problem("a", "lua", "", "", ("\nlocal", "\n--", "\n\n")),
        Problem("b", "rb", "", "", ("\ndef", "\n\n")),
    ]
    assert with_stop_tokens(old, "given") == old
    new = with_stop_tokens(old, "current")
    assert [one.stop_tokens for one in new] == [("\nlocal", "\n--"), ("\ndef", "\n\n")]
    assert with_stop_tokens(new, "current") == new
    body = "  local a = 1\n\n  return a\nend\n-- next"
    cut = [Generation.of(ours[0], [body]).completions[0] for ours in (old, new)]
    assert cut == ["  local a = 1", "  local a = 1\n\n  return a\nend"]
    with pytest.raises(InputError, match="stop tokens are 'new', expected one of given, current"):
        with_stop_tokens(old, "new")


@pytest.mark.parametrize("which", ["new", ""])
def test_stop_tokens_of_no_known_kind_are_refused_before_anything_is_read(
    tmp_path, monkeypatch, capsys, which
):
    run = program_in(tmp_path, monkeypatch, capsys, "evaluate", "multipl-e", "absent")
    _, _, err = run("--problems", "absent", "--output", "runs", "--stop-tokens", which)
    assert f"--stop-tokens is {which!r}, expected one of given, current" in err
    assert not (tmp_path / "runs").exists()


def test_an_adapter_is_a_folder_or_a_shipped_one(tmp_path, monkeypatch, capsys):
    def stop(directory, problems, folders, *rest):
        raise InputError(f"asked for {folders}")

    monkeypatch.setattr("flora_jax.evaluate.local.Local", stop)
    (tmp_path / "humaneval-pl.jsonl").write_text(json.dumps(LINE))
    run = program_in(tmp_path, monkeypatch, capsys, "evaluate", "multipl-e", "mini")
    words = ["--problems", tmp_path, "--language", "pl", "--output", "runs"]
    _, _, err = run(*words, "--adapter", "pl=flora/perl")
    assert err == f"flora-jax: asked for {{'pl': {ASSETS / 'adapters/flora/perl'!r}}}\n"
    _, _, err = run(*words, "--adapter", "perl")
    assert "--adapter is 'perl', expected LANGUAGE=DIR" in err


def test_bad_problems_are_named(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        read_problems(str(tmp_path / "absent"), ["pl"])
    with pytest.raises(InputError, match=r"humaneval-pl.jsonl: no such file"):
        read_problems(str(tmp_path), ["pl"])
    path = tmp_path / "humaneval-pl.jsonl"
    path.write_text(json.dumps({**LINE, "language": "rb"}))
    with pytest.raises(InputError, match="line 1: language is 'rb', expected 'pl'"):
        read_problems(str(tmp_path), ["pl"])


class Stops(Exception):
    pass


def completer(asked, most=99):
    """Completes in reverse order, and fails after ``most``."""

    def complete(problems, sampling):
        asked.append([problem.name for problem in problems])
        for number, problem in enumerate(reversed(problems)):
            if number == most:
                raise Stops
            yield Generation.of(problem, [f" {problem.name};\n\nrest"] * sampling.n_samples)

    return complete


def test_generating_goes_on_where_it_was_stopped(tmp_path):
    asked, sampling, source = [], Sampling(n_samples=2), {"model": "m"}
    with pytest.raises(Stops):
        complete_all(PROBLEMS, completer(asked, 2), sampling, tmp_path, source=source)
    found = complete_all(PROBLEMS, completer(asked), sampling, tmp_path, source=source)
    assert asked == [["a", "b", "c"], ["a"]]
    assert [one.completions for one in found] == [(f" {name};",) * 2 for name in "abc"]
    assert read_generations(tmp_path / "generations.jsonl") == found
    assert complete_all(PROBLEMS, completer(asked), sampling, tmp_path, source=source) == found
    assert len(asked) == 2
    other = Sampling(n_samples=2, temperature=0.5)
    with pytest.raises(InputError, match=r"generated with temperature 0.1, now 0.5"):
        complete_all(PROBLEMS, completer(asked), other, tmp_path, source=source)


@pytest.mark.parametrize(
    "field, value", [("prompt", "other"), ("tests", "other"), ("stop_tokens", ("\nsub",))]
)
@pytest.mark.parametrize("done", [True, False])
def test_completions_of_a_problem_that_changed_are_not_kept(tmp_path, field, value, done):
    sampling, source = Sampling(n_samples=1), {"model": "m"}
    with contextlib.suppress(Stops):
        complete_all(PROBLEMS, completer([], 99 if done else 2), sampling, tmp_path, source=source)
    changed = [dataclasses.replace(one, **{field: value}) for one in PROBLEMS]
    with pytest.raises(
        InputError, match=f"[abc] in pl was generated with another {field}, .* expected"
    ):
        complete_all(changed, completer([]), sampling, tmp_path, source=source)


def test_completions_are_those_of_a_model_s_content_by_whatever_path(tmp_path):
    sampling, asked = Sampling(n_samples=1), []

    def made(model, content):
        source = {"model": model, "model_sha256": content}
        return complete_all(PROBLEMS, completer(asked), sampling, tmp_path, source=source)

    assert made("here", "1") == made("moved/there", "1")
    assert len(asked) == 1
    with pytest.raises(
        InputError, match=r"generation.json: generated with model_sha256 '1', now '2'"
    ):
        made("here", "2")


def test_a_problem_that_is_left_out_is_an_error(tmp_path):
    with pytest.raises(RunError, match="a in pl was not completed, of 3"):
        complete_all(PROBLEMS, lambda *_: iter(()), Sampling(), tmp_path, source={})


@pytest.mark.parametrize(
    "values", [{"n_samples": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0},
               {"temperature": float("nan")}, {"max_tokens": 0}, {"seed": -1}],
)  # fmt: skip
def test_sampling_out_of_range_is_refused(values):
    with pytest.raises(InputError, match="--"):
        Sampling(**values)


@pytest.fixture
def server():
    """A server of completions that answers with what it was asked; ``refuse`` are codes to give first."""
    asked, refuse = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code = refuse.pop() if refuse else 200
            if code == 0:  # No HTTP at all.
                self.wfile.write(b"nonsense\r\n\r\n")
                return
            answer = {"error": "no such model"}
            if code == 200:
                asked.append((self.path, self.headers["Authorization"], body))
                said = [f" {body['model']} {body['seed']} {i}\n\nmore" for i in range(body["n"])]
                answer = {"choices": [{"text": text} for text in said]}
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1", asked, refuse
        http.shutdown()
        thread.join()


def test_a_server_is_asked_for_all_samples_with_the_language_s_adapter(server, monkeypatch):
    url, asked, refuse = server
    monkeypatch.setattr(client_module.time, "sleep", lambda _: None)
    refuse += [503, 429, 0]
    problems = [*PROBLEMS[:1], Problem("a", "rb", "def a\n", "t", ())]
    client = Client(url, "base", {"rb": "ruby-adapter"}, "key", per_request=3)
    sampling = Sampling(n_samples=5, max_tokens=9)
    found = {one.language: one for one in client(problems, sampling)}
    assert [len(one.completions) for one in found.values()] == [5, 5]
    assert all(text.startswith(" base ") for text in found["pl"].completions)
    assert all("ruby-adapter" in text for text in found["rb"].completions)
    assert not any("more" in text for text in found["pl"].completions)
    assert len(set(found["pl"].completions)) == 5
    path, key, body = next(one for one in asked if one[2]["model"] == "base")
    assert (path, key) == ("/v1/completions", "Bearer key")
    assert (body["prompt"], body["stop"], body["max_tokens"]) == ("sub a {", ["\n\n", "\nsub"], 9)
    again = {one.language: one for one in client(problems, sampling)}
    assert again == found


def test_a_server_s_refusal_is_told(server, monkeypatch):
    url, _, refuse = server
    monkeypatch.setattr(client_module.time, "sleep", lambda _: None)
    refuse.append(404)
    with pytest.raises(InputError, match=r"404 .*no such model"):
        list(Client(url, "m")(PROBLEMS[:1], Sampling(1)))
    refuse += [500] * 4
    with pytest.raises(RunError, match="no answer after 4 tries: 500"):
        list(Client(url, "m")(PROBLEMS[:1], Sampling(1)))
    with pytest.raises(InputError, match=r"--server is 'http://a b/v1': .* control characters"):
        list(Client("http://a b/v1", "m")(PROBLEMS[:1], Sampling(1)))


def results(*correct):
    return [
        Result(f"p{i}", "pl", ("OK",) * count + ("Exception",) * (4 - count))
        for i, count in enumerate(correct)
    ]


def test_a_table_shows_improvement_relative_to_the_base(tmp_path):
    summaries = {"base": summarise(results(1, 1)), "flora": summarise(results(1, 2))}
    cells = tables.table(summaries, base="base")
    assert [(cell.value, cell.relative) for cell in cells] == [(0.25, None), (0.375, 0.5)]
    paths = {path.name: path for path in tables.write_report(cells, tmp_path / "new")}
    assert "| Perl | 25.00 ± 0.00 | 37.50 ± 12.50 (+50.00 %) |" in paths["table.md"].read_text()
    rows = list(csv.DictReader(paths["table.csv"].read_text().splitlines()))
    assert [row["relative"] for row in rows] == ["", "0.5"]
    assert json.loads(paths["table.json"].read_text())[1]["statuses"] == {"Exception": 5, "OK": 3}
    assert paths["table.png"].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no pass@10, the fewest samples of a problem are 4"):
        tables.table(summaries, 10)
    with pytest.raises(InputError, match="--base is 'lora', expected one of base, flora"):
        tables.table(summaries, base="lora")


def test_names_of_methods_are_shown_as_they_are(tmp_path):
    names = ["a|b", "$x_1$ is $", "_hidden", "<b>*c*</b>", "two\nlines"]
    cells = tables.table({name: summarise(results(1, 2)) for name in names})
    markdown = tables.to_markdown(cells)
    head = markdown.splitlines()[0]
    assert head == (
        r"| language | a\|b | \$x_1\$ is \$ | \_hidden | \<b\>\*c\*\</b\> | two lines |"
    )
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines()] == [7] * 3
    failures = tables.failures_markdown(cells)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in failures.splitlines()}) == 1
    # As formulas, some of the names would end the drawing.
    legend = tables.figure(cells).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == names
    tables.write_report(cells, tmp_path / "new")


def test_a_table_replaces_an_older_one_only_where_asked(tmp_path):
    cells = tables.table({"base": summarise(results(1, 1))})
    tables.write_report(cells, tmp_path)
    with pytest.raises(InputError, match="exists already"):
        tables.write_report(cells, tmp_path)
    tables.write_report(cells, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(tables.FILES)


def test_nothing_is_relative_to_a_base_that_passes_nothing():
    summaries = {"base": summarise(results(0, 0)), "flora": summarise(results(1, 2))}
    assert [cell.relative for cell in tables.table(summaries, base="base")] == [None, None]


def test_only_results_of_the_same_problems_are_relative_to_each_other():
    check_same_problems({"base": results(1, 2), "flora": results(0, 0)}, "base")
    other = [*results(1, 2), Result("p0", "rb", ("OK",))]
    check_same_problems({"base": results(1, 2), "flora": other}, "base")
    with pytest.raises(InputError, match="base and flora have not the same problems in pl: p1"):
        check_same_problems({"base": results(1, 2), "flora": results(1)}, "base")


def evaluated(directory, run):
    """A directory of results with what its run.json says, if it has one."""
    directory.mkdir()
    text = "".join(json.dumps(one.to_dict()) + "\n" for one in results(1, 2))
    (directory / "results.jsonl").write_text(text)
    if run is not None:
        (directory / "run.json").write_text(run if isinstance(run, str) else json.dumps(run))
    return directory


@pytest.mark.parametrize(
    "run",
    [
        {"stop_tokens": {"pl": [["\nsub", "\n\n"]]}},
        {"stop_tokens": {"pl": [["\n\n", "\nsub"]], "rb": [["\ndef"]]}},
        {"stop_tokens": {"pl": [[]]}},
        {"programs": 3},
        None,
    ],
)
def test_runs_cut_alike_or_at_what_nobody_knows_are_compared(tmp_path, run):
    first = evaluated(tmp_path / "a", {"stop_tokens": {"pl": [["\nsub", "\n\n"]]}})
    check_same_stops([first, evaluated(tmp_path / "b", run)])


def test_only_completions_cut_at_the_same_stop_tokens_are_compared(tmp_path, monkeypatch, capsys):
    first = evaluated(tmp_path / "a", {"stop_tokens": {"pl": [["\nsub", "\n\n"]]}})
    second = evaluated(tmp_path / "b", {"stop_tokens": {"pl": [["\nsub"]]}})
    message = (
        f"{second}/run.json: completions in pl were cut at ['\\nsub'], those of {first}/run.json at "
        "['\\nsub', '\\n\\n'], expected the same stop tokens"
    )
    run = program_in(tmp_path, monkeypatch, capsys, "evaluate")
    for words in (
        ("compare", first, second),
        ("compare", first / "results.jsonl", second / "results.jsonl"),
        ("table", f"base={first}", f"flora={second}", "--output", "new"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert message in err
    assert not (tmp_path / "new").exists()
    # Somewhere else another run lies beside it.
    moved = second / "others.jsonl"
    (second / "results.jsonl").rename(moved)
    check_same_stops([first, moved])


@pytest.mark.parametrize(
    "run, message",
    [
        ("{", "malformed JSON"),
        ('{"stop_tokens": 3}', "stop_tokens is a number, expected an object"),
        ('{"stop_tokens": {"pl": "a"}}', "stop_tokens of pl is a string, expected a list"),
        (
            '{"stop_tokens": {"pl": ["a"]}}',
            "stop_tokens: pl is a string, expected a list of strings",
        ),
    ],
)
def test_a_damaged_record_of_a_run_is_named(tmp_path, run, message):
    directory = evaluated(tmp_path / "a", run)
    with pytest.raises(InputError, match=f"{directory}/run.json.*{re.escape(message)}"):
        check_same_stops([directory])


def test_results_are_read_back(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(one.to_dict()) + "\n" for one in results(1, 2)))
    assert read_results(tmp_path) == read_results(path) == results(1, 2)
    path.write_text('{"name": "a", "language": "pl", "statuses": ["OK"]}\n' * 2)
    with pytest.raises(InputError, match="line 2: a in pl is there twice"):
        read_results(tmp_path)
    path.write_text('{"name": "a", "language": "pl", "statuses": ["OK", "ok"]}')
    with pytest.raises(InputError, match=r"line 1: status is 'ok', expected one of OK, Timeout"):
        read_results(tmp_path)
    path.write_text('{"name": "a", "language": "pl", "statuses": []}')
    with pytest.raises(InputError, match="line 1: statuses is empty"):
        read_results(tmp_path)
