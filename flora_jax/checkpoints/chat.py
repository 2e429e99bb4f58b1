"""The chat template that lies beside a checkpoint: how a conversation is written as one prompt.

Knows nothing of tokens or requests. Importing it does not import jinja2.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flora_jax.errors import InputError, one_line

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_TOKENS_FILE = "special_tokens_map.json"
# What a template may name, as in transformers.
_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Chat:
    """A model's chat template, or that it has none.

    Args:
        source: the model, for messages.
        template: Jinja; ``None`` where the model has none.
        where: the file that has it.
        tokens: the texts of special tokens that a template may name, such as ``bos_token``.
    """

    source: str
    template: str | None = None
    where: str = ""
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens written out: no tokenizer should add more.

        Args:
            messages: each with a ``role`` and a ``content``.
            add_generation_prompt: ends with the head of the assistant's next message.

        Raises:
            InputError: the model has no template, its template is no valid Jinja, or it refuses these
                messages.
        """
        if self.template is None:
            raise InputError(
                f"{self.source}: has no chat template, expected {TEMPLATE_FILE} or chat_template in "
                f"{_CONFIG_FILE}"
            )
        try:
            return self._compiled.render(
                # As in transformers: what a chat does not have is None, and the tokens come by name.
                messages=[{key: _plain(text) for key, text in one.items()} for one in messages],
                tools=None, documents=None, add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )  # fmt: skip
        except InputError:
            raise
        except Exception as error:  # A template is a program: it can fail in any way.
            raise InputError(
                f"{self.where}: the chat template refuses the messages: {one_line(error)}"
            ) from None

    @functools.cached_property
    def _compiled(self) -> Any:
        import jinja2

        assert self.template is not None
        try:
            return _environment().from_string(self.template)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"{self.where}: the chat template is no valid Jinja: {error.message}, line {error.lineno}"
            ) from None


def load_chat(directory: Path, source: str) -> Chat:
    """The chat template of a model's directory: chat_template.jinja, else chat_template in
    tokenizer_config.json, where it is a text or a list with one called "default".

    Raises:
        InputError: a file is damaged, or has templates without a default one.
    """
    settings = _read_object(directory / _CONFIG_FILE)
    tokens = _tokens(settings)
    # What tokenizer_config.json says of added tokens replaces the older file, as in transformers.
    if "added_tokens_decoder" not in settings:
        tokens |= _tokens(_read_object(directory / _TOKENS_FILE))
    own = directory / TEMPLATE_FILE
    if own.is_file():
        try:
            return Chat(source, own.read_text(encoding="utf-8"), str(own), tokens)
        except (OSError, ValueError) as error:
            raise InputError(f"{own}: cannot be read: {error}") from None
    where = str(directory / _CONFIG_FILE)
    return Chat(source, _default(settings.get("chat_template"), where), where, tokens)


def _default(found: Any, where: str) -> str | None:
    if found is None or isinstance(found, str):
        return found
    try:
        named = {one["name"]: one["template"] for one in found}
    except (TypeError, KeyError):
        named = {}
    if not isinstance(named.get("default"), str):
        names = ", ".join(map(str, named)) or type(found).__name__
        raise InputError(
            f"{where}: chat_template is {names}, expected a string or a list with 'default'"
        )
    return str(named["default"])


def _tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a settings file; each is a text or an object with its text."""
    found = {name: settings.get(name) for name in _TOKENS}
    texts = {n: v.get("content") if isinstance(v, Mapping) else v for n, v in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _plain(text: str) -> str:
    """Without the methods of a subclass, which a template could call."""
    return str.__str__(text)


@functools.cache
def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates, which come from people one does not know."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks what the assistant says, for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def check_name(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no attribute {name!r}")

    class Namespace(jinja2.utils.Namespace):
        """Keeps a template from the attributes that belong to Python."""

        def __init__(*args: Any, **values: Any) -> None:
            # Without names of its own: a template may well call a value self.
            own, *rest = args
            values = dict(*rest, **values)
            for name in values:
                check_name(name)
            jinja2.utils.Namespace.__init__(own, values)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def new_dict(*args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )  # fmt: skip

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    # Jinja's own filter escapes for HTML.
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": new_dict,
        "namespace": Namespace,
    }
    return environment
