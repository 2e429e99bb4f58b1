"""Skips what needs a sandbox or toolchain that is not there, or fails where CI has installed it."""

import functools
import json
import os
import subprocess
import sys

import pytest

from flora_jax.evaluate.doctor import examine
from flora_jax.sandbox.sandbox import Sandbox

REQUIRED = "FLORA_JAX_TOOLCHAINS"  # Languages that must be there, set by .ci/run.


@functools.cache
def report():
    return examine(Sandbox())


def need(*languages):
    """Goes on only with a sandbox and the toolchains of ``languages``."""
    missing = [report().trouble] if report().trouble else []
    missing += [
        f"{one.language}: {one.advice}"
        for one in report().findings
        if one.language in languages and one.state != "ready"
    ]
    if not missing:
        return
    required = os.environ.get(REQUIRED, "").split()
    (pytest.fail if set(languages) & set(required) else pytest.skip)("; ".join(missing))


def evaluate(file, output, *options, **environment):
    """Runs the command on a file of generations; a dictionary of statuses by language and name."""
    command = [sys.executable, "-m", "flora_jax.cli", "evaluate", "multipl-e"]
    command += ["--load-generations", str(file), "--output", str(output), *options]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = (output / "results.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    return {(one["language"], one["name"]): one["statuses"] for one in results}
