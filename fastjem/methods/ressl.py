"""ReSSL: Zheng et al. 2021, arXiv 2107.09282."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset, at_most
from fastjem.methods.protocol import About, Branch, Codes, Method, RunFacts
from fastjem.methods.prototypes import cross_entropy_of_features
from fastjem.methods.reasons import OF_A_QUEUE
from fastjem.methods.symmetric import without_target
from fastjem.nn.parts import MLP, Queue, unit_keys


class ReSSL(Method):
    """How a strongly augmented view is related to earlier images must be how the momentum encoder relates a weakly
    augmented one to them: two distributions over a queue, the target's sharper.
    """

    about = About(
        "self-distillation", "sharp relations to a queue of earlier images", "Zheng et al. 2021, arXiv 2107.09282"
    )
    views = Views(large=2, recipe="ressl")
    combines = frozenset({"small_views"})
    projector_options = ("hidden", "dim")
    refuses = {
        **OF_A_QUEUE,
        "large_views": "has one target an image, the view that is hardly changed; --small-views gives it more queries",
    }
    momentum = ("encoder", "projector")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "sgd",
        0.05,
        1e-4,
        momentum=0.999,
        final_momentum=0.999,
        warmup_epochs=5,
        least_momentum=0.99,
        short=("lars", 1.2),
        small=("adamw", 1e-3),
        source="section 4: SGD, 0.05 at batch 256, wd 1e-4, momentum encoder 0.999",
    )
    presets = {
        "cifar": Preset(
            "solo-learn, scripts/pretrain/cifar/ressl.yaml",
            Defaults("sgd", 0.05, 1e-4, momentum=0.99, warmup_epochs=5),
            {"queue": 65536, "dim": 256},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 4096,
        dim: int = 512,
        queue: int = 131072,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        norm: str = "none",
    ):
        super().__init__(width, run)
        ranges.positive("ressl", temperature=temperature, teacher_temperature=teacher_temperature)
        widths = self.projector_widths(hidden, dim)
        dim = widths[-1]
        self.projector = MLP(width, *widths, norm=norm)
        length = at_most(queue, run.images, each=4)
        self.queue = Queue(length, dim, held=run.images_per_step or length)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        queries = without_target(batch.views)
        query = normalize(student.project(queries), dim=1)
        with torch.no_grad():
            key = normalize(teacher.project(batch.views[1:2]), dim=1)
            keys = unit_keys(key, self.run.group)
            earlier = self.queue.begin(keys).to(key.dtype)
            self.queue.hold(keys)
        no_bias = torch.zeros(earlier.shape[0], device=earlier.device)
        student.note(codes=Codes(key, earlier, no_bias, self.teacher_temperature))
        loss, _ = cross_entropy_of_features(
            [query],
            [key.repeat(len(queries), 1)],
            earlier,
            earlier,
            student_temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            teacher_bias=no_bias,
            pairs="same",
        )
        return loss

    def step_ends(self, step: Tensor) -> None:
        self.queue.step_ends()
