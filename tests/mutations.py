"""Breaks one line of a kernel at a time and runs the contract's tests on it: each must fail, or the tests don't bite.

A mutation is (operator, file, line as it stands, line broken). The package is copied, changed, and put first on the
path of a pytest process, which must find failures; a C++ mutation is compiled first.
"""

import os
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
    Mutation("nt_xent", "kernels/contrastive/reference.py", "else itself, -math.inf)", "else itself, 0)"),
    Mutation("info_nce", "kernels/contrastive/reference.py", "log_p[:, :1].expm1()", "0.99 * log_p[:, :1].expm1()"),
    Mutation("clip_loss", "kernels/contrastive/reference.py", "- 2 * own", "- 1.99 * own"),
    Mutation(
        "similarity_logsumexp",
        "kernels/contrastive/reference.py",
        "row_ids[:, None] == column_ids",
        "row_ids[:, None] == column_ids + 1",
    ),
    Mutation("siglip_loss", "kernels/contrastive/reference.py", "-labels * (-logits)", "-labels * (1e-3 - logits)"),
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
        "block + terms_per_block, k)",
        "block + terms_per_block - 1, k)",
    ),
    Mutation("cross_entropy", "csrc/supervised/cross_entropy.h", " - static_cast<W>(p.scale)", ""),
    Mutation(
        "cross_entropy_rows", "csrc/supervised/cross_entropy.h", "smoothing * sum / k", "1.01 * smoothing * sum / k"
    ),
    Mutation("negative_cosine", "csrc/predictive/negative_cosine.h", "block_zz += b * b", "block_zz += a * b"),
    Mutation("ema_update_", "csrc/weights/ema_update.h", "weight < T(0.5)", "weight <= T(1)"),
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
    Mutation("characteristic", "kernels/gaussian/gpu.py", "(quadrant + 1) & 2", "quadrant & 2"),
    Mutation("regression", "kernels/predictive/regression.py", "size < beta", "size < 2 * beta"),
    Mutation("mean_entropy", "kernels/prototypes/mean_entropy.py", "mask, 0) - mean)", "mask, 0) - 0.99 * mean)"),
    Mutation("kmeans_step", "kernels/neighbors/kmeans.py", "total += b_x", "total += 0.999 * b_x"),
    Mutation("ema_update_", "kernels/weights/ema_update.py", "1.0 - tl.load(momentum)", "0.999 - tl.load(momentum)"),
    Mutation("lars_", "kernels/optimizers/lars.py", "mask = part < tl.load(line + 11)", "mask = part < 1"),
    Mutation("adamw_", "kernels/optimizers/adamw.py", "kept * p - rate", "p - rate"),
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
    command += ["-k", f"{mutation.op} and {where} and (value or contiguous or update or layouts)"]
    command += ["-m", "interpreter"] if interpreter else []
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _replace(file: Path, mutation: Mutation) -> None:
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"{mutation}: {text.count(mutation.old)} such places; mend the mutation"
    file.write_text(text.replace(mutation.old, mutation.new))


def _compile(csrc: Path, kernels: Path, mutation: Mutation) -> None:
    """An extension with the mutated operator and what its launcher calls beside it: seconds, not minutes."""
    import pybind11

    mutated = Path(mutation.file).relative_to("csrc").with_suffix("")
    names = [
        mutated,
        Path("tensors"),
        Path("weights/rescale"),
        Path("weights/ema_update"),
    ]  # every import and every backward need those
    if mutated.parent.name == "contrastive":
        names += [Path("contrastive") / name for name in ("similarity", "small", "one_tile", "visible", "seen_tile")]
        names.append(Path("covariance/covariance"))  # which has their inner product
    if mutated.parent.name == "covariance":
        names += [Path("covariance/covariance"), Path("covariance/few_rows")]
    names = [
        name for name in dict.fromkeys(names) if (csrc / name.with_suffix(".cpp")).exists()
    ]  # headers alone have none
    (csrc / "operators.h").write_text("".join(f"OPERATOR({name.name})\n" for name in names))
    sources = [csrc / "bindings.cpp", *(csrc / name.with_suffix(".cpp") for name in names)]
    includes = [f"-I{csrc}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    (target,) = kernels.glob("_C.*.so")
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden", *includes]
    subprocess.run([*command, *map(str, sources), "-o", str(target)], check=True)
