"""Lines of the operators that masks are drawn with, broken one at a time: see mutations.py."""

from mutations import Mutation

TESTS = "test_mask_operators"
GPU, RECTANGLES = "kernels/masks/gpu.py", "csrc/masks/rectangles.cpp"


def _all(op: str, file: str, tests: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(op, file, old, new, tests=f"{TESTS} and {tests}") for old, new in changes]


REFERENCE = [
    *_all("block_masks", "kernels/masks/reference.py", "key_stay", ("failed < attempts", "failed < attempts - 9")),
    *_all("keyed_uniform", "kernels/masks/philox.py", "philoxs", ("c3 = product0 & WORD", "c3 = c1 & WORD")),
]
CPU = [
    *_all(
        "block_masks", RECTANGLES, "options",
        ("        failed = 0;", ""),
        ("static_cast<double>(found) > room", "false"),
        ("block & ~bits_[at]", "block"),
    ),
    *_all("even_block_scores", RECTANGLES, "specifications", ("row[x] = turn;\n        }", "{}\n        }")),
    *_all("multi_block_masks", RECTANGLES, "without_room", ("t < targets - allowed", "t < targets")),
    *_all("keyed_uniform", "csrc/masks/keyed_uniform.h", "philoxs", ("high += 0xBB67AE85u", "high += 0xBB67AE86u")),
]  # fmt: skip
INTERPRETER = [
    *_all(
        "block_masks", GPU, "options",
        ("failed = tl.where(taken, 0, failed + 1)", "failed = failed + 1"),
        ("& (new.to(tl.float64) <= room)", ""),
    ),
    *_all("multi_block_masks", GPU, "without_room", ("range(targets - tried // places)", "range(targets)")),
    *_all("even_block_scores", GPU, "specifications", ("(below < tall[None, :])", "(below <= tall[None, :])")),
    *_all("keyed_uniform", "kernels/masks/keyed_uniform.py", "philoxs", ("row // images", "row % images")),
]  # fmt: skip
