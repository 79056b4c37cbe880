"""A loader whose views change on the way: a part of the order after the other, each with views of its own."""

import itertools
from collections.abc import Iterator, Sequence

from fastjem.data.batch import Crops
from fastjem.data.loaders.protocol import Loader, Order
from fastjem.data.views import ViewSpec


class Staged:
    """Crops of several loaders, one behind the other.

    A batch made ahead is its own part's, so it has the size of the step that it is for. The next part's workers start
    when the last batch of the one before has been handed out: there is a pause, once.

    Args:
        loader: for views of the last part, whose images the others share.
        parts: (views, order) of each; of one that is empty nothing is made.
    """

    def __init__(self, loader: Loader, parts: Sequence[tuple[Sequence[ViewSpec], Order]]):
        self.loader = loader
        self.reads = loader.reads
        self.decoder_share = loader.decoder_share
        self.parts = [loader.at(specs, order) for specs, order in parts if len(order)]

    def __iter__(self) -> Iterator[Crops]:
        """The first part's workers start at once."""
        first = [iter(part) for part in self.parts[:1]]
        return itertools.chain(*first, itertools.chain.from_iterable(self.parts[1:]))

    def at(self, specs: Sequence[ViewSpec], order: Order) -> Loader:
        return self.loader.at(specs, order)
