"""Statuses of every completion, as lines of JSON, and their summary by language."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from flora_jax.errors import InputError, listing
from flora_jax.evaluate import pass_at_k as metric
from flora_jax.evaluate.languages import OK, check_status
from flora_jax.jsonl import kind_of, parse_object, read_objects, text, texts

RESULTS, RUN = "results.jsonl", "run.json"
KS = (1, 10, 100)


@dataclass(frozen=True)
class Result:
    """One problem: a status for each completion, in order."""

    name: str
    language: str
    statuses: tuple[str, ...]

    @property
    def correct(self) -> int:
        return self.statuses.count(OK)

    def pass_at(self, k: int) -> float:
        return metric.pass_at_k(len(self.statuses), self.correct, k)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_results(path: Path) -> list[Result]:
    """The lines of ``results.jsonl``, or of that file in a directory.

    Raises:
        InputError: no such file, a line that is no result, or a problem twice.
    """
    file = path / RESULTS if path.is_dir() else path
    found: list[Result] = []
    known: set[tuple[str, str]] = set()
    for where, raw in read_objects(file):
        statuses = texts(raw, "statuses", where)
        if not statuses:
            raise InputError(f"{where}: statuses is empty, expected at least one")
        for status in statuses:
            check_status(status, where)
        one = Result(text(raw, "name", where), text(raw, "language", where), statuses)
        if (one.language, one.name) in known:
            raise InputError(f"{where}: {one.name} in {one.language} is there twice")
        known.add((one.language, one.name))
        found.append(one)
    if not found:
        raise InputError(f"{file}: no results")
    return found


def by_language(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.language, []).append(result)
    return found


def summarise(results: Iterable[Result], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Of every language: counts, pass@k as a share of 1, its errors, and statuses by class.

    ``samples`` counts the completions of all problems; ``stderr`` (of pass@1), ``stderr@10`` and
    ``stderr@100`` are over problems, ``stderr_bootstrap`` the same by bootstrap with its 95 %
    ``interval``, ``stderr_sampling`` the error of drawing samples for these very problems. A k
    that some problem has too few samples for is left out.
    """
    return {
        language: _summary(found, seed) for language, found in sorted(by_language(results).items())
    }


def _summary(results: Sequence[Result], seed: int) -> dict[str, Any]:
    sizes = [len(result.statuses) for result in results]
    summary: dict[str, Any] = {
        "problems": len(results),
        "samples": sum(sizes),
        "samples_per_problem": [min(sizes), max(sizes)],
    }
    for k in KS:
        if k > min(sizes):
            break
        values = [result.pass_at(k) for result in results]
        means = metric.bootstrap(values, seed)
        suffix = "" if k == 1 else f"@{k}"
        summary |= {
            f"pass@{k}": fmean(values),
            f"stderr{suffix}": metric.standard_error(values),
            f"stderr_bootstrap{suffix}": pstdev(means),
            f"interval{suffix}": list(metric.interval(means)),
        }
    counts = [(len(result.statuses), result.correct) for result in results]
    summary["stderr_sampling"] = metric.sampling_error(counts)
    statuses = Counter(status for result in results for status in result.statuses)
    summary["statuses"] = dict(sorted(statuses.items()))
    return summary


def check_same_problems(results: Mapping[str, Sequence[Result]], base: str) -> None:
    """Whether every method has the base's problems in each language that both have.

    Raises:
        InputError: one has problems that the other does not have.
    """
    of_base = {language: _names(own) for language, own in by_language(results[base]).items()}
    for method, found in results.items():
        for language, own in by_language(found).items():
            alone = sorted(_names(own) ^ of_base.get(language, _names(own)))
            if alone:
                said = f"{base} and {method} have not the same problems in {language}"
                raise InputError(listing(said, alone, 5))


def check_same_stops(paths: Iterable[Path]) -> None:
    """Whether several evaluations cut a language's completions by the same stop tokens.

    A run that does not say by which is passed over: an older one, or one of another program's
    generations; and so is a file of results that has been moved elsewhere.

    Args:
        paths: as :func:`read_results` takes them; ``run.json`` beside the results has the lists.

    Raises:
        InputError: two differ in a language that both have, or a ``run.json`` is damaged.
    """
    known: dict[str, tuple[Path, list[tuple[str, ...]]]] = {}
    for path in paths:
        file = (path if path.is_dir() else path.parent) / RUN
        if not (path.is_dir() or path.name == RESULTS) or not file.is_file():
            continue
        for language, lists in _stops(file).items():
            first, had = known.setdefault(language, (file, lists))
            if {*map(frozenset, had)} != {*map(frozenset, lists)}:
                raise InputError(
                    f"{file}: completions in {language} were cut at {_said(lists)}, those of {first} at "
                    f"{_said(had)}, expected the same stop tokens"
                )


def _stops(file: Path) -> dict[str, list[tuple[str, ...]]]:
    """By language the lists of a ``run.json``, as far as it has them."""
    try:
        found = parse_object(file.read_bytes()).get("stop_tokens", {})
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: stop_tokens is {kind_of(found)}, expected an object")
    lists = {}
    for language, raw in found.items():
        if not isinstance(raw, list):
            raise InputError(
                f"{file}: stop_tokens of {language} is {kind_of(raw)}, expected a list"
            )
        own = [texts({language: one}, language, f"{file}, stop_tokens") for one in raw]
        # Generations of another program come without.
        if all(own):
            lists[language] = own
    return lists


def _said(lists: Iterable[Iterable[str]]) -> str:
    return " or ".join(str([*one]) for one in lists)


def _names(results: Iterable[Result]) -> set[str]:
    return {one.name for one in results}


def compare_results(
    first: Sequence[Result], second: Sequence[Result], k: int = 1, seed: int = 0
) -> Mapping[str, metric.Comparison]:
    """Paired by problem: a comparison for every language, and ``all`` for all problems together.

    Raises:
        InputError: one has problems that the other does not have, or too few samples for ``k``.
    """
    pair = [{(one.language, one.name): one for one in results} for results in (first, second)]
    alone = [f"{name} in {language}" for language, name in sorted(pair[0].keys() ^ pair[1].keys())]
    if alone:
        raise InputError(listing("the two have not the same problems", alone, 5))
    fewest = min(len(one.statuses) for found in pair for one in found.values())
    if not 1 <= k <= fewest:
        raise InputError(f"-k is {k}, expected 1 to {fewest}, the samples of some problem")
    keys = sorted(pair[0])
    groups = {language: [key for key in keys if key[0] == language] for language, _ in keys}
    compared = {}
    for language, chosen in {**groups, "all": keys}.items():
        before, after = ([found[key].pass_at(k) for key in chosen] for found in pair)
        compared[language] = metric.compare(before, after, seed)
    return compared
