"""Whether a run is well: figures of collapse, and an alarm that reads them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from fastjem.functional.decompositions import eigenvalues
from fastjem.kernels.arithmetic import solvable, widest
from fastjem.methods.protocol import Codes

# SimSiam of CIFAR images: std falls below 0.95 of its height by step 20 to 45 without stop-gradient (batches of 64 and
# 128, SGD and LARS, two encoders), and with it never below 0.97 in 50 steps and 0.94 in 468. The projections' rank
# falls in both, and further in those that learn more.
ALARM_STD = 0.1
ALARM_RANK = 1.2
ALARM_CHECKS = 2  # in a row
ALARM_STEPS = 50  # in which a fall of std to ALARM_FALL is a sign, and after them one to ALARM_LATER_FALL
ALARM_FALL = 0.95
ALARM_LATER_FALL = 0.7
ROWS = 512  # of a batch that are looked at
SCORES = 1 << 20  # against prototypes that are held at a time: those of 512 rows of 65,536 would take 128 MiB


class Figures(NamedTuple):
    """What a step's notes say, without a wait: figures, and for those in `spectra` the matrices that they are of."""

    known: dict[str, Tensor]  # 0-dim
    spectra: dict[str, Tensor]  # [n, n], n at most `ROWS`: the figure is `rank_of_spectrum`


def figures(notes: Mapping[str, Any]) -> dict[str, Tensor]:
    """0-dim figures of what a step noted (`fastjem.methods.Branch.note`). On a GPU spectra are waited for.

    `std`: of the unit-length projections per dimension, times sqrt(D): 1 for directions spread evenly, 0 for a point.
    `embedding_std`: the embeddings' deviation over the batch as a share of their size.
    `projection_rank`, `effective_rank` of projections and embeddings: exp of the entropy of the covariance's spectrum,
    at most min(B, D).
    `teacher_entropy`, as a share of log K, and `prototype_usage`, the share of prototypes that the batch could use.
    Every other note is a figure already.
    """
    known, spectra = on_device(notes)
    return known | {name: rank_of_spectrum(gram) for name, gram in spectra.items()}


@torch.no_grad()
def on_device(notes: Mapping[str, Any]) -> Figures:
    """`figures`, but for those that an eigensolver has to wait for; those can be computed elsewhere."""
    known = ("projection", "embedding", "codes")
    found = {}
    spectra = {}
    if "projection" in notes:
        z = normalize(notes["projection"].float(), dim=1)
        found["std"] = z.std(0, correction=0).square().sum().sqrt()
        spectra["projection_rank"] = covariance_of_rows(z)
    if "embedding" in notes:
        x = notes["embedding"].float()
        size = x.square().sum(1).mean().sqrt() + 1e-12
        found["embedding_std"] = (x - x.mean(0)).square().sum(1).mean().sqrt() / size
        spectra["effective_rank"] = covariance_of_rows(x)
    if "codes" in notes:
        found |= _of_codes(notes["codes"])
    return Figures(found | {name: value for name, value in notes.items() if name not in known}, spectra)


def _of_codes(codes: Codes) -> dict[str, Tensor]:
    features = codes.features[:ROWS]
    prototypes = codes.prototypes.float()
    at_a_time = max(1, SCORES // len(prototypes))
    entropies = []
    largest = []
    for rows in features.split(at_a_time):
        scores = linear(rows.float(), prototypes) / codes.temperature + codes.bias
        log_p = scores.float().log_softmax(1)
        entropies.append(-(log_p.exp() * log_p).sum(1))
        largest.append(log_p.argmax(1))
    used = torch.zeros(len(prototypes), device=prototypes.device).index_fill_(0, torch.cat(largest), 1.0)
    return {
        "teacher_entropy": torch.cat(entropies).mean() / torch.tensor(float(len(prototypes))).log(),
        "prototype_usage": used.sum() / min(len(prototypes), len(features)),
    }


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the covariance's spectrum, over the first `ROWS` rows of [N, D].

    NaN where these aren't finite.
    """
    return rank_of_spectrum(covariance_of_rows(x))


def covariance_of_rows(x: Tensor) -> Tensor:
    """Of the first `ROWS` rows of [N, D] the covariance [D, D] or their products [N, N], whichever is smaller: both
    have the same spectrum, but for a factor and zeros."""
    x = x[:ROWS]
    x = x - x.mean(0)
    return x @ x.T if len(x) < x.shape[1] else x.T @ x


@torch.no_grad()
def rank_of_spectrum(gram: Tensor) -> Tensor:
    """exp of the entropy of a symmetric matrix's eigenvalues as shares of their sum. An eigensolver waits for a GPU's
    result; on the CPU it takes 30 ms for a matrix of 512."""
    gram = solvable(gram)
    spectrum = eigenvalues(widest(gram) if gram.device.type == "cpu" else gram).clamp(min=0)
    share = spectrum / (spectrum.sum() + 1e-30)
    return torch.exp(-(share * torch.log(share + 1e-30)).sum())


class Alarm:
    """Says in words that a run collapses, when two checks in a row look like it; once until it recovers.

    asymmetric: only the method's asymmetry forbids collapse, and a batch norm at the projector's end keeps `std` near 1
    (SimSiam): a small fall of it in the first steps, or a larger one later, is then a sign. A falling rank is none:
    BYOL's falls from 41 to 8 and SimSiam's from 47 to 7, healthily.
    """

    def __init__(self, asymmetric: bool = False) -> None:
        self.asymmetric = asymmetric
        self.bad_checks = 0
        self.raised = False
        self.highest_std = 0.0

    def __call__(self, step: int, figures: Mapping[str, float]) -> str | None:
        """The alarm's text at a logged step, or None."""
        why = self._signs(step, figures)
        self.bad_checks = self.bad_checks + 1 if why else 0
        if not why:
            self.raised = False
        if self.bad_checks < ALARM_CHECKS or self.raised:
            return None
        self.raised = True
        return f"step {step}: the run is collapsing: {'; '.join(why)}"

    def _signs(self, step: int, figures: Mapping[str, float]) -> list[str]:
        signs = []
        std = figures.get("std", 1.0)
        self.highest_std = max(self.highest_std, std)
        if std < ALARM_STD:
            signs.append(f"the projections of different images point the same way (std {std:.3f}, healthy near 1)")
        same = figures.get("embedding_std", 1.0)
        if same < 1e-3:
            signs.append(f"the embeddings of different images are equal to {same:.1e} of their size")
        rank = figures.get("effective_rank", ALARM_RANK)
        if rank < ALARM_RANK:
            signs.append(f"the embeddings vary along one direction only (effective rank {rank:.1f})")
        fall = ALARM_FALL if step <= ALARM_STEPS else ALARM_LATER_FALL
        if self.asymmetric and std < fall * self.highest_std:
            signs.append(f"the projections draw together (std from {self.highest_std:.3f} to {std:.3f})")
        if figures["loss"] != figures["loss"]:
            signs.append("the loss is not a number")
        return signs
