"""The rooms of the package import one way, and each module says what it is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flora_jax import shapes
from flora_jax.models.family import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
# A module may import its own room and rooms of lower rank; rooms of one rank know nothing of each
# other.
RANKS = [
    ("errors",), ("shapes", "files", "jsonl", "terminal", "platforms", "shipped", "xla_flags"),
    ("weights",), ("adapters",), ("mixing", "peft"), ("models",), ("checkpoints",),
    ("serve", "train", "sandbox"), ("evaluate", "bench", "plan"), ("demo", "llm"), ("cli",),
    ("__main__",),
]  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
OUTSIDE = ("convert", "experiments", "tests")


def modules(root):
    """Path and dotted name of every module of the package below ``root``."""
    for path in sorted((root / "flora_jax").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, name, typed=True):
    """Dotted names of all that a module imports, wherever in it; ``from a import b`` is ``a.b``.

    Without ``typed`` those are left out that only a type checker sees.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not typed:
        tree.body = [node for node in tree.body if not is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_for_types(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def starts_with(name, package):
    return name == package or name.startswith(package + ".")


def room_of(name):
    return [*name.split("."), ""][1]


def violations(root):
    """One line per import against the direction, and per room without a rank."""
    found = []
    for path, name in modules(root):
        room = room_of(name)
        if room and room not in RANK:
            found.append(f"{name}: no rank for the room {room}")
            continue
        # The public names are types for those who check types, and imported when they are used.
        for imported in imports(path, name, typed=bool(room)):
            other = room_of(imported)
            if any(starts_with(imported, package) for package in OUTSIDE):
                found.append(f"{name} imports {imported}")
            if not starts_with(imported, "flora_jax") or other not in RANK or other == room:
                continue
            if not room or RANK[other] >= RANK[room]:
                found.append(f"{name} imports {imported}")
    return found


def users_of(root, package, within):
    """The modules below ``within`` (a dotted name) that import ``package`` themselves."""
    return [
        name
        for path, name in modules(root)
        if starts_with(name, within)
        and any(starts_with(imported, package) for imported in imports(path, name))
    ]


def test_imports_flow_one_way():
    assert len(list(modules(ROOT))) > 20
    assert violations(ROOT) == []


def test_adapters_know_nothing_of_flax():
    for room in ("weights", "adapters", "mixing", "peft"):
        assert users_of(ROOT, "flax", f"flora_jax.{room}") == []
    model = "flora_jax.models.starcoder.model"
    assert users_of(ROOT, "flax", model) == [model]


@pytest.mark.parametrize(
    "module", ["serve.request", "serve.stream", "checkpoints.tokenizer", "shipped", "cli"]
)
def test_host_code_starts_without_jax(module):
    """Importing it, with all that it imports in turn, brings none of the heavy packages in."""
    if module != "cli":
        assert users_of(ROOT, "jax", f"flora_jax.{module}") == []
    heavy = {"jax", "jaxlib", "flax", "numpy", "torch", "transformers", "tokenizers", "orbax"}
    code = f"import sys, flora_jax.{module}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


# What is one family's own: names of its modules, fields and classes.
FAMILY_WORDS = (
    "c_attn",
    "c_proj",
    "c_fc",
    "transformer.h",
    "wte",
    "n_embd",
    "gpt_bigcode",
    "starcoder",
    "gate_proj",
    "embed_tokens",
)
# Tables by names that families have.
REGISTRIES = ("flora_jax.models.family", "flora_jax.models.gguf_names")


def family_words(root):
    """Where code outside a family's own folder names what is the family's; docstrings may."""
    found = []
    for path, name in modules(root):
        if name in REGISTRIES or any(starts_with(name, folder) for folder in FAMILIES.values()):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        silent = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        }
        for node in ast.walk(tree):
            texts = [
                value
                for field in ("id", "attr", "name", "module", "arg", "value")
                if isinstance(value := getattr(node, field, None), str) and id(node) not in silent
            ]
            found += [
                f"{name}:{getattr(node, 'lineno', '?')} {text}"
                for text in texts
                if any(word in text.lower() for word in FAMILY_WORDS)
            ]
    return found


def test_only_a_familys_folder_names_what_is_its_own():
    assert family_words(ROOT) == []
    registry = (ROOT / "flora_jax/models/family.py").read_text(encoding="utf-8")
    named = [line for line in registry.splitlines() if any(w in line for w in FAMILIES)]
    assert len(named) == len(FAMILIES)


@pytest.mark.parametrize("folder", sorted(set(FAMILIES.values())))
def test_a_family_knows_nothing_of_another(folder):
    others = [other for other in set(FAMILIES.values()) if other != folder]
    assert [other for other in others if users_of(ROOT, other, folder)] == []


@pytest.mark.parametrize(
    "line",
    [
        "from flora_jax.models.starcoder.config import PRESETS",
        "import flora_jax.models.starcoder",
        "def f(config):\n    return config.n_embd",
        'TARGET = "attn.c_attn"',
        "def f(model: StarCoder): ...",
        "def f(wte): ...",
        "def f(params):\n    return params.embed_tokens",
        'def f():\n    """Says nothing."""\n    return f"{1}transformer.h"',
    ],
)
def test_a_planted_family_word_is_found(line, tmp_path):
    (tmp_path / "flora_jax/serve").mkdir(parents=True)
    (tmp_path / "flora_jax/serve/a.py").write_text('"""As StarCoder\'s c_attn."""\n')
    assert family_words(tmp_path) == []
    (tmp_path / "flora_jax/serve/a.py").write_text(line)
    assert family_words(tmp_path) != []


def test_every_module_says_what_it_is():
    silent = [
        name
        for path, name in modules(ROOT)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


@pytest.mark.parametrize(
    "path, line, found",
    [
        ("shapes.py", "import flora_jax.adapters", "flora_jax.adapters"),
        (
            "adapters/a.py",
            "from flora_jax.models import cache",
            "flora_jax.models.cache",
        ),
        ("adapters/a.py", "from flora_jax import models", "flora_jax.models"),
        ("adapters/a.py", "from ..serve.steps import x", "flora_jax.serve.steps.x"),
        ("adapters/__init__.py", "from .. import serve", "flora_jax.serve"),
        ("models/a.py", "def f():\n    import flora_jax.train.loop", "flora_jax.train.loop"),
        ("serve/a.py", "from flora_jax.train.step import x", "flora_jax.train.step.x"),
        ("train/a.py", "if True:\n    from flora_jax.serve import x", "flora_jax.serve.x"),
        ("train/deep/a.py", "from ...serve import x", "flora_jax.serve.x"),
        ("bench/a.py", "from flora_jax.plan import x", "flora_jax.plan.x"),
        ("demo.py", "import flora_jax.cli", "flora_jax.cli"),
        ("__init__.py", "from flora_jax.adapters import x", "flora_jax.adapters.x"),
        ("__init__.py", "def f():\n    from flora_jax.llm import x", "flora_jax.llm.x"),
        ("llm.py", "import flora_jax.cli", "flora_jax.cli"),
        ("serve/a.py", "from convert.hf_to_flax import x", "convert.hf_to_flax.x"),
        ("cli.py", "import experiments.pretrain_mini", "experiments.pretrain_mini"),
        ("attic/a.py", "", "no rank for the room attic"),
    ],
)
def test_a_planted_import_is_found(path, line, found, tmp_path):
    for place in ("flora_jax/__init__.py", "flora_jax/serve/good.py", f"flora_jax/{path}"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("from flora_jax.shapes import x" * ("good" in place))
    assert [text for text in violations(tmp_path) if "attic" not in text] == []
    (tmp_path / "flora_jax" / path).write_text(line)
    assert found in violations(tmp_path)[0]


def test_a_planted_package_is_found_inside_a_function(tmp_path):
    (tmp_path / "flora_jax/adapters").mkdir(parents=True)
    (tmp_path / "flora_jax/adapters/a.py").write_text("def f():\n    from flax import nnx\n")
    (tmp_path / "flora_jax/adapters/b.py").write_text("import flaxen\n")
    assert users_of(tmp_path, "flax", "flora_jax.adapters") == ["flora_jax.adapters.a"]


def functions(tree):
    """Every function of a module, with the number of its parameters, ``self`` and ``cls`` apart."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = node.args
            names = [
                a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            ]
            yield node.name, len([name for name in names if name not in ("self", "cls")])


PARAMETERS = 8


def long_signatures(root):
    """Functions with too many parameters. A verb of the command line has one for each of its options."""
    return [
        f"{name}.{function}: {count} parameters"
        for path, name in modules(root)
        for function, count in functions(ast.parse(path.read_text(encoding="utf-8")))
        if count > PARAMETERS and not (room_of(name) == "cli" and not function.startswith("_"))
    ]


def test_no_function_has_too_many_parameters():
    assert long_signatures(ROOT) == []


def test_a_planted_long_signature_is_found(tmp_path):
    (tmp_path / "flora_jax/serve").mkdir(parents=True)
    (tmp_path / "flora_jax/serve/a.py").write_text(
        "class A:\n    def f(self, a, b, c, d, e, f, g, h): pass\n"
        "    def g(self, a, b, c, d, *, e, f, g, h, i): pass\n"
    )
    assert long_signatures(tmp_path) == ["flora_jax.serve.a.g: 9 parameters"]


def private_imports(root):
    """Uses of a name that another room keeps to itself: imported, or as an attribute of its module."""
    found = []
    names = {name for _, name in modules(root)}
    for path, name in modules(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        foreign = {}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "flora_jax"
            ):
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if room_of(full) == room_of(name):
                    continue
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    found.append(f"{name} imports {full}")
                if full in names:
                    foreign[alias.asname or alias.name] = full
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in foreign
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
            ):
                found.append(f"{name} uses {foreign[node.value.id]}.{node.attr}")
    return found


def test_no_room_uses_what_another_keeps_to_itself():
    assert private_imports(ROOT) == []


def test_a_planted_private_name_is_found(tmp_path):
    for place, text in {
        "weights/b.py": "_hidden = 1\n",
        "serve/a.py": "from flora_jax.weights import b\n"
        "from flora_jax.weights.b import _hidden\nb._hidden\n",
        "weights/c.py": "from flora_jax.weights.b import _hidden\n",
    }.items():
        (tmp_path / "flora_jax" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "flora_jax" / place).write_text(text)
    assert private_imports(tmp_path) == [
        "flora_jax.serve.a imports flora_jax.weights.b._hidden",
        "flora_jax.serve.a uses flora_jax.weights.b._hidden",
    ]


LETTERS = re.compile(r"[a-z]_([A-Z]{2,6})$")


def unknown_letters(root, key):
    """Names of arrays whose letters the key does not have."""
    found = set()
    for path, name in modules(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            said = node.id if isinstance(node, ast.Name) else getattr(node, "arg", None)
            match = LETTERS.search(said) if isinstance(said, str) else None
            if match and set(match[1]) - key:
                found.add(f"{name}: {said}")
    return sorted(found)


def test_every_letter_of_a_name_is_in_the_key_once():
    lines = (shapes.__doc__ or "").splitlines()
    letters = re.findall(r"(?:^    |  )([A-Z])  (?=\S)", "\n".join(lines))
    assert len(letters) == len(set(letters)) > 20
    assert unknown_letters(ROOT, set(letters)) == []
