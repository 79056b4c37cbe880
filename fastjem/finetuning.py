"""The training of a classifier: augmented images with their labels, schedule and loop, by timm's parts."""

import io
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastjem import classifiers
from fastjem.checkpoints import write_atomically
from fastjem.data.picture import Bands, Picture
from fastjem.data.pixels import Pixels, whole_image
from fastjem.data.sharing import check_semaphores, share
from fastjem.data.size import height_and_width
from fastjem.data.source import Levelled, Source, decode, path_of, reason
from fastjem.errors import UserError
from fastjem.printing import say

LOGGED_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Augmentation:
    """What is done to images in training; `whole`: nothing of it, each is seen as it is in a test."""

    scale: float = 0.08  # the least share of an image's area that is cut out
    auto: str = ""  # timm's name of a policy: "rand-m9-mstd0.5-inc1"
    erase: float = 0.0  # the probability that a rectangle is erased
    mixup: float = 0.0  # alpha of the Beta distribution; 0: none
    cutmix: float = 0.0
    smoothing: float = 0.0  # of labels
    whole: bool = False


# "strong" is what MAE (He et al. 2022, arXiv 2111.06377, table 9) trains vision transformers with for 50 to 100 epochs.
AUGMENTATIONS = {
    "light": Augmentation(smoothing=0.1),
    "strong": Augmentation(auto="rand-m9-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1),
    "none": Augmentation(whole=True),
}


@dataclass(frozen=True)
class Plan:
    """Every number of a training."""

    epochs: int
    batch: int
    rate: float  # at its highest
    warmup: int  # steps
    steps: int
    optimizer: str
    weight_decay: float
    layer_decay: float  # 1: all layers learn alike
    clip: float  # 0: none
    linear: bool  # the head alone learns
    augmentation: Augmentation
    seed: int
    save_every: float  # seconds


class Images(Dataset):
    """(epoch, image) -> (an augmented image [C, H, W] float32 as the encoder takes it, its label); a text in place of
    what can't be read. What is drawn for an image depends on (seed, epoch, image) alone.
    """

    def __init__(self, source: Source, pixels: Pixels, augmentation: Augmentation, seed: int):
        self.source = Levelled(source, pixels.levels)
        self.labels = np.asarray(source.labels, np.int64)
        self.pixels = pixels
        self.augmentation = augmentation
        self.seed = seed
        self.transform = None if augmentation.whole else _transform(pixels, augmentation)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, sample = key
        seed_all(self.seed, epoch, sample)
        path = path_of(self.source, sample)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of harmless EXIF trouble
                return self._augmented(decode(self.source, sample)), int(self.labels[sample])
        except Exception as error:  # whatever a decoder may raise on a broken file
            return f"{path}: {reason(error, path)}"

    def _augmented(self, image: Picture) -> Tensor:
        size = self.pixels.size
        if self.transform is not None and not isinstance(image, Bands):
            return self.transform(image)
        if self.augmentation.whole:
            levels = whole_image(image, size).float()
        else:  # of more than 8 bits, or other channels than three: timm's policies are for Pillow's images in colour
            from torchvision.transforms import v2

            cut = v2.RandomResizedCrop(height_and_width(size), scale=(self.augmentation.scale, 1.0), antialias=True)
            values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(image), 2, 0)))
            levels = v2.RandomHorizontalFlip()(cut(values))
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.pixels.mean, self.pixels.std))
        return (levels / 255 - mean) / std


def _transform(pixels: Pixels, augmentation: Augmentation) -> Callable[[Any], Tensor]:
    from timm.data import create_transform

    return cast(
        Callable[[Any], Tensor],
        create_transform(
            (pixels.channels, *height_and_width(pixels.size)),
            is_training=True,
            scale=(augmentation.scale, 1.0),
            color_jitter=0.0,
            auto_augment=augmentation.auto or None,
            re_prob=augmentation.erase,
            re_mode="pixel",
            interpolation="bilinear",
            mean=tuple(pixels.mean),
            std=tuple(pixels.std),
        ),
    )


