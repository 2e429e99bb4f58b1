"""A tokenizer as Llama 2 and Mistral have: pieces hold their spaces, and a whole text loses its first."""

from tokenizers import Tokenizer, decoders, models, normalizers

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("▁The", "▁capital", "▁is", "▁Paris", "▁", "▁▁", "▁▁▁", "a", "b", "▁a", "(x):", "\t")


def space_tokenizer() -> Tokenizer:
    """Ids: 0 to 2 are special, then ``WORDS``, then the 256 bytes."""
    pieces = (*SPECIAL, *WORDS, *(f"<0x{byte:02X}>" for byte in range(256)))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens([*SPECIAL])
    set_spaces(tokenizer)
    return tokenizer


def set_spaces(tokenizer: Tokenizer) -> None:
    """What writes spaces into pieces, and takes them out, as tokenizer.json of Llama 2 has it."""
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
