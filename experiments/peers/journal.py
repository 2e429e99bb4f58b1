"""A run's answers, kept as they come: a run that was cut short goes on after them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ratios import Outcome

from flora_jax.errors import InputError


class Journal:
    """One JSON object a line: ``settings`` where a run begins or goes on, what a contender said of
    itself, an answer.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.settings = file, settings

    def begin(self) -> Outcome:
        """An empty outcome; what the file had is gone."""
        self.file.write_text("")
        self._note(settings=self.settings)
        return Outcome(goes=1)

    def resume(self) -> Outcome:
        """The outcome so far.

        Raises:
            InputError: the file's answers are to other settings.
        """
        if not self.file.exists():
            return self.begin()
        text = self.file.read_text()
        whole = text[: text.rfind("\n") + 1]  # Without a line whose writing was cut short.
        self.file.write_text(whole)
        outcome = Outcome()
        for line in map(json.loads, whole.splitlines()):
            self._replay(line, outcome)
        outcome.goes += 1
        self._note(settings=self.settings)
        return outcome

    def about(self, name: str, about: dict[str, Any]) -> None:
        self._note(name=name, about=about)

    def answer(self, group: str, rows: int, name: str, answer: dict[str, Any]) -> None:
        self._note(group=group, rows=rows, name=name, answer=answer)

    def _note(self, **line: Any) -> None:
        with self.file.open("a") as file:
            print(json.dumps(line), file=file)

    def _replay(self, line: dict[str, Any], outcome: Outcome) -> None:
        if "settings" in line:
            for key, found in line["settings"].items():
                if found != (expected := self.settings.get(key)):
                    raise InputError(
                        f"{self.file}: {key} is {found!r}, expected {expected!r}; without --resume "
                        "it is measured anew"
                    )
            outcome.goes += 1
        elif "about" in line:
            outcome.about[line["name"]] = line["about"]
        else:
            rounds = outcome.rounds.setdefault(line["group"], {})
            rounds.setdefault((line["rows"], line["name"]), []).append(line["answer"])
