"""Why some options can't be combined with methods of a kind (`Method.refuses`): words that go on behind its name."""

_EACH_VIEW = "has a loss of each view by itself: a larger --batch-size shows it more of them"
_TWO_SOURCES = "has one view of each of two sources"
_QUEUE = "compares with keys of earlier batches, which only a momentum encoder keeps alike"
_OWN_TARGETS = "predicts its momentum encoder's features: of its own the constant answer would do"

OF_EACH_VIEW = {"large_views": _EACH_VIEW, "small_views": _EACH_VIEW}
OF_TWO_SOURCES = {
    "large_views": _TWO_SOURCES,
    "small_views": _TWO_SOURCES,
    "projector": "has a linear projection of each source's own: --options dim",
}
OF_A_QUEUE = {"no_momentum_encoder": _QUEUE}
OF_OWN_TARGETS = {"no_momentum_encoder": _OWN_TARGETS}
