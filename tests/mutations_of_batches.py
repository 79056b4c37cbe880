"""Lines of the Triton kernels that make the whole loss of a batch, or its products, broken one at a time: see
mutations.py."""

from mutations import Mutation


def _all(op: str, file: str, tests: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(op, file, old, new, tests=tests) for old, new in changes]


CLASSES = "kernels/contrastive/class_kernels.py"
VIEWS, PAIRS = "kernels/contrastive/views.py", "kernels/contrastive/pair_kernels.py"
VIEW_PRODUCTS, FEW_PRODUCTS = "kernels/contrastive/view_products.py", "kernels/contrastive/products.py"
QUERY_PRODUCTS = "kernels/contrastive/query_products.py"
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
        "nt_xent_of_views", VIEW_PRODUCTS, f"test_nt_xent_of_views and {SMALL}",
        ("along -= pull * cosine", "along -= 0.99 * pull * cosine"),
        ("pull = tl.where(v != j, pull, 0.0)", "pull = pull * 1.0"),
        ("+ i_a, part, i_a < rows)", "+ i_a, 0.99 * part, i_a < rows)"),
        ("-sum_of_all(radial, lines * rows)", "-sum_of_all(radial, rows)"),
    ),
    *_all(
        "nt_xent_of_views", FEW_PRODUCTS, "test_nt_xent_of_views and shorter",
        ("tl.where(divisor > EPS, radial, 0.0)", "radial"),
    ),
    *_all(
        "nt_xent_of_views", "kernels/contrastive/weights.py", "test_nt_xent_of_views and rounding",
        ("return (g * GAIN).to(dtype).to(tl.float32) / GAIN", "return g"),
    ),
    *_all(
        "info_nce", QUERY_PRODUCTS, "test_info_nce and exponentials",
        ("launch.row_start(first // TILE, N, 1)", "launch.row_start(0, N, 1)"),
        ("launch.row_start(split, N, 1) + i_row, inside, 0.0))", "launch.row_start(0, N, 1) + i_row, inside, 0.0))"),
        ("begin = split * tiles_per_program * TILE", "begin = split * tiles_per_program"),
    ),
    *_all(
        "info_nce", QUERY_PRODUCTS, "test_info_nce and values and 16 and float32",
        ("along = sum_of_lines(row_dots", "along = 0.99 * sum_of_lines(row_dots"),
    ),
    *_all(
        "info_nce", QUERY_PRODUCTS, "test_info_nce and only_what_is_wanted and float32",
        ("along = sum_of_lines(column_dots", "along = 0.99 * sum_of_lines(column_dots"),
        ("sum_of_all(slopes, N) + sum_of_all", "0.99 * sum_of_all(slopes, N) + sum_of_all"),
    ),
    *_all(
        "clip_loss_of_pairs", PAIRS, "test_clip_of_pairs and only_what_is_wanted and float32",
        ("N, D, s_weights, True, GAIN", "N, D, s_weights, False, GAIN"),
        ("g += weight.to(tl.float32)[:, None] * partners", "g += 0.99 * weight.to(tl.float32)[:, None] * partners"),
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
        ("i_row, N, column_parts, 0, 0, size", "i_row, N, 1, 0, 0, size"),
    ),
    *_all(
        "clip_loss_of_pairs", PAIRS, "test_clip_of_pairs and in_pieces",
        ("y_lse = tl.load(others + N + i_row, inside, 0.0)", "y_lse = tl.load(others + i_row, inside, 0.0)"),
    ),
    *_all(
        "normalize_rows", "kernels/contrastive/rows.py", "test_normalize_rows and not 300",
        ("b_x * (1 / divisor)[:, None]", "b_x"),
        ("least, propagate_nan", "1e-12, propagate_nan"),
        ("(b_g - radial[:, None] * b_u)", "(b_g - 0.99 * radial[:, None] * b_u)"),
        ("tl.where(is_longer, tl.sum(b_g * b_u, 1), 0.0)", "tl.sum(b_g * b_u, 1)"),
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
