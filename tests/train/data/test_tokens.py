"""Documents are tokenised once: the cache is used when, and only when, nothing that matters changed."""

import errno
import hashlib
import json

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from flora_jax.errors import InputError
from flora_jax.serve.request import Limits
from flora_jax.train.data import tokens as module
from flora_jax.train.data.documents import Document, content_digest
from flora_jax.train.data.tokens import load_packed, pack, piece_bytes, save_packed, tokenize
from tests.helpers.byte_tokenizer import END, byte_tokenizer
from tests.helpers.space_tokenizer import set_spaces

TEXTS = ["one abc", "", "dos é\n", "x" * 50, f"a{END}b"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [json.dumps({"content": text, "code": text[::-1]}) for text in TEXTS]
    path.write_text("\n".join([*lines[:2], "{", *lines[2:]]) + "\n")
    return path


@pytest.fixture
def packings(monkeypatch):
    """One entry for each time that something was tokenised."""
    calls = []

    def counted(*arguments):
        calls.append(1)
        return pack(*arguments)

    monkeypatch.setattr(module, "pack", counted)
    return calls


def documents(texts):
    return (Document(f"d{number}", text) for number, text in enumerate(texts))


def assert_same(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.starts, other.starts)
    assert one.tokens.dtype == other.tokens.dtype
    assert (tuple(one.names), one.text_bytes) == (tuple(other.names), other.text_bytes)


def test_documents_are_closed_by_the_end_token():
    tokenizer = byte_tokenizer()
    packed = pack(documents(TEXTS), tokenizer, 0)
    assert packed.tokens.dtype == np.uint16
    assert packed.starts.dtype == np.int64
    assert packed.names == ("d0", "d1", "d2", "d3", "d4")
    assert packed.text_bytes == sum(len(text.encode()) for text in TEXTS)
    pieces = np.split(packed.tokens, packed.starts)[1:]
    assert [piece[-1] for piece in pieces] == [0] * 5
    decoded = [tokenizer.decode(piece[:-1], skip_special_tokens=False) for piece in pieces]
    assert decoded == TEXTS


def with_ends(template):
    """The tokenizer of bytes with a first token, id 259, and a last one, id 260, around a text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    own = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 259), ("</s>", 260)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), own])
    return tokenizer


@pytest.mark.parametrize(
    "template, first",
    [("<s> $A", [259]), ("<s> $A </s>", [259]), ("$A </s>", []), ("<s> <s> $A", [259, 259])],
)
def test_documents_begin_as_served_prompts_do(template, first):
    tokenizer = with_ends(template)
    texts = ["abc é", "", "a" * 9]
    packed = pack(documents(texts), tokenizer, 260)
    pieces = np.split(packed.tokens, packed.starts)[1:]
    plain = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert [piece.tolist() for piece in pieces] == [[*first, *ids, 260] for ids in plain]
    for text, piece in zip(texts, pieces):
        served = Limits(64, 261, tokenizer).encode(text)
        served = served[:-1] if "</s>" in template else served
        assert piece[: len(served)].tolist() == list(served)
    assert packed.text_bytes == piece_bytes(tokenizer)[packed.tokens].sum()
    # No window inside a document begins anew, and no document's first token is to be predicted.
    for batch in packed.evaluation(4, 2):
        targets = batch.tokens[:, 1:][batch.mask > 0]
        assert len(first) > 1 or 259 not in targets


@pytest.mark.parametrize("size, batch_bytes", [(1, 10**6), (2, 10**6), (256, 1), (256, 20)])
def test_the_batches_of_the_tokenizer_do_not_matter(size, batch_bytes, monkeypatch):
    whole = pack(documents(TEXTS), byte_tokenizer(), 0)
    monkeypatch.setattr(module, "BATCH", size)
    monkeypatch.setattr(module, "BATCH_BYTES", batch_bytes)
    progress = []
    parts = pack(documents(TEXTS), byte_tokenizer(), 0, lambda *done: progress.append(done))
    assert_same(parts, whole)
    assert progress[-1] == (5, whole.text_bytes)
    assert progress == sorted(progress)


def test_ids_beyond_16_bits_are_kept():
    packed = pack(documents(["a"]), byte_tokenizer(), 70_000)
    assert (packed.tokens.dtype, packed.tokens[-1]) == (np.uint32, 70_000)


def test_nothing_packs_to_nothing():
    packed = pack(documents([]), byte_tokenizer(), 0)
    assert (len(packed.tokens), len(packed.starts), packed.names) == (0, 0, ())


def test_a_second_call_does_not_tokenise(source, packings, tmp_path):
    cache = tmp_path / "deep" / "cache"
    first, skipped = tokenize(source, byte_tokenizer(), 0, cache=cache, max_corrupt=0.3)
    assert len(first.starts) == 5
    assert [place.split(":")[0] for place in skipped] == ["d.jsonl, line 3"]
    moved = tmp_path / "elsewhere" / "d.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(source.read_bytes())
    for path in (source, moved):
        again, reported = tokenize(path, byte_tokenizer(), 0, cache=cache, max_corrupt=0.3)
        assert_same(again, first)
        assert reported == skipped
    assert len(packings) == 1
    assert [file.suffix for file in cache.iterdir()] == [".npz"]


def test_whatever_decides_the_tokens_makes_another_file(source, packings, tmp_path):
    tokenizer = byte_tokenizer()
    options = {"cache": tmp_path / "cache", "max_corrupt": 0.3}
    tokenize(source, tokenizer, 0, **options)
    changed = [
        lambda: tokenize(source, tokenizer, 1, **options),
        lambda: tokenize(source, tokenizer, 0, column="code", **options),
        lambda: tokenize(source, tokenizer, 0, **options | {"max_corrupt": 0.4}),
        lambda: tokenizer.add_tokens(["dos"]) and tokenize(source, tokenizer, 0, **options),
        lambda: (
            source.write_text(source.read_text().replace("one", "two"))
            and tokenize(source, tokenizer, 0, **options)
        ),
        lambda: tokenize(source.rename(tmp_path / "e.jsonl"), tokenizer, 0, **options),
    ]
    for number, change in enumerate(changed, 2):
        change()
        assert len(packings) == len(list(options["cache"].iterdir())) == number


def test_the_name_of_a_cache_tells_what_begins_a_document(source, tmp_path):
    options = {"cache": tmp_path / "cache", "max_corrupt": 0.3}
    for template, many in (("$A </s>", 1), ("<s> $A", 2)):
        tokenizer = with_ends(template)
        tokenize(source, tokenizer, 260, **options)
        assert len(list(options["cache"].iterdir())) == many
        parts = [1, content_digest(source), tokenizer.to_str(), 260, None, 0.3]
        before = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        assert (options["cache"] / f"{before}.npz").exists() == (many == 1)


def test_without_a_cache_nothing_is_kept(source, packings, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        tokenize(source, byte_tokenizer(), 0, max_corrupt=0.3)
    assert len(packings) == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("broken", ["directory", "disk"])
def test_a_cache_that_cannot_be_written_is_one_line(broken, source, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    if broken == "directory":
        cache.write_text("a file")
    else:

        def full(file, **_):
            file.write(b"some")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module.np, "savez", full)
    packed, skipped = tokenize(source, byte_tokenizer(), 0, cache=cache, max_corrupt=0.3)
    assert (len(packed.starts), len(skipped)) == (5, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {cache}/")
    cause = {"directory": "File exists", "disk": "No space left on device"}[broken]
    assert line.endswith(f".npz is not written ({cause}); the next run tokenises again")
    assert broken == "directory" or not list(cache.iterdir())


def test_a_source_of_unknown_revision_is_not_kept(packings, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "content_digest", lambda source, **_: None)
    monkeypatch.setattr(module, "read_documents", lambda source, **_: documents(TEXTS))
    for _ in range(2):
        tokenize("owner/name", byte_tokenizer(), 0, cache=tmp_path / "cache")
    assert len(packings) == 2
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_is_made_anew(source, packings, tmp_path):
    cache = tmp_path / "cache"
    options = {"cache": cache, "max_corrupt": 0.3}
    first, skipped = tokenize(source, byte_tokenizer(), 0, **options)
    (kept,) = cache.iterdir()
    raw = kept.read_bytes()
    damaged = [b"", raw[: len(raw) // 2], raw[:-1], b"not an archive", b"\x93NUMPY"]
    for place in range(5, len(raw), 13):
        damaged.append(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
    for content in damaged:
        kept.write_bytes(content)
        again, reported = tokenize(source, byte_tokenizer(), 0, **options)
        assert_same(again, first)
        assert reported == skipped
        # Some bytes of an archive say nothing that is read.
        assert kept.read_bytes() in (raw, content)
    assert len(packings) > 0.8 * len(damaged)


def test_a_writer_beside_another_does_not_disturb_it(source, packings, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    options = {"cache": cache, "max_corrupt": 0.3}
    replace = module.Path.replace

    def late(self, target):
        monkeypatch.setattr(module.Path, "replace", replace)
        tokenize(source, byte_tokenizer(), 0, **options)
        return replace(self, target)

    monkeypatch.setattr(module.Path, "replace", late)
    first, _ = tokenize(source, byte_tokenizer(), 0, **options)
    assert len(packings) == 2
    assert_same(tokenize(source, byte_tokenizer(), 0, **options)[0], first)
    assert len(packings) == 2
    assert len(list(cache.iterdir())) == 1


def test_a_tokenizer_that_would_cut_documents_is_refused(source):
    for spoil in ("enable_truncation", "enable_padding"):
        tokenizer = byte_tokenizer()
        getattr(tokenizer, spoil)(**({"max_length": 3} if "trunc" in spoil else {}))
        with pytest.raises(InputError, match="set to cut or to pad"):
            tokenize(source, tokenizer, 0)


def test_a_saved_stream_comes_back_the_same(tmp_path):
    packed = pack(documents(TEXTS), byte_tokenizer(), 0)
    save_packed(tmp_path / "d.npz", packed, ["é, line 3: …"])
    again, skipped = load_packed(tmp_path / "d.npz")
    assert_same(again, packed)
    assert skipped == ["é, line 3: …"]
    assert [file.name for file in tmp_path.iterdir()] == ["d.npz"]
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(InputError, match=r"other\.npz: not whole packed tokens"):
        load_packed(tmp_path / "other.npz")


def test_pieces_stand_for_the_bytes_they_decode_to():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["naïve"])
    lengths = piece_bytes(tokenizer)
    assert lengths.dtype == np.int64
    assert lengths[0] == 0
    text = "naïve abc é ab\n日本 🦀"
    assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode())
    assert lengths[[257, 258]].tolist() == [2, 3]


def test_pieces_of_starcoder_stand_for_their_bytes(shared_data):
    tokenizer = Tokenizer.from_file(str(shared_data / "tokenizers/starcoder/tokenizer.json"))
    lengths = piece_bytes(tokenizer)
    assert len(lengths) == 49_152
    assert not lengths[:19].any()
    text = "def naïve(x):\n\treturn '日本 🦀' + 1234\n"
    assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode())


def sentencepiece_like(texts):
    """As tokenizer.json of Llama 2 and of Mistral has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    set_spaces(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer marks what it was given as special, the bytes as well.
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]
    raw["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    return tokenizer


def test_the_pieces_of_a_text_stand_for_all_its_bytes():
    known = "the fox and the dog run home\n    return the dog\n"
    text = known + "  naïve 日本 🦀 \t the  end\n"
    for tokenizer, space in ((byte_tokenizer(), 0), (sentencepiece_like([known] * 9), 1)):
        lengths = piece_bytes(tokenizer)
        assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode()) + space
    numbers = [tokenizer.token_to_id(piece) for piece in ("▁the", "▁", "<0xE2>", "<s>")]
    assert lengths[numbers].tolist() == [4, 1, 1, 0]


def test_pieces_of_a_byte_level_tokenizer_have_a_character_for_each_byte(shared_data):
    tokenizer = Tokenizer.from_file(str(shared_data / "tokenizers/starcoder/tokenizer.json"))
    special = tokenizer.get_added_tokens_decoder()
    pieces = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    expected = [0 if number in special else len(piece) for number, piece in enumerate(pieces)]
    assert piece_bytes(tokenizer).tolist() == expected


def test_pieces_of_other_tokenizers_are_measured_by_decoding():
    tokenizer = Tokenizer(models.WordLevel({"hé": 0, "b": 1, "?": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Words are decoded with a space between them, which belongs to the later one.
    assert piece_bytes(tokenizer).tolist() == [4, 2, 0, 0, 2]
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()])
    assert piece_bytes(tokenizer)[1] == 1


def test_a_vocabulary_without_the_letter_a_is_measured_too():
    tokenizer = Tokenizer(models.WordLevel({"hé": 0, "b": 1}, unk_token="?"))
    assert piece_bytes(tokenizer).tolist() == [3, 1]
