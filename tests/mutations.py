"""Breaks one line of a kernel at a time and runs the contract's tests on it: each must fail, or the tests don't bite.

A mutation is (operator, file, line as it stands, line broken). The package is copied, changed, and put first on the
path of a pytest process, which must find failures; a C++ mutation is compiled first. Objects of what isn't changed are
kept in build/mutations/.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    op: str
    file: str
    old: str
    new: str
    tests: str = ""  # pytest's -k, where others than the operator's own notice

    def __str__(self) -> str:
        return f"{self.op}: {self.file}: {self.old.strip()} -> {self.new.strip()}"


REFERENCE = [
    Mutation(
        "cross_entropy",
        "kernels/supervised/reference.py",
        "index, -torch.ones_like(rows)",
        "index, -0.999 * torch.ones_like(rows)",
    ),
    Mutation("cross_entropy_rows", "kernels/supervised/reference.py", "(smoothing - 1)", "(smoothing - 0.99)"),
    Mutation(
        "negative_cosine",
        "kernels/predictive/reference.py",
        "through_unit_rows(-p_unit, z",
        "through_unit_rows(p_unit, z",
    ),
    Mutation("nt_xent", "kernels/contrastive/in_parts.py", "else itself, -math.inf)", "else itself, 0)"),
    Mutation("info_nce", "kernels/contrastive/of_queries.py", "log_p[:, :1].expm1()", "0.99 * log_p[:, :1].expm1()"),
    Mutation("clip_loss", "kernels/contrastive/in_parts.py", "- 2 * own", "- 1.99 * own"),
    Mutation(
        "similarity_logsumexp",
        "kernels/contrastive/reference.py",
        "hidden | (row_ids[:, None] == column_ids)",
        "hidden | (row_ids[:, None] == column_ids + 1)",
    ),
    Mutation("siglip_loss", "kernels/contrastive/in_parts.py", "-labels * (-logits)", "-labels * (1e-3 - logits)"),
    Mutation("siglip_pairs", "kernels/contrastive/reference.py", "(1 - target) * up", "(1.001 - target) * up"),
    Mutation(
        "prototype_cross_entropy",
        "kernels/prototypes/reference.py",
        "is_pair(i, j, pairs)]",
        "not is_pair(i, j, pairs)]",
    ),
    Mutation("kmeans_step", "kernels/neighbors/reference.py", "scores.argmax(1)", "scores.argmin(1)"),
    Mutation("nearest_k", "kernels/neighbors/reference.py", "start += part", "start += 1 + part"),
    Mutation("gram_loss", "kernels/gram/reference.py", "(error * counts) @ u", "(0.999 * error * counts) @ u"),
    Mutation("barlow_twins", "kernels/covariance/reference.py", "+ 1e-5).sqrt()", "+ 1e-3).sqrt()"),
    Mutation("vicreg", "kernels/covariance/reference.py", "(n / (n - 1))", "1"),
    Mutation("crop_resize", "kernels/augment/reference.py", "-0.5 * x + 2.5", "-0.6 * x + 2.6"),
]
CPU = [
    Mutation("augment", "csrc/augment/augment.h", "padded[left - k] = from[k]", "padded[left - k] = from[k - 1]"),
    Mutation(
        "cross_entropy",
        "csrc/supervised/cross_entropy.h",
        "k);\n      W partial = 0;\n#pragma omp simd reduction(+ : partial)\n      for",
        "k - 1);\n      W partial = 0;\n#pragma omp simd reduction(+ : partial)\n      for",
    ),
    Mutation("cross_entropy", "csrc/supervised/cross_entropy.h", " - static_cast<W>(p.scale)", ""),
    Mutation(
        "cross_entropy_rows", "csrc/supervised/cross_entropy.h", "smoothing * sum / k", "1.01 * smoothing * sum / k"
    ),
    Mutation("negative_cosine", "csrc/predictive/negative_cosine.h", "block_zz += b * b", "block_zz += a * b"),
    Mutation("ema_update_", "csrc/weights/blend.h", "weight < T(0.5)", "weight <= T(1)"),
    Mutation("lars_", "csrc/optimizers/lars.h", "momentum * buffer[j] + step", "momentum * buffer[j] + 0.999f * step"),
    Mutation("lars_", "csrc/optimizers/lars.cpp", "decay * parameter_norm", "1.001 * decay * parameter_norm"),
    Mutation("adamw_", "csrc/optimizers/adamw.h", "std::sqrt(v) * root", "std::sqrt(v * root)"),
    Mutation("nt_xent", "csrc/contrastive/similarity.h", "column_sum[j] += e;", "column_sum[j] += e + e;"),
    Mutation("nt_xent", "csrc/contrastive/small.h", "loss += softmax(", "loss += 0.999 * softmax("),
    Mutation(
        "supcon", "csrc/contrastive/small.h", "weights[i * m + j] -= shares[j]", "weights[i * m + j] += shares[j]"
    ),
    Mutation("clip_loss", "csrc/contrastive/small.h", "weights[i] += by_column[i]", "weights[i] -= by_column[i]"),
    Mutation("siglip_loss", "csrc/contrastive/small.h", "(logit > 0 ? e : 1.0)", "(logit > 0 ? 1.0 : e)"),
    Mutation("info_nce", "csrc/contrastive/small.h", "std::expm1(dot * factor - lse)", "std::exp(dot * factor - lse)"),
    Mutation("nt_xent", "csrc/contrastive/one_tile.h", "-2 : weight", "-2 : 0.999 * weight"),
    Mutation("clip_loss", "csrc/contrastive/one_tile.h", "column_sum[j] += e;", "column_sum[j] += e + e;"),
    Mutation("info_nce", "csrc/contrastive/similarity.h", "p.rescale[i] = rescale", "p.rescale[i] = 1"),
    Mutation("nt_xent", "csrc/contrastive/seen_tile.h", "p.of_positive() + uniform_part", "p.of_positive()"),
    Mutation("nt_xent", "csrc/contrastive/seen_tile.h", "seen[j] > 0 ? exponential", "true ? exponential"),
    Mutation(
        "clip_loss", "csrc/contrastive/seen_tile.h", "probabilities - (row_uniform", "probabilities + (row_uniform"
    ),
    Mutation("clip_loss", "csrc/contrastive/seen_tile.h", "column[j] += e;", "column[j] += T(1.001) * e;"),
    Mutation("clip_loss", "csrc/contrastive/seen_tile.cpp", "sums[1], sums[2]);", "sums[2], sums[1]);"),
    Mutation("info_nce", "csrc/contrastive/seen_tile.cpp", "count + number", "count"),
    *(
        Mutation("supcon", "csrc/contrastive/class_tile.h", old, new, tests="test_class_tile")
        for old, new in (
            ("* of_positive - share", "* of_positive - T(0.99) * share"),
            ("* (1 + p.hardness) / sums.both", "* p.hardness / sums.both"),
            ("!is_positive && key > of_negatives", "key > of_negatives"),
            ("{0, i, i + 1, columns}", "{0, i, i, columns}"),
            ("from, to, static_cast<T>(std::exp(-log_sum))", "from, to, static_cast<T>(0.999 * std::exp(-log_sum))"),
        )
    ),
    Mutation("similarity_logsumexp", "csrc/contrastive/look.h", "from = 0;", "from = 1;"),
    Mutation("similarity_logsumexp", "csrc/contrastive/visible.h", "e * row_of_lse + row_of_total", "e * row_of_lse"),
    Mutation("siglip_loss", "csrc/contrastive/similarity.h", "sums.slope += g;", "sums.slope -= g;"),
    Mutation("siglip_pairs", "csrc/contrastive/siglip_pairs.h", "x > 0 ? 1 - target[j] : target[j]", "target[j]"),
    Mutation(
        "prototype_cross_entropy",
        "csrc/prototypes/prototype_cross_entropy.h",
        "- y[j] * target",
        "- 0.999f * y[j] * target",
    ),
    Mutation("sinkhorn", "csrc/prototypes/sinkhorn.cpp", "+ i * width : nullptr", ": nullptr"),
    Mutation("sinkhorn", "csrc/prototypes/sinkhorn.cpp", "index * problem_stride *", "index * row_stride *"),
    Mutation("barlow_twins", "csrc/covariance/covariance.h", "- own[k] * of_own[j]", "+ own[k] * of_own[j]"),
    Mutation("regression", "csrc/predictive/regression.h", "squares / d + eps", "squares / (d + 1) + eps"),
    Mutation("regression_rows", "csrc/predictive/regression.h", "row_weight * loss", "loss"),
    Mutation("characteristic", "csrc/gaussian/characteristic.h", "((quadrant + 1) & 2)", "((quadrant) & 2)"),
    Mutation(
        "characteristic", "csrc/gaussian/characteristic.h", "- weight[j] * sine[j]", "- 0.999f * weight[j] * sine[j]"
    ),
    Mutation("koleo", "csrc/contrastive/koleo.h", "t.row_start + i, k, best", "t.row_start, k, best"),
    Mutation("koleo", "csrc/contrastive/koleo.h", "-weight(n)", "-0.999f * weight(n)"),
    Mutation("barlow_twins", "csrc/covariance/covariance.cpp", "(1 - lambda) * own[j] - 1", "(1 - lambda) * own[j]"),
    Mutation("vicreg", "csrc/covariance/covariance.cpp", "slope[j] -= factor * own[j]", "slope[j] += factor * own[j]"),
    Mutation("vicreg", "csrc/covariance/few_rows.h", "(side ? -2 : 2) * w.lambda", "2 * w.lambda"),
    Mutation("barlow_twins", "csrc/covariance/few_rows.h", "(1 - lambda) * value - 1;", "(1 - lambda) * value;"),
    Mutation("vicreg", "csrc/covariance/covariance.h", "side ? -invariance : invariance", "invariance"),
    Mutation(
        "nt_xent",
        "csrc/contrastive/small.h",
        "std::max(std::sqrt(squares), unit_eps)",
        "std::sqrt(squares)",
        tests="test_quick and shorter",
    ),
    Mutation(
        "nt_xent",
        "csrc/contrastive/small.h",
        "if (!(rows.divisors[i] <= unit_eps)) {",
        "if (true) {",
        tests="test_quick and shorter",
    ),
    Mutation("nt_xent", "csrc/contrastive/small.h", "p.decoupled && p.images == 1", "false", tests="one_image"),
    Mutation(
        "clip_loss",
        "csrc/contrastive/one_tile.cpp",
        "factor * (factor < 0 ? least : largest) - range.top",
        "0",
        tests="near_each_other",
    ),
    Mutation(
        "clip_loss",
        "csrc/contrastive/one_tile.cpp",
        "part < parts; ++part) column_sum",
        "part < 1; ++part) column_sum",
        tests="near_each_other",
    ),
    Mutation("clip_loss", "csrc/contrastive/one_tile.cpp", "factor < 0 ? largest : least", "least", tests="one_shift"),
    Mutation("kmeans_step", "csrc/neighbors/neighbors.h", "if (k % parts != part) continue;", "", tests="two_threads"),
    Mutation(
        "nearest_k",
        "csrc/neighbors/neighbors.h",
        "s[j] <= worst ? 0 : 1",
        "s[j] > worst ? 1 : 0",
        tests="nan_is_found and c++",
    ),
    Mutation("nearest_k", "csrc/neighbors/neighbors.h", "if (first > 0) {", "if (false) {"),
    Mutation(
        "koleo_neighbors",
        "csrc/contrastive/koleo.h",
        "if (!(key > best[k - 1])) return;",
        "if (!(key >= best[k - 1])) return;",
        tests="test_infinities and koleo_neighbors and c++",
    ),
    *(
        Mutation("koleo", "csrc/contrastive/koleo.h", old, new, tests="test_koleo")
        for old, new in (
            ("any |= !(s[j] <= least);", "any |= s[j] > least;"),
            ("any |= !(s[j] <= least[j]);", "any |= s[j] > least[j];"),
            ("if (!(total > 1e-30)) {", "if (false) {"),
            ("if (t.divisors[i] > t.eps) {", "if (true) {"),
            ("value = value < -largest ? -largest : value;", ""),
            ("value = value > largest ? largest : value;", ""),
        )
    ),
    Mutation("koleo", "csrc/contrastive/koleo.cpp", "t, first_column + begin", "t, begin", tests="what_a_sort_finds"),
    Mutation("koleo", "csrc/contrastive/koleo.cpp", "numbers[n] < 0 || ", "", tests="test_koleo and out_of_range"),
    Mutation("koleo", "csrc/contrastive/koleo.cpp", "|| numbers[n] >= rows", "", tests="test_koleo and out_of_range"),
    *(
        Mutation("similarity_logsumexp", "csrc/contrastive/visible.h", old, new, tests="test_visible and c++")
        for old, new in (
            ("!(value > limit)", "!(value >= limit)"),
            ("before == now ? 1 : ", ""),
            ("? exponential(s[j] - pivot[j]) : T(0)", "|| true ? exponential(s[j] - pivot[j]) : T(0)"),
            ("has_row && t.running ? row.pivot[i] : shift", "shift"),
        )
    ),
    Mutation(
        "siglip_pairs",
        "csrc/contrastive/siglip_pairs.h",
        "exponential(x < 0 ? x : -x)",
        "exponential(-x)",
        tests="test_siglip_options",
    ),
    Mutation(
        "similarity_logsumexp",
        "csrc/contrastive/visible.cpp",
        "at<double>(total)[at_part % t.columns] +=",
        "at<double>(total)[at_part % t.columns] =",
        tests="test_visible and c++",
    ),
    *(
        Mutation("adamw_", "csrc/optimizers/gathered.h", old, new, tests="test_optimizers_at_once")
        for old, new in (
            ("written_[i - 1].end > written_[i].begin", "false"),
            ("(after - 1)->end > gradient.begin", "false"),
            ("x->dtype == parameters_[i].dtype && ", ""),
        )
    ),
    Mutation("tico", "csrc/covariance/tico.h", "? cosine - 2 * p.rho", "? cosine - 1.99 * p.rho"),
    Mutation("tico", "csrc/covariance/tico.h", "has_length(y_divisor) ? cosine : 0.0", "0.0"),
    Mutation("frossl", "csrc/covariance/frossl.h", "has_length(divisor) ? dots[j] : 0.0", "0.0"),
    Mutation("frossl", "csrc/covariance/frossl.cpp", "4 / squares * scale", "3.99 / squares * scale"),
    Mutation("w_mse", "csrc/covariance/factored.h", "gradient[i * d + j] -= mean[j]", "gradient[i * d + j] -= 0"),
    Mutation("w_mse", "csrc/covariance/factored.h", "x[j * side + i] = x[i * side + j];", ""),
    Mutation("total_coding_rate", "csrc/covariance/factored.cpp", "i / side * side * side", "0"),
    Mutation(
        "total_coding_rate", "csrc/covariance/factored.h", "static_cast<W>(diagonal)", "static_cast<W>(1.01 * diagonal)"
    ),
    Mutation("simdino", "csrc/covariance/simdino.h", "g[j] = sum[j] - same[j]", "g[j] = sum[j]"),
    Mutation(
        "simdino",
        "csrc/covariance/simdino.h",
        "has_length(divisor) ? radial",
        "is_global ? radial",
        tests="without_length",
    ),
    Mutation("mmcr", "csrc/covariance/mmcr.h", "? 1 / std::sqrt(eigenvalue)", "? 0.999 / std::sqrt(eigenvalue)"),
    Mutation("mmcr", "csrc/covariance/mmcr.h", "a[i * m + k] = cosine * x - sine * y", "a[i * m + k] = cosine * x"),
    Mutation("mean_entropy", "csrc/prototypes/softmax_slope.cpp", "(sums)[j] / n", "(sums)[j] / (n + 1)"),
    Mutation("mean_entropy", "csrc/prototypes/softmax_slope.h", "block[j] += e[j] * factor", "block[j] += e[j]"),
    Mutation(
        "sinkhorn_bias",
        "kernels/prototypes/cpu.py",
        ": int(rows), :",
        ": int(rows) + 1, :",
        tests="fill_up and not ibot",
    ),
    *(
        Mutation("prototype_head_usage", "kernels/prototypes/head_usage.py", old, new, tests="test_msn and some")
        for old, new in (
            ("widest(of_these) * some.share", "widest(of_these)"),
            ("upstream * scale * some.share", "upstream * scale"),
            ("of_prototypes.addmm_(some", "of_prototypes.addmm_(0.999 * some"),
            ("slope / sides.student_temperature", "slope"),
        )
    ),
]
INTERPRETER = [
    Mutation("nt_xent", "kernels/contrastive/weights.py", "(s - b_pivot[None, :])", "(s - 0.999 * b_pivot[None, :])"),
    Mutation(
        "prototype_head_cross_entropy",
        "kernels/prototypes/prototype_head_kernels.py",
        "(mass * u - y) * weight",
        "(mass * u - 0.99 * y) * weight",
    ),
    Mutation("similarity_logsumexp", "kernels/contrastive/visible_kernels.py", "above == 0", "above == 1"),
    Mutation(
        "similarity_logsumexp",
        "kernels/contrastive/visible_kernels.py",
        "tl.expand_dims(slope, AXIS)",
        "tl.expand_dims(0.99 * slope, AXIS)",
    ),
    Mutation("cross_entropy_rows", "kernels/supervised/gpu.py", "g - (1 - epsilon)", "g - (1.01 - epsilon)"),
    Mutation("koleo", "kernels/contrastive/gpu_koleo.py", "total += _slope", "total += 0.99 * _slope"),
    *(
        Mutation("siglip_loss", f"kernels/contrastive/{file}", old, new, tests="siglip_of_pairs and wanted")
        for file, old, new in (
            ("weights.py", "1 - less, less)", "0.99 - less, less)"),
            ("weights.py", "(i_a + offset)[:, None], -g, g)", "(i_a + offset)[:, None], g, g)"),
            ("gpu_sigmoid.py", "tl.load(derivatives + 1)", "tl.load(derivatives)"),
        )
    ),
    Mutation("characteristic", "kernels/gaussian/gpu.py", "(quadrant + 1) & 2", "quadrant & 2"),
    Mutation("regression", "kernels/predictive/regression.py", "size < beta", "size < 2 * beta"),
    Mutation("regression_rows", "kernels/predictive/regression.py", "tl.sum(loss, 1) * weight", "tl.sum(loss, 1)"),
    Mutation("regression_rows", "kernels/predictive/regression.py", "slope *= weight[", "slope *= 0.99 * weight["),
    Mutation("sinkhorn", "kernels/prototypes/sinkhorn.py", "row_start(problem * parts + i,", "row_start(i,"),
    Mutation(
        "sinkhorn_bias",
        "kernels/prototypes/sinkhorn.py",
        "live = (i_row < N) & (i_row < counted)",
        "live = i_row < N",
        tests="fill_up",
    ),
    Mutation("mean_entropy", "kernels/prototypes/mean_entropy.py", "view * parts + part", "part"),
    Mutation("vicreg", "kernels/covariance/products.py", "tl.where(offset == 0, 1.0, 2.0)", "1.0"),
    Mutation(
        "barlow_twins", "kernels/covariance/products.py", "(s * over) * (other * over)", "(s * over) * (s * over)"
    ),
    Mutation("prototype_cross_entropy", "kernels/prototypes/row_logsumexp.py", "(view >= UNBIASED)", "True"),
    Mutation("mean_entropy", "kernels/prototypes/mean_entropy.py", "mask, 0) - mean)", "mask, 0) - 0.99 * mean)"),
    Mutation(
        "prototype_head_usage", "kernels/prototypes/prototype_head_usage.py", "sums += added", "sums += 0.999 * added"
    ),
    Mutation("gram_loss", "kernels/gram/gpu.py", "tl.where(mirrored, 2.0, 1.0)", "1.0"),
    Mutation("gram_loss", "kernels/gram/gpu.py", "counted * over_a[:, None]", "counted * over_b[None, :]"),
    Mutation("gram_loss", "kernels/gram/gpu.py", "idle = (s <= 0) & (t <= 0)", "idle = s <= 0"),
    Mutation(
        "gram_loss", "kernels/gram/gpu.py", "row_start(group, stop - first, 1)", "row_start(group, stop - first - 1, 1)"
    ),
    Mutation("gram_loss", "kernels/contrastive/rows.py", "b_u = b_u / divisor[:, None]", "b_u = b_u"),
    Mutation("nearest_k", "kernels/neighbors/nearest.py", "while found > 0:", "if found > 0:"),
    Mutation(
        "nearest_k",
        "kernels/neighbors/nearest.py",
        "tl.where(best == worst, whose, -_BEYOND)",
        "tl.where(best == worst, -whose, -_BEYOND)",
    ),
    Mutation("kmeans_step", "kernels/neighbors/kmeans.py", "total += b_x", "total += 0.999 * b_x"),
    Mutation("ema_update_", "kernels/weights/ema_update.py", "1.0 - tl.load(momentum)", "0.999 - tl.load(momentum)"),
    Mutation("lars_", "kernels/optimizers/lars.py", "mask = part < tl.load(line + 10)", "mask = part < 1"),
    Mutation("adamw_", "kernels/optimizers/adamw.py", "kept * p - rate", "p - rate"),
    Mutation("lars_", "kernels/optimizers/lars.py", "tensor_at(line, 1, DTYPE", "tensor_at(line, 2, DTYPE"),
]


def run(mutation: Mutation, folder: Path, interpreter: bool = False) -> subprocess.CompletedProcess:
    """pytest on the mutated package, on the tests that name its operator."""
    package = folder / "fastjem"
    shutil.copytree(ROOT / "fastjem", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    if not list((package / "kernels").glob("_C.*.so")):
        import fastjem.kernels._C as extension  # installed elsewhere

        shutil.copy(extension.__file__, package / "kernels")
    if mutation.file.startswith("csrc/"):
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        _replace(folder / mutation.file, mutation)
        _compile(folder / "csrc", package / "kernels", mutation)
    else:
        _replace(package / mutation.file, mutation)
    where = "c++" if mutation.file.startswith("csrc/") else "interpreter" if interpreter else "reference"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", str(ROOT / "tests")]
    own = f"{mutation.op} and {where} and (value or problems or contiguous or update or layouts)"
    command += ["-k", mutation.tests or own]
    command += ["-m", "interpreter"] if interpreter else []
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _replace(file: Path, mutation: Mutation) -> None:
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"{mutation}: {text.count(mutation.old)} such places; mend the mutation"
    file.write_text(text.replace(mutation.old, mutation.new))


FLAGS = ["-O1", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
BESIDE = {  # what the launchers of a family call beside the operator that they are named after
    "contrastive": [
        "contrastive/similarity",
        "contrastive/small",
        "contrastive/one_tile",
        "contrastive/visible",
        "contrastive/seen_tile",
        "contrastive/class_tile",
        "covariance/covariance",
    ],
    "covariance": ["covariance/covariance", "covariance/few_rows", "covariance/factored"],
}


def _compile(csrc: Path, kernels: Path, mutation: Mutation) -> None:
    """An extension with what the mutation changes and what its launchers call beside it."""
    changed = Path(mutation.file).relative_to("csrc")
    mutated = [str(source.with_suffix("")) for source in _sources(csrc, changed)]
    # Every import and every backward need the last three.
    names = [*mutated, *BESIDE.get(changed.parts[0], []), "tensors", "weights/rescale", "weights/ema_update"]
    names = list(dict.fromkeys(names))
    (csrc / "operators.h").write_text("".join(f"OPERATOR({Path(name).name})\n" for name in names))
    objects = [_object(csrc, name, kernels) for name in ("bindings", *mutated)]
    (ROOT / "build" / "mutations").mkdir(parents=True, exist_ok=True)
    objects += [_kept_object(name) for name in names if name not in mutated]
    (target,) = kernels.glob("_C.*.so")
    subprocess.run(["g++", "-shared", "-fopenmp", *map(str, objects), "-o", str(target)], check=True)


def _object(csrc: Path, name: str, folder: Path) -> Path:
    import pybind11

    target = folder / f"{name.replace('/', '_')}.{os.getpid()}.o"
    includes = [f"-I{csrc}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    subprocess.run(["g++", *FLAGS, *includes, "-c", str(csrc / f"{name}.cpp"), "-o", str(target)], check=True)
    return target


def _kept_object(name: str) -> Path:
    """The object of a source as it stands, compiled once for all mutations."""
    kept = ROOT / "build" / "mutations" / f"{_content()}-{name.replace('/', '_')}.o"
    if not kept.exists():
        _object(ROOT / "csrc", name, kept.parent).replace(kept)
    return kept


@functools.cache
def _content() -> str:
    """Of all C++ and how it is compiled, and for which Python."""
    digest = hashlib.sha256(repr((FLAGS, sys.version)).encode())
    for file in sorted((ROOT / "csrc").rglob("*.*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _sources(csrc: Path, file: Path) -> list[Path]:
    """The .cpp files that a file reaches by including it, and itself; all relative to csrc."""
    if file.suffix == ".cpp":
        return [file]
    texts = {x.relative_to(csrc): x.read_text() for x in csrc.rglob("*.*")}
    includes = {x: set(map(Path, re.findall(r'(?:include|FASTJEM_KERNEL) "(.+)"', y))) for x, y in texts.items()}
    reached = {file}
    while more := {x for x, of in includes.items() if of & reached} - reached:
        reached |= more
    return sorted(x for x in reached if x.suffix == ".cpp" and x.name != "bindings.cpp")