def seed_all(*numbers: int) -> None:
    """Seed what timm draws from: Python's, NumPy's and torch's generators."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _together(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor | None, Tensor, list[str]]:
    found = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in found]) if found else None
    labels = torch.tensor([label for _, label in found])
    share([labels] if images is None else [images, labels])
    return images, labels, [item for item in items if isinstance(item, str)]


def steps_per_epoch(images: int, batch: int) -> int:
    """Whole batches; one of all images where there are fewer than a batch."""
    return max(images // batch, 1)


def _batches(chosen: np.ndarray, plan: Plan, start: int) -> Iterator[list[tuple[int, int]]]:
    """The (epoch, image) keys of each step from `start` on; each epoch's order is drawn by (seed, epoch)."""
    each = steps_per_epoch(len(chosen), plan.batch)
    for epoch in range(start // each, plan.epochs):
        order = np.random.default_rng([plan.seed, epoch]).permutation(chosen)
        for i in range(start % each if epoch == start // each else 0, each):
            yield [(epoch, int(sample)) for sample in order[i * plan.batch : (i + 1) * plan.batch]]


def few(labels: np.ndarray, chosen: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Of the chosen images `percent` of each class, at least one, drawn by the seed; in their order."""
    kept = []
    for label in np.unique(labels[chosen]):
        of_class = chosen[labels[chosen] == label]
        count = max(round(len(of_class) * percent / 100), 1)
        kept.append(np.random.default_rng([seed, int(label)]).choice(of_class, count, replace=False))
    return np.sort(np.concatenate(kept))


class Training:
    """A classifier, its optimizer and schedule, and how far it came: `train` takes the steps that are left.

    Args:
        module: on its device.
        chosen: the images of the source that are trained on.
        path: of the checkpoint, which is read if it is there.
        identity: what decides the result, by name; a checkpoint of another one is refused.

    Raises:
        UserError: for such a checkpoint, naming what is different.
    """

    def __init__(
        self,
        module: nn.Module,
        source: Source,
        chosen: np.ndarray,
        pixels: Pixels,
        plan: Plan,
        path: Path,
        identity: dict[str, str],
    ):
        self.module = module
        self.chosen = chosen
        self.plan = plan
        self.path = path
        self.identity = identity
        self.images = Images(source, pixels, plan.augmentation, plan.seed)
        self.classes = len(source.classes)
        self.device = next(module.parameters()).device
        self.norm: nn.BatchNorm1d | None = None
        if plan.linear:
            module.requires_grad_(False)
            self.norm = normalised(classifiers.head_of(module).requires_grad_(True)).to(self.device)
        self.optimizer, self.scheduler = _optimizer(module, plan)
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.unreadable: set[str] = set()
        if path.exists():
            self._take(torch.load(path, map_location="cpu", weights_only=True))

    def _take(self, state: dict[str, Any]) -> None:
        before = state["identity"]
        other = [name for name in {**before, **self.identity} if before.get(name) != self.identity.get(name)]
        if other:
            changes = ", ".join(f"{name} was {before.get(name)} and is {self.identity.get(name)}" for name in other)
            raise UserError(
                f"{self.path.parent} holds another training that isn't finished ({changes}): the same command goes on "
                "with it, --overwrite begins anew"
            )
        self.module.load_state_dict(state["model"])
        if self.norm is not None:
            self.norm.load_state_dict(state["norm"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.history = state["history"]
        self.unreadable = set(state["unreadable"])
        say(f"fastjem: it goes on behind step {self.step} of {self.plan.steps}")

    def save(self) -> None:
        """OSError where the disk refuses it; the one before is then still there."""
        buffer = io.BytesIO()
        state = {
            "identity": self.identity,
            "model": self.module.state_dict(),
            "norm": None if self.norm is None else self.norm.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "unreadable": sorted(self.unreadable),
        }
        torch.save(state, buffer)
        write_atomically(self.path, buffer.getvalue())

    def train(self, workers: int) -> None:
        """All steps that are left; then the module is as it is tested and kept.

        Raises:
            UserError: where not one image can be read, or the loss isn't finite any more.
        """
        check_semaphores(workers)
        loader = DataLoader(
            self.images,
            batch_sampler=cast(Any, _batches(self.chosen, self.plan, self.step)),
            num_workers=workers,
            collate_fn=_together,
        )
        mix = self._mix()
        each = steps_per_epoch(len(self.chosen), self.plan.batch)
        saved = logged = begin = time.monotonic()
        spent = self.seconds
        losses: list[Tensor] = []
        try:
            for images, labels, texts in loader:
                self._say_unreadable(texts)
                if images is not None and len(images) > 1:
                    losses.append(self._step(images, labels, mix))
                self.step += 1
                self.seconds = spent + time.monotonic() - begin
                ends = self.step % each == 0
                if ends or time.monotonic() - logged > LOGGED_EVERY:
                    loss = self._loss(losses)
                    logged = time.monotonic()
                    if ends:
                        self._epoch_ends(loss)
                        losses = []
                    left = self.seconds / self.step * (self.plan.steps - self.step) / 60
                    where = f"step {self.step}/{self.plan.steps}  epoch {self.step / each:.1f}"
                    say(f"{where}  loss {loss:.3f}  {left:.1f} min left")
                if time.monotonic() - saved > self.plan.save_every and self.step < self.plan.steps:
                    self.save()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            self.save()
            raise
        if self.norm is not None:
            fold(self.norm, classifiers.head_of(self.module))
        self.module.eval()

    def _say_unreadable(self, texts: Sequence[str]) -> None:
        for text in texts:
            if text not in self.unreadable:
                say(f"fastjem: left out: {text}")
                self.unreadable.add(text)
        if len(self.unreadable) == len(self.chosen):
            raise UserError(f"none of the images can be read; the first: {min(self.unreadable)}")

    def _loss(self, losses: Sequence[Tensor]) -> float:
        """The mean since the epoch's beginning, or since it was gone on with."""
        loss = float(torch.stack(list(losses)).mean()) if losses else float("nan")
        if losses and not np.isfinite(loss):
            raise UserError(f"the loss isn't finite at step {self.step}; a smaller --learning-rate may help")
        return loss

    def _epoch_ends(self, loss: float) -> None:
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        self.history.append({"epoch": len(self.history) + 1, "loss": loss, "learning_rate": rate})

    def _mix(self) -> Any:
        """timm's mixup and cutmix of a batch, one or the other; None for neither."""
        given = self.plan.augmentation
        if not (given.mixup or given.cutmix):
            return None
        from timm.data import Mixup

        return Mixup(
            mixup_alpha=given.mixup,
            cutmix_alpha=given.cutmix,
            label_smoothing=given.smoothing,
            num_classes=self.classes,
        )

    def _step(self, images: Tensor, labels: Tensor, mix: Any) -> Tensor:
        from timm.loss import SoftTargetCrossEntropy

        plan = self.plan
        seed_all(plan.seed, plan.epochs, self.step)  # mixup, dropout, stochastic depth: the same however it is resumed
        images, labels = images.to(self.device), labels.to(self.device)
        self.module.train(not plan.linear)
        self.scheduler.step_update(self.step)
        smoothing = plan.augmentation.smoothing
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if mix is None:
                loss = nn.functional.cross_entropy(self.module(images), labels, label_smoothing=smoothing)
            else:
                even = len(images) // 2 * 2  # it mixes pairs
                images, targets = mix(images[:even], labels[:even])
                loss = SoftTargetCrossEntropy()(self.module(images), targets)
        self.optimizer.zero_grad()
        loss.backward()
        if plan.clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), plan.clip)
        self.optimizer.step()
        return loss.detach()


def normalised(head: nn.Linear) -> nn.BatchNorm1d:
    """A norm without weights before a head, as linear heads are trained whatever the scale of the embeddings is (He et
    al. 2022, MAE, appendix A.1): a hook of the head's, until `fold` makes both one layer. It averages over all batches.
    """
    norm = nn.BatchNorm1d(head.in_features, eps=1e-6, momentum=cast(Any, None), affine=False)
    norm.hook = head.register_forward_pre_hook(lambda _, inputs: (norm(inputs[0]),))  # type: ignore[assignment]
    return norm


@torch.no_grad()
def fold(norm: nn.BatchNorm1d, head: nn.Linear) -> None:
    """The head alone becomes what norm and head are in eval mode: W x / s + b - W m / s."""
    assert norm.running_mean is not None and norm.running_var is not None
    cast(Any, norm.hook).remove()
    head.weight.div_((norm.running_var + norm.eps).sqrt())
    head.bias.sub_(head.weight @ norm.running_mean)


def _optimizer(module: nn.Module, plan: Plan) -> tuple[torch.optim.Optimizer, Any]:
    """timm's optimizer and cosine schedule; no weight decay of biases and norms."""
    from timm.optim import create_optimizer_v2, param_groups_layer_decay
    from timm.scheduler import CosineLRScheduler

    groups: Any = module
    exempt = getattr(module, "no_weight_decay", lambda: set())()
    options: dict[str, Any] = {"weight_decay": plan.weight_decay}
    if plan.layer_decay != 1 and not plan.linear:
        groups = param_groups_layer_decay(module, plan.weight_decay, exempt, layer_decay=plan.layer_decay)
        options = {"weight_decay": 0.0}  # each group has its own
    try:
        optimizer = create_optimizer_v2(groups, plan.optimizer, lr=plan.rate, **options)
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise UserError(f"--optimizer {plan.optimizer}: timm says: {error}") from None
    scheduler = CosineLRScheduler(
        optimizer, t_initial=max(plan.steps - plan.warmup, 1), lr_min=plan.rate / 100, warmup_t=plan.warmup,
        warmup_lr_init=plan.rate / 100, warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    return optimizer, scheduler


def augmentation(name: str, changes: dict[str, Any], size: int) -> Augmentation:
    """One of `AUGMENTATIONS` with other values where they are given (None: as it is). Of images of 64 pixels and less
    at least half of the area is cut out, where nothing is said: less of them shows nothing.
    """
    found = AUGMENTATIONS[name]
    if size <= 64:
        found = replace(found, scale=0.5)
    return replace(found, **{key: value for key, value in changes.items() if value is not None})


__all__ = ["AUGMENTATIONS", "Augmentation", "Images", "Plan", "Training", "augmentation", "few", "steps_per_epoch"]
