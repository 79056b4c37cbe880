"""What doesn't fit a method is refused by its name, in words."""

import re

import pytest
import torch
from test_methods import Tiny, make, small_options

from fastjem import encoders
from fastjem.errors import UserError
from fastjem.given import open_weights
from fastjem.methods import METHODS, RunFacts, needs_patches, options_of
from fastjem.methods.protocol import option_types
from fastjem.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    ("pirl", {"share": 1.5}, "pirl: share must be between 0 and 1, got 1.5"),
    ("pirl", {"memory": -0.1}, "pirl: memory must be between 0 and 1, got -0.1"),
    ("lejepa", {"weight": 2.0}, "lejepa: weight must be between 0 and 1, got 2.0"),
    ("mae", {"mask": 1.0}, "mae: mask must be a share between 0 and 1, got 1.0"),
    ("msn", {"mask": 0.0}, "msn: mask must be a share between 0 and 1, got 0.0"),
    ("pmsn", {"mask": 1.0}, "pmsn: mask must be a share between 0 and 1, got 1.0"),
    ("capi", {"predicted": 0.0}, "capi: mask and predicted must be shares above 0, got"),
    ("capi", {"iterations": 0}, "CAPILoss: sinkhorn_iterations must be at least 1, got 0"),
    ("ibot", {"centring": "median"}, "ibot: centring must be mean or sinkhorn, got 'median'"),
    ("dinov2", {"mask": 0.1, "least_mask": 0.3}, "dinov2: 0 <= least_mask <= mask <= 1 must hold"),
    ("dinov3", {"masked_images": 0.0}, "dinov3: masked_images must be a share above 0, got 0.0"),
    ("simdino", {"expansion": "both"}, "simdino: expansion must be student or mean, got 'both'"),
    ("all4one", {"dim": 9}, "all4one: dim must be a multiple of its 2 heads, got 9"),
    ("wmse", {"dim": 8, "whitening_size": 8}, "wmse: a part of the batch must have at least 2 dim = 16 images"),
    ("ijepa", {"predictor_width": 10}, "a predictor's width must be a multiple of its 2 heads and of 4, got 10"),
    ("distill", {"loss": "l1"}, "distill: loss must be cosine or mse, got 'l1'"),
    ("mocov3", {"norm": "group"}, "MLP: norm must be one of batch, layer, none, got 'group'"),
]


# By what an option is called: the same name means the same in all methods.
SHARES = {
    "centre_momentum",
    "least_mask",
    "masked_images",
    "gram_from",
    "share",
    "memory",
    "alpha",
    "dropout",
    "predicted",
}
SHARES |= {"mask", "weight"}
ABOVE_0 = {"epsilon", "sharpen", "eps", "t_max", "most"}
AT_LEAST_0 = {
    "lambda_param",
    "scale",
    "invariance",
    "variance",
    "covariance",
    "sigma",
    "rho",
    "local",
    "koleo",
    "power",
}
AT_LEAST_0 |= {"gram_weight", "patch_weight", "coefficient", "regularization", "shape", "center"}
AT_LEAST_0 |= {"frozen_epochs", "warmup_epochs"}
OTHERS = {
    ("data2vec", "beta"): AT_LEAST_0,
    ("tico", "beta"): SHARES,
    ("smog", "beta"): SHARES,
    ("wmse", "eps"): AT_LEAST_0,
}


def float_options() -> list[tuple[str, str]]:
    return [
        (name, option)
        for name, kind in METHODS.items()
        for option in options_of(kind)
        if float in option_types(kind, option)
    ]


@pytest.mark.parametrize("name, option", float_options(), ids=lambda x: x)
def test_no_number_out_of_its_range_is_taken_without_a_word(name: str, option: str) -> None:
    """Every option of every method that is a number with a fraction, by what it is; a new one must be said here."""
    kind = OTHERS.get((name, option))
    if kind is None:
        found = [group for group in (SHARES, ABOVE_0, AT_LEAST_0) if option in group]
        kind = ABOVE_0 if option.endswith("temperature") else found[0] if found else None
    wrong = [float("nan"), float("inf"), -float("inf")]
    if kind is not None:
        wrong += [-0.1, *([1.1] if kind is SHARES else []), *([0.0] if kind is ABOVE_0 else [])]
    else:
        assert option == "bias"
    for value in wrong:
        with pytest.raises(ValueError, match=rf"{name}: .*\b{option}\b.*must .*got .*{value}"):
            make(name, **{option: value})


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_of_options_is_of_its_own(name: str) -> None:
    """`fastjem methods NAME` explains options by their names."""
    said = " ".join((METHODS[name].__doc__ or "").split("\n\n")[-1].split())
    named = re.findall(r"(?:^|\. )((?:[a-z_]+, )*[a-z_]+): ", said)
    options = {option for names in named for option in names.split(", ")}
    assert options <= set(options_of(METHODS[name])), options


@pytest.mark.parametrize("name, options, message", OPTIONS, ids=[f"{name}-{o}" for name, o, _ in OPTIONS])
def test_options_out_of_range(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as told:
        make(name, **options)
    assert message in str(told.value)


NEED_PATCHES = [name for name, kind in METHODS.items() if needs_patches(kind)]


@pytest.mark.parametrize("name", NEED_PATCHES)
def test_masked_methods_refuse_an_encoder_without_patches(name: str) -> None:
    _, batch = make(name)
    method = METHODS[name](12, RunFacts(image_size=32, patch=8), **small_options(name))
    other = Step(encoders.wrap(Tiny(), 12), method)
    with pytest.raises(ValueError, match=r"masked patches need a vision transformer|Tiny has no transformer blocks"):
        other(batch, 0)


def test_vicregl_refuses_an_encoder_without_a_feature_map() -> None:
    _, batch = make("vicregl")
    step = Step(encoders.wrap(Tiny(), 12), METHODS["vicregl"](12, **small_options("vicregl")))
    with pytest.raises(ValueError, match="Tiny has no forward_features and forward_head"):
        step(batch, 0)


@pytest.mark.parametrize("name", ["", "nowhere", "resnet18", "/no/such/file.safetensors"])
def test_what_names_no_weights_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="names no encoder with weights"):
        open_weights(name)
    with pytest.raises(UserError, match="names no encoder with weights"):
        make("distill", given=name)


def test_fewer_images_than_clusters_are_clustered_by_as_many_as_can_be() -> None:
    """By default a run has at most one cluster for 16 images, and at least 8; of fewer images k-means says so."""
    step, _ = make("deepcluster", run=RunFacts(images=4, batch=4), prototypes=3000)
    for memory in step.method.memories:
        memory.written.fill_(True)
    with pytest.raises(ValueError, match="kmeans: clusters must be at most the rows, got 8 for 4 rows"):
        step.method.epoch_begins(1)
    step, _ = make("deepcluster", run=RunFacts(images=64, batch=8), prototypes=3000)
    for memory in step.method.memories:
        memory.written.fill_(True)
    step.method.epoch_begins(1)
    assert step.method.centroids.shape[1] == 8 and int(step.method.assignments.max()) < 8


def test_supcon_needs_labels() -> None:
    assert METHODS["supcon"].needs_labels
    step, batch = make("supcon")
    with pytest.raises(ValueError, match="labels"):
        step(batch._replace(labels=torch.zeros(3, dtype=torch.long)), 0)
