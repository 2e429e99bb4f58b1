"""The ids that llama.cpp's rules give a text under a SentencePiece vocabulary, slowly.

An oracle for converted tokenizers: knows nothing of the package's or transformers' tokenizers.
"""

import itertools

# As ``tokenizer.ggml.token_type`` has it.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BLANK = "\u2581"


class SentencePieceIds:
    """A vocabulary with scores and types, as a GGUF file has it.

    Args:
        tokens: by id.
        scores: of the pairs that are a token the one of the highest score is joined first.
        types: by id; what is not normal and no byte is found whole in a text, and parts it.
        space: whether a blank stands in front of every stretch between such tokens.
    """

    def __init__(self, tokens, scores, types, space=True):
        self._numbers = {token: number for number, token in enumerate(tokens)}
        self._scores = dict(zip(tokens, scores))
        whole = [t for t, kind in zip(tokens, types) if kind not in (NORMAL, BYTE)]
        self._whole = sorted(whole, key=len, reverse=True)
        self._space = space

    def __call__(self, text: str) -> list[int]:
        """The ids of a text, without what stands in front of every text."""
        ids, stretch, at = [], "", 0
        while at < len(text):
            found = next((token for token in self._whole if text.startswith(token, at)), None)
            if found is None:
                stretch += text[at]
                at += 1
                continue
            ids += [*self._of_stretch(stretch), self._numbers[found]]
            stretch, at = "", at + len(found)
        return ids + self._of_stretch(stretch)

    def _of_stretch(self, stretch: str) -> list[int]:
        if not stretch:
            return []
        pieces = [*((" " if self._space else "") + stretch).replace(" ", BLANK)]
        while True:
            pairs = [a + b for a, b in itertools.pairwise(pieces)]
            scores = [self._scores.get(pair, -float("inf")) for pair in pairs]
            if max(scores, default=-float("inf")) == -float("inf"):
                return [number for piece in pieces for number in self._of_piece(piece)]
            at = scores.index(max(scores))
            pieces[at : at + 2] = [pairs[at]]

    def _of_piece(self, piece: str) -> list[int]:
        if piece in self._numbers:
            return [self._numbers[piece]]
        return [self._numbers[f"<0x{byte:02X}>"] for byte in piece.encode()]
