"""Lines of the Triton kernels that make the whole loss of a batch, or its products, broken one at a time: see
mutations.py."""

from mutations import Mutation


def _all(op: str, file: str, tests: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(op, file, old, new, tests=tests) for old, new in changes]


CLASSES = "kernels/contrastive/class_kernels.py"
VIEWS, PAIRS = "kernels/contrastive/views.py", "kernels/contrastive/pair_kernels.py"
PRODUCTS, RESCALE = "kernels/covariance/products.py", "kernels/weights/rescale.py"
SMALL = "values and not 150 and not 128 and not 200 and not 300"  # shapes that the interpreter is done with soon
ONE_NUMBER = "(value or squares)"

INTERPRETER = [
    *_all(
        "nt_xent_of_views", VIEWS, f"test_nt_xent_of_views and {SMALL}",
        ("pull = pull / (V - 1)", "pull = pull / V"),
        ("pull -= tl.exp(logit - b_lse) + tl.exp(", "pull -= tl.exp(logit - b_lse) + 0.99 * tl.exp("),
        ("tl.store(losses, total / rows)", "tl.store(losses, total / (rows + 1))"),
        ("result *= tl.load(factor) * tl.load(factor)", "result *= tl.load(factor)"),
        ("for k in range(0, BM, ROWS):", "for k in range(ROWS, BM, ROWS):"),
    ),
    *_all(
        "nt_xent_of_views", VIEWS, "test_nt_xent_of_views and shorter",
        ("tl.where(divisor > EPS, along, 0.0)", "along"),
    ),
    *_all(
        "nt_xent_of_views", VIEWS, "test_nt_xent_of_views and in_pieces",
        ("tl.exp(earlier - largest) + tl.exp(b_lse", "tl.exp(b_lse"),
    ),
    *_all(
        "supcon", CLASSES, "test_supcon_of_classes and values and 90",
        ("V * count - 1, 0)", "V * count, 0)"),
        ("share * (2 - number", "share * (2.001 - number"),
        ("tl.where(divisor > EPS, along_rows, 0.0)", "0.0 * along_rows"),
    ),
    *_all(
        "supcon", "kernels/contrastive/sums.py", "test_supcon_of_classes and values and 90 and many",
        ("tl.where(line >= 0, 2.0, 1.0)", "tl.where(line >= 0, 1.0, 1.0)"),
    ),
    *_all(
        "supcon", "kernels/contrastive/weights.py", "test_supcon_of_classes and values and 0.0135",
        ("tl.load(a_pulls + i_a)[:, None] + tl", "2 * tl.load(a_pulls + i_a)[:, None] + 0 * tl"),
    ),
    *_all(
        "supcon", CLASSES, "test_supcon_of_classes and in_pieces",
        ("tl.exp(earlier - largest) + tl.exp(b_lse", "tl.exp(b_lse"),
        ("for part in range(0, walks_parts):", "for part in range(0, 1):"),
    ),
    *_all(
        "clip_loss_of_pairs", PAIRS, f"test_clip_of_pairs and {SMALL}",
        ("tl.where(inside, of_x + of_y, 0.0)", "tl.where(inside, 2 * of_x, 0.0)"),
        ("of_b = states + (1 - side) * 2 * S", "of_b = states + 2 * S"),
        ("total += weight * similarity", "total += 0.99 * weight * similarity"),
    ),
    *_all(
        "clip_loss_of_pairs", PAIRS, "test_clip_of_pairs and values and 200 and float32",
        ("(x_lse - logit) + (y_lse - logit)", "2 * (x_lse - logit)"),
        ("for line in range(0, lines):", "for line in range(0, 1):"),
    ),
    *_all(
        "clip_loss_of_pairs", PAIRS, "test_clip_of_pairs and in_pieces",
        ("y_lse = tl.load(others + N + i_row, inside, 0.0)", "y_lse = tl.load(others + i_row, inside, 0.0)"),
    ),
    *_all(
        "rescale_all_", RESCALE, "test_rescale",
        ("b_factor *= tl.load(scale).to(COMPUTE)", "b_factor *= 1"),
        ("_multiply(gradient + offset, b_factor, tail", "_multiply(gradient + offset, b_factor * b_factor, tail"),
        ("launch.chosen(gradients, tl.program_id(0) // blocks)", "gradients[0]"),
        ("(blocks * len(gradients),)", "(blocks,)"),
    ),
    *_all(
        "vicreg", PRODUCTS, f"vicreg and interpreter and {ONE_NUMBER}",
        ("(2 * offset != blocks) | (block_a < block_b)", "offset >= 0"),
        ("(i_a[:, None] != i_b[None, :]) | (not TALL)", "i_a[:, None] >= 0"),
        ("square + right_row + k[:, None]", "square + right_row + 0 * k[:, None]"),
        ("square + left_row + k[None, :]", "square + left_row + 0 * k[None, :]"),
    ),
    *_all(
        "barlow_twins", PRODUCTS, f"barlow_twins and interpreter and {ONE_NUMBER}",
        ("_store_square(squares[0], squares[1], s,", "_store_square(squares[0], squares[0], s,"),
        ("_store_square(squares[1], squares[1], other,", "_store_square(squares[1], squares[1], s,"),
    ),
]  # fmt: skip
