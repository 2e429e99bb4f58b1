"""A byte-level tokenizer of one piece a byte, and two merged pieces, for tests."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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
