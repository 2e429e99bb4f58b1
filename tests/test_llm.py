"""The public names, and the library in five lines."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flora_jax
from flora_jax.errors import InputError, RunError
from flora_jax.serve.options import EngineOptions
from tests.helpers.torch_models import tiny_torch_model

PUBLIC = (
    "LLM Engine EngineOptions Request SamplingParams Completion load_model read_adapter "
    "write_adapter init_adapter train TrainOptions __version__"
).split()
FEW = flora_jax.SamplingParams(max_tokens=4, ignore_eos=True)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """The shipped model, with a chat template beside it."""
    folder = tmp_path_factory.mktemp("model")
    for file in (ROOT / "flora_jax/assets/mini").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ ' {' if add_generation_prompt }}"
    )
    adapters = {"perl": "flora/perl", "ruby": Path("lora/ruby")}
    options = EngineOptions(max_num_seqs=4, max_model_len=64)
    with flora_jax.LLM(folder, adapters=adapters, options=options) as llm:
        yield llm


def test_the_package_is_imported_without_jax_and_has_its_public_names():
    code = (
        "import sys, flora_jax\n"
        "assert not {'jax', 'numpy', 'pydantic', 'typer'} & set(sys.modules)\n"
        "flora_jax.SamplingParams, flora_jax.Request, flora_jax.Completion\n"
        "assert not {'jax', 'numpy', 'pydantic', 'typer'} & set(sys.modules)\n"
        f"assert all(callable(getattr(flora_jax, name)) for name in {PUBLIC[:-1]})\n"
        f"assert set({PUBLIC}) <= set(dir(flora_jax))\n"
        "import flora_jax.train.loop\n"
        "assert callable(flora_jax.train) and flora_jax.train.loop\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = flora_jax.nothing
    assert (Path(flora_jax.__file__).parent / "py.typed").is_file()


def test_completions_come_in_the_order_of_the_prompts_each_under_its_adapter(llm):
    prompts = ["sub f {", "sub f {", "def f(", "sub f {"]
    found = llm.generate(prompts, FEW, adapters=["perl", None, "ruby", "perl"])
    assert [c.adapter for c in found] == ["perl", None, "ruby", "perl"]
    assert all(isinstance(c, flora_jax.Completion) for c in found)
    assert found[0].token_ids == found[3].token_ids
    assert [c.finish_reason for c in found] == ["length"] * 4
    assert all(c.text == llm.engine.tokenizer.decode([*c.token_ids]) for c in found)


def test_one_prompt_alone_one_name_and_token_ids_are_accepted(llm):
    (alone,) = llm.generate("sub f {", FEW, adapters="perl")
    ids = llm.engine.tokenizer.encode("sub f {").ids
    for same in (["sub f {"], ids, np.array(ids), [ids], {"prompt": "sub f {"},
                 [{"prompt_token_ids": ids}]):  # fmt: skip
        assert llm.generate(same, FEW, adapters="perl")[0].token_ids == alone.token_ids
    two = llm.generate(
        ["sub f {"] * 2, [FEW, flora_jax.SamplingParams(max_tokens=2)], adapters="perl"
    )
    assert [c.adapter for c in two] == ["perl", "perl"]
    assert two[0].token_ids == alone.token_ids
    assert len(two[1].token_ids) == 2
    assert llm.generate([]) == []


def said(text):
    return [{"role": "user", "content": text}]


def test_a_conversation_is_answered_as_its_template_writes_it(llm):
    whole = llm.generate(["sub f {", "def f( {"], FEW, adapters=["perl", None])
    found = llm.chat([said("sub f"), said("def f(")], FEW, adapters=["perl", None])
    assert [c.token_ids for c in found] == [c.token_ids for c in whole]
    (alone,) = llm.chat(said("sub f"), FEW, adapters="perl")
    assert alone.token_ids == whole[0].token_ids
    (bare,) = llm.chat(said("sub f {"), FEW, adapters="perl", add_generation_prompt=False)
    assert bare.token_ids == whole[0].token_ids
    texts = [update.text for update in llm.chat(said("sub f"), FEW, adapters="perl", stream=True)]
    assert "".join(texts) == whole[0].text
    assert llm.chat([]) == []


@pytest.mark.parametrize(
    "messages, named",
    [
        ("hi", "messages is str, expected a list of messages or of conversations"),
        ([said("a"), []], "conversation 1: messages is empty"),
        ([said("a"), "b"], "conversation 1: messages is str, expected a list of objects"),
        ([{"role": "user"}], r"conversation 0: messages\[0\]: content is missing"),
        (said("f(x)" * 65), "conversation 0: the prompt has .* tokens, the context 64"),
    ],
)
def test_a_malformed_conversation_is_refused_before_anything_runs(llm, messages, named):
    with pytest.raises(InputError, match=named):
        llm.chat(messages, stream=True)
    assert not llm.engine.has_work


def test_a_stream_has_the_text_of_every_prompt_in_parts(llm):
    prompts = ["sub f {", "def f("]
    whole = llm.generate(prompts, FEW, adapters=["perl", None])
    texts, ends = ["", ""], [None, None]
    for update in llm.generate(prompts, FEW, adapters=["perl", None], stream=True):
        texts[update.index] += update.text
        ends[update.index] = update.finish_reason
    assert texts == [c.text for c in whole]
    assert ends == ["length", "length"]


def test_sampling_is_the_same_again_and_another_for_another_prompt_of_the_same_text(llm):
    warm = flora_jax.SamplingParams(max_tokens=8, temperature=1.5, ignore_eos=True)
    first = [c.token_ids for c in llm.generate(["def f("] * 3, warm)]
    assert first == [c.token_ids for c in llm.generate(["def f("] * 3, warm)]
    assert len({*first}) == 3


def test_a_stream_that_is_left_takes_its_requests_back(llm):
    stream = llm.generate(["def f("] * 3, FEW, stream=True)
    next(stream)
    with pytest.raises(RunError, match="a stream of this LLM has not ended"):
        llm.generate("def f(", FEW)
    stream.close()
    llm.generate("def f(", FEW, stream=True)  # Nobody reads it, so that nothing has begun.
    assert len(llm.generate("def f(", FEW)) == 1


@pytest.mark.parametrize(
    "arguments, options, named",
    [
        ((["a", ""],), {}, "prompt 1: the prompt is empty"),
        ((["a", 3.5],), {}, "prompt 1: prompt_token_ids is float, expected a list of integers"),
        ((3,), {}, "prompts is int, expected a string or a list"),
        (([[1, 8192]],), {}, "prompt_token_ids holds 8192, the vocabulary has 0 to 8191"),
        (([[1] * 65],), {}, "the prompt has 65 tokens, the context 64"),
        (({"text": "a"},), {}, "prompt 0: found text, expected 'prompt' or 'prompt_token_ids'"),
        (("a",), {"adapters": "lua"}, "prompt 0: unknown adapter 'lua', given: perl, ruby"),
        (("a",), {"adapters": ["perl"] * 2}, "adapters has 2 entries, expected one for each of 1"),
        (("a",), {"adapters": [3]}, r"adapters\[0\] is 3, expected str or None"),
        (("a", {"seed": 3}), {}, "sampling_params is dict, expected SamplingParams"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(llm, arguments, options, named):
    with pytest.raises(InputError, match=named):
        llm.generate(*arguments, **options, stream=True)
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "adapters, named",
    [
        (["flora/perl"], "adapters is a list, expected {name: folder}"),
        ("flora/perl", "adapters is a str, expected {name: folder}"),
        ({"perl": 3}, "adapters['perl'] is 3, expected a folder or an adapter"),
        ({3: "flora/perl"}, "adapters has the name 3, expected a string"),
    ],
)
def test_adapters_that_are_no_names_and_folders_are_refused(llm, adapters, named):
    for make in (flora_jax.LLM, lambda _, adapters: flora_jax.Engine(llm.engine.model, adapters)):
        with pytest.raises(InputError) as caught:
            make("mini", adapters)
        assert str(caught.value) == named


def test_a_closed_llm_says_so(llm):
    class Closable:
        def close(self):
            self.closed = True

    other = object.__new__(flora_jax.LLM)
    other.engine, other._closed = Closable(), False
    with other:
        pass
    other.close()
    assert other.engine.closed
    with pytest.raises(RunError, match="this LLM is closed"):
        other.generate("a")


def test_an_existing_path_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_torch_model(0, vocab_size=40, n_embd=16, n_head=2, n_layer=1, n_inner=24).save_pretrained(
        tmp_path / "mini"
    )
    model = flora_jax.load_model("mini", "float32")
    assert model.config.n_embd == 16
    fresh = flora_jax.init_adapter(model, "lora", rank=3, targets=["c_attn", "c_proj"], seed=4)
    assert fresh.targets() == ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    flora_jax.write_adapter(fresh, tmp_path / "flora" / "perl")
    mine = flora_jax.read_adapter("flora/perl", model)
    assert (mine.kind, mine.targets()) == ("lora", fresh.targets())
    with pytest.raises(InputError, match="flora/nothing"):
        flora_jax.read_adapter("flora/nothing", model)
    options = EngineOptions(max_num_seqs=1, max_model_len=32)
    with flora_jax.LLM("mini", {"it": mine}, options=options) as llm:
        (completion,) = llm.generate([1, 2, 3], FEW, adapters="it")
        assert (completion.text, len(completion.token_ids)) == (None, 4)
        with pytest.raises(InputError, match="prompt 0: the checkpoint has no tokenizer"):
            llm.generate("text")
        with pytest.raises(InputError, match="conversation 0: mini: has no chat template"):
            llm.chat(said("text"))


def test_the_program_has_a_version_and_short_help():
    for words, expected in (
        (["--version"], f"flora-jax {flora_jax.__version__}"),
        (["-h"], "  generate         Completes every request of a file"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "flora_jax", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout


def test_wrong_options_of_the_demo_are_named_before_it_loads_anything():
    for words in (["--max-tokens", "0"], ["--seed", "-1"]):
        code = (
            f"import sys; sys.argv = ['flora-jax', 'demo', *{words}]\n"
            "from flora_jax import cli\n"
            "try:\n    cli.main()\n"
            "finally:\n    assert 'jax' not in sys.modules"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"found {json.dumps(words[1])}".replace('"', "'") in done.stderr
