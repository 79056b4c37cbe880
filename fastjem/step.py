"""One training step as a module: an encoder, a method, and the momentum copies of what the method names."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.encoders import Encoder, Features, without_drop_path, wrap
from fastjem.methods.combinations import why_not
from fastjem.methods.protocol import Branch, Method
from fastjem.micro_batches import EncoderPass, Passes

TARGET_PARTS = ("projector", "prototypes")  # what makes targets, in any method: copied with the encoder where asked for


class Step(nn.Module):
    """A batch and the number of the step -> the loss and what is noted of it. DDP and torch.compile wrap this.

    Args:
        encoder: an `Encoder`, or any module [B, C, H, W] -> [B, D], which `fastjem.encoders.wrap` makes one of.
        method: made for that width D.
        momentum_encoder: None: as the method says; True gives any method momentum copies of what makes its targets;
            False takes them from a method that is known to learn without, whose targets are the student's own then.

    In a loop of your own: `loss, notes = step(batch, i)`, backward, optimiser, `step.step_ends(i, momentum)`.

    Raises:
        ValueError: where a method that needs its momentum encoder shall do without.
    """

    def __init__(self, encoder: nn.Module, method: Method, momentum_encoder: bool | None = None):
        super().__init__()
        self.encoder = wrap(encoder, method.width, mask_token=method.mask_token)
        self.method = method
        self.passes: Passes | None = None  # within a step by micro-batches (`fastjem.large_batches`)
        name = type(method).__name__
        for part in method.frozen:
            if isinstance(module := getattr(self.encoder.backbone, part, None), nn.Module):
                module.requires_grad_(False)
        if self.encoder.width != method.width:
            raise ValueError(
                f"{name} was made for embeddings of {method.width}, the encoder's have {self.encoder.width}"
            )
        live = self._live()
        for part in (*method.momentum, *method.constant_rate):
            if part not in live:
                raise ValueError(f"{name} has no part {part!r}, which its momentum or constant_rate names")
        copied = method.momentum
        if momentum_encoder and not copied:
            heads = dict(method.named_children())
            copied = ("encoder", *(name for name in TARGET_PARTS if name in heads))
        if momentum_encoder is False and copied:
            if reason := why_not(method, "no_momentum_encoder"):
                raise ValueError(f"{name} {reason}")
            copied = ()
        self.teacher = nn.ModuleDict({name: momentum_copy(live[name]) for name in copied})

    def _live(self) -> dict[str, nn.Module]:
        """The encoder and the method's heads, by the names that their momentum copies have too."""
        return {"encoder": self.encoder, **dict(self.method.named_children())}

    def branches(self, batch: Batch | None = None) -> tuple[Branch, Branch]:
        """Student and teacher; the student itself twice where nothing has a momentum copy.

        Masks of the batch that the method hasn't asked for are the run's: the student sees its views through them, and
        a teacher sees them whole.
        """
        heads = dict(self.method.named_children())
        masked = []
        if batch is not None and not self.method.views.mask:
            masked = [(batch.views[view], mask) for view, mask in batch.masks.items()]
        student = Branch(self.encoder, heads, masked=masked, passes=self.passes)
        if not self.teacher:
            return student, student
        copies = dict(self.teacher.items())
        encoder = cast(Encoder, copies.pop("encoder", self.encoder))
        return student, Branch(encoder, {**heads, **copies}, momentum=True, passes=self.passes)

    def forward(self, batch: Batch | EncoderPass, step: int | Tensor = 0) -> tuple[Tensor, dict[str, Any]] | Features:
        """0-dim loss, and the notes that `fastjem.health.figures` turns into figures; of an `EncoderPass` what the
        encoder makes of it.
        """
        if isinstance(batch, EncoderPass):
            return self.encoder(batch.images, **batch.options)
        if len(batch.views) < self.method.views.large:
            wanted = f"{type(self.method).__name__} compares at least {self.method.views.large} views"
            raise ValueError(f"{wanted}, the batch has {len(batch.views)}")
        if not isinstance(step, Tensor):
            step = torch.tensor(step, device=batch.views[0].device)
        student, teacher = self.branches(batch)
        loss = self.method.loss(student, teacher, batch, step)
        if isinstance(loss, dict):
            terms = {name: self._checked(term, f"term {name!r} of its loss") for name, term in loss.items()}
            student.note(**{f"loss_{name}": term.detach() for name, term in terms.items()})
            loss = torch.stack(list(terms.values())).sum() if terms else None
        return self._checked(loss, "loss"), student.notes

    def _checked(self, loss: object, what: str) -> Tensor:
        """The loss, or a term of it, if it is a number that can be differentiated."""
        if isinstance(loss, Tensor) and loss.dim() == 0:
            return loss
        came = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"{type(self.method).__name__}: the {what} must be a 0-dim tensor, got {came}")

    @torch.no_grad()
    def step_ends(self, step: int | Tensor, momentum: float | Tensor | None) -> None:
        """Once behind the optimiser's step: momentum copies follow, then what the method itself moves.

        Args:
            momentum: None where they have followed already, as an optimiser has them (`attach_teacher`).
        """
        if momentum is not None:
            self.update_teacher(momentum)
        if not isinstance(step, Tensor):
            step = torch.tensor(step)
        self.method.step_ends(step)

    @torch.no_grad()
    def update_teacher(self, momentum: float | Tensor) -> None:
        """`teacher = momentum * teacher + (1 - momentum) * student` for all parameters of all copies at once."""
        if self.teacher:
            F.ema_update_(*self.teacher_and_student(), momentum)

    def teacher_and_student(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of all momentum copies, and those that they follow."""
        live = self._live()
        teacher: list[Tensor] = [p for module in self.teacher.values() for p in module.parameters()]
        return teacher, [p for name in self.teacher for p in live[name].parameters()]


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that nothing trains, and that gives targets of the whole network: without stochastic depth."""
    return without_drop_path(copy.deepcopy(module)).requires_grad_(False)


class StepEnd:
    """The model as the last step left it, whatever a forward pass that was broken off has done to it since.

    A forward pass moves buffers: a batch norm's running statistics. Which ones is seen in the first step, and from then
    on those are copied as each step begins. (Their version counters don't tell: torch's batch norm leaves these alone.)
    """

    def __init__(self, step: nn.Module):
        self.step = step
        self.moved: list[Tensor] | None = None  # by a forward pass; None before the first
        self.copies: list[Tensor] = []
        self.before: dict[str, tuple[Tensor, Tensor]] = {}  # in the first step: a buffer and a copy of it, by name
        self.replaced = False  # some buffer is a new tensor after each forward pass, which can't be followed
        self.in_forward = False
        self.torn = False  # a step is changing the weights

    def begins(self) -> None:
        """Before a step's first forward pass."""
        if self.moved is None:
            self.before = {name: (x, x.detach().clone()) for name, x in self.step.named_buffers()}
        elif self.moved:
            torch._foreach_copy_(self.copies, self.moved)
        self.in_forward = True

    def moves(self) -> None:
        """Behind its last backward pass: now the weights change."""
        if self.moved is None:
            now = dict(self.step.named_buffers())
            self.replaced = any(x is not self.before.get(name, (None,))[0] for name, x in now.items())
            self.moved = [x for x, copied in self.before.values() if not torch.equal(x, copied)]
            self.copies = [x.detach().clone() for x in self.moved]
            self.before = {}
        self.torn = True

    def ends(self) -> None:
        """Behind the step."""
        self.torn = False
        self.in_forward = False

    @torch.no_grad()
    def restore(self) -> bool:
        """Undo a forward pass that was broken off; whether the model is that of a step's end now."""
        if self.torn or (self.in_forward and self.replaced):
            return False
        if self.in_forward and self.moved:
            torch._foreach_copy_(self.moved, self.copies)
        self.in_forward = False
        return True
