"""Adapter folders come first; a picture or a name never costs a finished run."""

import json
import re

import pytest

from flora_jax.train import results
from flora_jax.train.results import draw_curve, plain, write_curve

NAMES = ["us$a_$=", "_x", "$x$", "a|b", "λ中"]


def lines_of(names):
    first = {"step": 0, "validation": {name: {"loss": 3.0} for name in names}}
    trained = [{"step": n, "loss": 2.0, "losses": dict.fromkeys(names, 2.0)} for n in (1, 5)]
    return [first, *trained]


@pytest.fixture
def output(tmp_path):
    text = "".join(json.dumps(line) + "\n" for line in lines_of(NAMES))
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def test_names_are_no_markup_in_the_picture(output, monkeypatch):
    from matplotlib.figure import Figure

    figures = []

    def subplot(figure, *arguments, **options):
        figures.append(figure)
        return add(figure, *arguments, **options)

    add = Figure.add_subplot
    monkeypatch.setattr(Figure, "add_subplot", subplot)
    draw_curve(lines_of(NAMES), NAMES, output / "curve.png")
    texts = figures[0].axes[0].get_legend().get_texts()
    labels = [f"{name}, {split}" for name in NAMES for split in ("training", "validation")]
    assert [text.get_text() for text in texts] == labels
    assert not any(text.get_parse_math() for text in texts)
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_picture_that_cannot_be_drawn_is_a_warning(output, monkeypatch):
    def fail(*_):
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(results, "draw_curve", fail)
    said = []
    write_curve(output, NAMES, said.append)
    assert said == [
        f"warning: {output / 'curve.png'} is not drawn (RuntimeError: no font at all); "
        "metrics.jsonl has its numbers"
    ]
    assert sorted(path.name for path in output.iterdir()) == ["metrics.jsonl"]


def test_adapters_are_written_before_the_picture(output, monkeypatch):
    order = []
    monkeypatch.setattr(
        results, "write_adapter", lambda _, folder, *__, **___: order.append(folder)
    )
    monkeypatch.setattr(results, "_card", lambda *_: "")
    monkeypatch.setattr(results, "draw_curve", lambda *arguments: order.append(arguments[-1]))

    class Options:
        model = "m"

    results.write_results(Options(), output, dict.fromkeys(NAMES), print)
    assert order == [*(output / name for name in NAMES), output / "curve.png"]


@pytest.mark.parametrize("text", [*NAMES, "a`b`", "[x](y)", "<b>", "*a*", "~a~", "&lt;", "C:\\x"])
def test_user_text_in_markdown_reads_as_it_is(text):
    found = plain(text)
    assert re.sub(r"\\([^\w\s]|_)", r"\1", found) == text
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]<>|$~&]", found)


def test_plain_names_stay_as_they_are():
    assert plain("perl-2 of some/base.v1") == "perl-2 of some/base.v1"
