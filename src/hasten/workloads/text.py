"""Real text as token windows: the inputs of the language-model workloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING

from hasten.core.errors import MeasureError
from hasten.workloads.corpus import Document, Split, corpus

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer


class Text:
    """The documents of one corpus split (those that ``only`` admits) as token ids of one tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer, split: Split = "test", only: Callable[[Document], bool] = lambda _: True
    ) -> None:
        self.tokenizer, self.split, self.only = tokenizer, split, only
        self._ids: dict[str, list[int]] = {}

    def windows(self, length: int, number: int, *, skip: int = 0) -> list[list[int]]:
        """``number`` windows of exactly ``length`` tokens, no two overlapping, after the first ``skip``.

        The order is fixed: first windows of all documents, second windows of all, and so on. Where the
        tokenizer wants a start token, each window begins with it. Raises `MeasureError` when the split has fewer.
        """
        return [ids for _, ids in self.placed(length, number, skip=skip)]

    def placed(self, length: int, number: int, *, skip: int = 0) -> list[tuple[Document, list[int]]]:
        """Like `windows`, each with the document it comes from."""
        found = list(islice(self._all(length), skip, skip + number))
        if len(found) < number:
            raise MeasureError(
                f"the {self.split} split has {skip + len(found)} windows of {length} tokens, {skip + number} are "
                "needed; ask for shorter or fewer ones"
            )
        return found

    def cuts(self, lengths: Sequence[int]) -> list[list[int]]:
        """A window of each of these lengths, no two overlapping, each from the document with most text left.

        Windows begin with the start token as those of `windows` do. Raises `MeasureError` when the split has less.
        """
        bos = self._bos()
        documents = [self._tokens(d) for d in corpus().documents(self.split) if self.only(d)]
        at = [0] * len(documents)
        found = []
        for number, length in enumerate(lengths):
            left = [len(ids) - start for ids, start in zip(documents, at, strict=True)]
            best = left.index(max(left)) if left else -1
            step = length - len(bos)
            if best < 0 or step < 1 or left[best] < step:
                raise MeasureError(
                    f"the {self.split} split has no window of {length} tokens left after {number} windows; ask for "
                    "shorter or fewer ones"
                )
            found.append(bos + documents[best][at[best] : at[best] + step])
            at[best] += step
        return found

    def _bos(self) -> list[int]:
        start = self.tokenizer.bos_id
        return [start] if self.tokenizer.adds_bos and start is not None else []

    def _all(self, length: int) -> Iterator[tuple[Document, list[int]]]:
        bos = self._bos()
        step = length - len(bos)
        if step < 1:
            raise MeasureError(f"a window of {length} tokens holds no text; ask for at least {1 + len(bos)}")
        documents = [d for d in corpus().documents(self.split) if self.only(d)]
        for turn in count():
            long_enough = [d for d in documents if len(self._tokens(d)) >= (turn + 1) * step]
            if not long_enough:
                return
            for document in long_enough:
                ids = self._tokens(document)[turn * step : (turn + 1) * step]
                yield document, bos + ids
            documents = long_enough

    def _tokens(self, document: Document) -> list[int]:
        if document.name not in self._ids:
            self._ids[document.name] = self.tokenizer.encode(document.text)
        return self._ids[document.name]
