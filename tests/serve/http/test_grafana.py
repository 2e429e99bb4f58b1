"""The dashboard asks for metrics and labels that the server exports, and for all that matter."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flora_jax.serve.http.metrics import PREFIX, EngineMetrics, Metrics
from flora_jax.serve.http.runner import Timing
from flora_jax.serve.updates import Stats
from tests.helpers.requests import make_request

BOARD = json.loads((Path(__file__).parents[3] / "docs" / "grafana.json").read_text())


@pytest.fixture(scope="module")
def exported():
    """The labels of every sample that /metrics has, by its name."""
    from prometheus_client.exposition import generate_latest

    metrics = Metrics("base", 64, 4)
    engine = SimpleNamespace(
        stats=Stats(1, 1, 1, 1, 1, 0.5, 1, 1),
        adapters={"a": "resident"},
        compilations=SimpleNamespace(count=0),
    )
    metrics.registry.register(EngineMetrics(SimpleNamespace(engine=engine), "base"))
    timing = Timing(make_request(0, (1, 2), "a"), 0.0, 0.1, 0.3, 3, 0.05)
    metrics.refused(timing.request)
    metrics.began(timing)
    metrics.progressed(timing, 2, 0.2)
    metrics.ended(timing, "length", 0.3)
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries():
    texts = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    return texts + [
        one["query"]["query"] for one in BOARD["templating"]["list"] if one["type"] == "query"
    ]


def named(text):
    return re.findall(rf"{PREFIX}\w+", text)


def test_every_metric_and_label_it_asks_for_is_exported(exported):
    assert len(queries()) > 20
    for text in queries():
        assert named(text), text
        for name in named(text):
            assert name in exported, text
        for name, selector in re.findall(rf"({PREFIX}\w+)\{{([^}}]*)\}}", text):
            assert {*re.findall(r"(\w+)=", selector)} <= exported[name], text
        for name, label in re.findall(rf"label_values\(({PREFIX}\w+)[^,]*, (\w+)\)", text):
            assert label in exported[name], text
        for labels in re.findall(r" by \(([^)]*)\)", text):
            for label in labels.split(", "):
                assert all(label in exported[name] for name in named(text)), text


def test_nothing_that_the_server_exports_is_left_out(exported):
    """But for what only says when a counter began, and the older of one histogram's two names."""
    stems = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in exported
        if name.startswith(PREFIX) and not name.endswith("_created")
    }
    asked = {
        re.sub(r"_(bucket|sum|count)$", "", name) for text in queries() for name in named(text)
    }
    # The same as inter_token_latency_seconds, under its older name.
    assert stems - asked == {f"{PREFIX}time_per_output_token_seconds"}


def test_panels_have_places_of_their_own():
    taken = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
