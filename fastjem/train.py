"""One training step as a module, and the loop around it."""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem import optim
from fastjem.methods._parts import Parts

# SimSiam of CIFAR images: std falls below 0.95 of its height by step 20 to 45 without stop-gradient (batches of 64 and
# 128, SGD and LARS, two encoders), and with it never below 0.97 in 50 steps and 0.94 in 468. The projections' rank
# falls in both, and further in those that learn more.
ALARM_STD, ALARM_RANK, ALARM_CHECKS = 0.1, 1.2, 2
ALARM_STEPS, ALARM_FALL, ALARM_LATER_FALL = 50, 0.95, 0.7


class Step(nn.Module):
    """An encoder, a method and its momentum copies: views -> (loss, what was seen). DDP and torch.compile wrap this.

    Args:
        encoder: any module [B, 3, H, W] -> [B, D].
        method: a method of `fastjem.methods`, made for that width D.
        momentum_encoder: None: as the method says; True gives any method momentum copies of what makes its targets.

    In a loop of your own: `loss, seen = step(views, i)`, backward, optimiser, `step.update_teacher(momentum)`.
    """

    def __init__(self, encoder: nn.Module, method: nn.Module, momentum_encoder: bool | None = None):
        super().__init__()
        self.encoder, self.method = encoder, method
        names = tuple(method.ema)
        if momentum_encoder and not names:
            names = ("encoder", *(name for name in ("projector", "prototypes") if hasattr(method, name)))
        if momentum_encoder is False and names:
            raise ValueError(f"{type(method).__name__} can't do without its momentum encoder")
        live = {"encoder": encoder, **dict(method.named_children())}
        self.teacher = nn.ModuleDict({name: copy.deepcopy(live[name]).requires_grad_(False) for name in names})

    def forward(self, views: Sequence[Tensor], step: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """V tensors [B, 3, H, W], large ones first, and the number of the step -> 0-dim loss, figures for `health`."""
        if not isinstance(step, Tensor):
            step = torch.tensor(step, device=views[0].device)
        heads = dict(self.method.named_children())
        student = Parts(self.encoder, heads)
        teacher = student
        if self.teacher:
            copies = dict(self.teacher.items())
            teacher = Parts(copies.pop("encoder", self.encoder), {**heads, **copies})
        loss = self.method.loss(student, teacher, list(views), step)
        return loss, student.seen

    @torch.no_grad()
    def update_teacher(self, momentum: float | Tensor) -> None:
        """`teacher = momentum * teacher + (1 - momentum) * student` for all parameters of all copies at once."""
        if not self.teacher:
            return
        live = {"encoder": self.encoder, **dict(self.method.named_children())}
        pairs = [
            pair
            for name, module in self.teacher.items()
            for pair in zip(module.parameters(), live[name].parameters(), strict=True)
        ]
        F.ema_update_([t for t, _ in pairs], [s for _, s in pairs], momentum)


@torch.no_grad()
def health(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """0-dim figures of collapse.

    `std`: of the unit-length projections per dimension, times sqrt(D): 1 for directions spread evenly, 0 for a point.
    `embedding_std`: the embeddings' deviation over the batch as a share of their size.
    `projection_rank`, `effective_rank` of projections and embeddings: exp of the entropy of the covariance's spectrum,
    at most min(B, D).
    `teacher_entropy`, as a share of log K, and `prototype_usage`, the share of prototypes that the batch could use.
    """
    out = {}
    if "projection" in seen:
        z = nn.functional.normalize(seen["projection"].float(), dim=1)
        out["std"] = z.std(0, correction=0).square().sum().sqrt()
        out["projection_rank"] = _rank(z)
    x = seen["embedding"].float()
    out["embedding_std"] = (x - x.mean(0)).square().sum(1).mean().sqrt() / (x.square().sum(1).mean().sqrt() + 1e-12)
    out["effective_rank"] = _rank(x)
    if "codes" in seen:
        log_p = seen["codes"][:512].float().log_softmax(1)
        prototypes = log_p.shape[1]
        out["teacher_entropy"] = -(log_p.exp() * log_p).sum(1).mean() / torch.tensor(float(prototypes)).log()
        used = torch.zeros(prototypes, device=log_p.device).index_fill_(0, log_p.argmax(1), 1.0)
        out["prototype_usage"] = used.sum() / min(prototypes, len(log_p))
    return out


def _rank(x: Tensor) -> Tensor:
    """exp of the entropy of the covariance's spectrum, over the first 512 rows."""
    x = x[:512]
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    # An eigensolver waits for a GPU's result: figures of health belong to logged steps only.
    spectrum = torch.linalg.eigvalsh(gram.double() if gram.device.type == "cpu" else gram).clamp(min=0)
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
        self.bad, self.raised, self.most = 0, False, 0.0

    def __call__(self, step: int, figures: dict[str, float]) -> str | None:
        why, std = [], figures.get("std", 1.0)
        self.most = max(self.most, std)
        if std < ALARM_STD:
            why.append(f"the projections of different images point the same way (std {std:.3f}, healthy near 1)")
        if figures["embedding_std"] < 1e-3:
            why.append(f"the embeddings of different images are equal to {figures['embedding_std']:.1e} of their size")
        if figures["effective_rank"] < ALARM_RANK:
            why.append(f"the embeddings vary along one direction only (effective rank {figures['effective_rank']:.1f})")
        if self.asymmetric and std < (ALARM_FALL if step <= ALARM_STEPS else ALARM_LATER_FALL) * self.most:
            why.append(f"the projections draw together (std from {self.most:.3f} to {std:.3f})")
        if figures["loss"] != figures["loss"]:
            why.append("the loss is not a number")
        self.bad = self.bad + 1 if why else 0
        if not self.bad:
            self.raised = False
        if self.bad < ALARM_CHECKS or self.raised:
            return None
        self.raised = True
        return f"step {step}: the run is collapsing: {'; '.join(why)}"


def check_encoder(encoder: nn.Module, views: Tensor) -> int:
    """The width D of the encoder's embeddings; ValueError if they aren't [B, D], not finite, or all the same."""
    training = encoder.training
    state = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    with torch.no_grad():
        x = encoder.train()(views)
        for name, buffer in encoder.named_buffers():
            buffer.copy_(state[name])
    encoder.train(training)
    if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != len(views):
        came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"the encoder must map [B, 3, H, W] to [B, D], got {came} for {tuple(views.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError("the encoder's embeddings of real images are not finite before the first step")
    spread = (x.float() - x.float().mean(0)).abs().max()
    if spread <= 1e-6 * x.float().abs().max():
        raise ValueError(
            "the encoder gives every image the same embedding: its gradient is zero, and no step could change that "
            "(a last layer initialised with zeros, or dead activations?)"
        )
    return x.shape[1]


Log = dict[str, Any]


def loop(
    model: nn.Module,
    step_module: Step,
    optimizer: torch.optim.Optimizer,
    schedule: optim.Schedule,
    batches: Iterable[tuple[list[Tensor], float]],
    *,
    start: int = 0,
    accumulate: int = 1,
    clip: float = 0.0,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    rank: int = 0,
    log_every: int = 10,
    on_log: Callable[[int, Log], None] = lambda step, log: None,
    after_step: Callable[[int, Callable[[], None]], bool] = lambda done, flush: False,
) -> int:
    """Train until the batches end or `after_step(steps done, flush)` says stop; the number of steps done.

    Args:
        model: what is called: `step_module`, or DDP or a compiled module around it.
        batches: (views on the device, seconds waited for them); `accumulate` of them make one step.
        on_log: gets the figures of a logged step, one logged step late, so that no step waits for the device.
        after_step: calls `flush()` before it writes a checkpoint: the figures up to that step are then logged.
    """
    device = next(step_module.parameters()).device
    parameters = [p for p in step_module.parameters() if p.requires_grad]
    momentum = torch.zeros((), dtype=torch.float64, device=device)
    number = torch.zeros((), dtype=torch.long, device=device)
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    pending: tuple[int, list[str], Tensor, Any, Log] | None = None
    done, waited, since = start, 0.0, time.perf_counter()
    batches, steps_since = iter(batches), 0

    def flush() -> None:
        nonlocal pending
        if pending is not None:
            step, names, values, event, log = pending
            if event is not None:
                event.synchronize()
            on_log(step, {**log, **dict(zip(names, values.tolist(), strict=True))})
            pending = None

    model.train()
    while done < schedule.steps:
        # Masks, dropout and drop path depend on (seed, step, rank) alone: a resumed run needs no saved generator.
        # Not torch.manual_seed: where CUDA hasn't started it formats a stack trace, 0.46 ms.
        for generator in generators:
            generator.manual_seed((seed * 1_000_003 + done) * 4099 + rank)
        now = schedule.apply(optimizer, done)
        number.fill_(done)
        optimizer.zero_grad(set_to_none=True)
        losses, seen = [], {}
        for part in range(accumulate):
            views, wait = next(batches)
            waited += wait
            last = part == accumulate - 1
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    loss, seen = model(views, number)
                (loss / accumulate).backward()
            losses.append(loss.detach())
        norm = optim.clip_(parameters, clip) if clip else None
        optimizer.step()
        momentum.fill_(now["momentum"].item())
        step_module.update_teacher(momentum)
        done, steps_since = done + 1, steps_since + 1
        if done % log_every == 0 or done == schedule.steps or (done < 100 and done % 5 == 0):  # collapse is early
            flush()
            figures = {"loss": torch.stack(losses).mean(), **health(seen)}
            if norm is not None:
                figures["gradient_norm"] = norm
            values, event = torch.stack([value.float() for value in figures.values()]), None
            if device.type == "cuda":
                values = values.to("cpu", non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            elapsed = time.perf_counter() - since
            images = len(views[0]) * accumulate * steps_since
            log = {key: value.item() for key, value in now.items()}
            log |= {"images_per_second": images / elapsed, "data_wait": min(waited / elapsed, 1.0)}
            pending = (done, list(figures), values, event, log)
            waited, steps_since, since = 0.0, 0, time.perf_counter()
            if device.type == "cpu":
                flush()
        if after_step(done, flush):
            break
    flush()
    return done
