"""Models with other tokenizers on the same text: the excerpts, and what is summed over them."""

import gzip
import json
import math

import numpy as np
import pytest

from experiments import compare_models
from flora_jax.checkpoints import load_model, open_checkpoint
from flora_jax.errors import InputError


def test_excerpts_are_whole_lines_of_one_text_and_evenly_spread():
    texts = ["aa\nbb\ncc\n", "üü\n" + "x" * 9 + "\ndd\n", "\n\n"]
    assert compare_models.excerpts(texts, 6, 9) == ["aa\nbb\n", "cc\n", "üü\n"[:3], "dd\n"]
    assert compare_models.excerpts(texts, 6, 2) == ["aa\nbb\n", "üü\n"]
    joined = "".join(compare_models.excerpts(["ab\n" * 50], 7, 99))
    assert joined == "ab\n" * 50


def corpus(folder, texts):
    with gzip.open(folder / "python.validation.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"content": text}) + "\n" for text in texts)


def test_bits_are_those_of_every_token_after_the_end_token(tmp_path):
    texts = ["def f(x):\n    return x\n", "import os\n"]
    corpus(tmp_path, texts)
    results = tmp_path / "results" / "found.json"
    compare_models.main(
        tmp_path, ["one=mini", "two=mini"], languages="python", most=9, results=results
    )
    found = json.loads(results.read_text())
    model, opened = load_model("mini", "float32"), open_checkpoint("mini")
    nats = 0.0
    for row in compare_models.encoded(opened, texts):
        logits_TV = np.asarray(merged(model)(np.asarray(row)[None, :-1]))[0]
        chosen_T = logits_TV[np.arange(len(row) - 1), row[1:]]
        nats += (np.log(np.exp(logits_TV).sum(axis=-1)) - chosen_T).sum()
    size = sum(map(len, texts))
    for own in found["models"].values():
        np.testing.assert_allclose(
            own["bits_per_byte"]["python"], nats / math.log(2) / size, atol=1e-3
        )
    assert found["excerpts"]["python"] == {"excerpts": 2, "bytes": size, "left_out": 0}
    assert "| python |" in results.with_suffix(".md").read_text()


def merged(model):
    from flax import nnx

    return nnx.merge(model.graph, model.params)


def test_text_that_fits_no_context_is_refused(tmp_path):
    corpus(tmp_path, ["".join(map(chr, range(0x4E00, 0x4E00 + 400))) + "\n"])
    with pytest.raises(InputError, match="none of 1 excerpts fits"):
        compare_models.main(tmp_path, ["one=mini"], languages="python", excerpt_bytes=2000)
