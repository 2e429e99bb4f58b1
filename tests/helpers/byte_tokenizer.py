"""A byte-level tokenizer of one piece a byte, and two merged pieces, for tests."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

END = "<|endoftext|>"
PIECES = 259


def byte_tokenizer() -> Tokenizer:
    """Ids: 0 is the end token, 1 to 256 are bytes, 257 is "ab", 258 is "abc"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "ab", "abc"], 1)}
    tokenizer = Tokenizer(
        models.BPE(vocab={END: 0, **vocabulary}, merges=[("a", "b"), ("ab", "c")])
    )
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TURN, TURN_END = "<|im_start|>", "<|im_end|>"
CHAT_PIECES = PIECES + 2
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "    {%- if message.role not in ('system', 'user', 'assistant') -%}\n"
    "        {{- raise_exception('no role ' + message.role) -}}\n"
    "    {%- endif -%}\n"
    "    {{- bos_token if loop.first }}{{ '<|im_start|>' + message['role'] + '\\n' }}\n"
    "    {{- message.content | trim }}{{ eos_token + '\\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}\n"
)


def save_chat_tokenizer(folder: Path, template: object = CHAT_TEMPLATE) -> Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json of a tokenizer that puts a token before a text.

    Ids 259 and 260 are the start and the end of a turn; ``template`` is as the settings have it.
    """
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([TURN, TURN_END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {"__type": "AddedToken", "content": TURN_END, "special": True}
    settings = {"bos_token": END, "eos_token": added}
    settings |= {} if template is None else {"chat_template": template}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer
