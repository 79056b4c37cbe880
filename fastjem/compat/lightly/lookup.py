"""How lightly's sub-modules are found here: its packages are real modules; the many files within them are looked up.

`fastjem.compat.lightly.loss` is a file, which type checkers read. `fastjem.compat.lightly.loss.ntx_ent_loss` has none:
it is made when `fastjem.compat.lightly` is imported, from the table below, and its names are those of the file.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

ROOT = "fastjem.compat.lightly"

# lightly's files, by the package here that has their names. One that isn't here says so when it is asked for.
FILES = {
    "loss": (
        "barlow_twins_loss capi_loss dcl_loss dense_relational_utils detcon_loss dino_loss directclr_loss emp_ssl_loss "
        "frossl_loss hypersphere_loss ibot_loss koleo_loss lejepa_loss lewm_loss macl_loss memory_bank mmcr_loss "
        "msn_loss negative_cosine_similarity ntx_ent_loss patch_kernel_alignment_loss pmsn_loss regularizer "
        "regularizer.co2 regularizer.dse swav_loss sym_neg_cos_sim_loss tico_loss vicreg_loss vicregl_loss visreg_loss "
        "wmse_loss latent_distance"
    ),
    "models.modules": (
        "capi_predictor_timm center heads heads_timm ijepa ijepa_timm masked_autoencoder masked_autoencoder_timm "
        "masked_causal_vision_transformer masked_vision_transformer masked_vision_transformer_decoder "
        "masked_vision_transformer_decoder_timm masked_vision_transformer_timm masked_vision_transformer_torchvision "
        "memory_bank nn_memory_bank world_model world_model.conditioning world_model.predictor"
    ),
    "models": "batchnorm resnet zoo",
    "transforms": (
        "add_grid_transform aim_transform amplitude_rescale_transform byol_transform capi_transform densecl_transform "
        "detcon_transform dino_transform fast_siam_transform fda_transform gaussian_blur "
        "gaussian_mixture_masks_transform ibot_transform ijepa_transform image_grid_transform irfft2d_transform jigsaw "
        "mae_transform mmcr_transform moco_transform msn_transform multi_crop_transform multi_view_transform "
        "multi_view_transform_v2 phase_shift_transform pirl_transform random_crop_and_flip_with_grid "
        "random_frequency_mask_transform rfft2d_transform rotation simclr_transform simsiam_transform smog_transform "
        "solarize swav_transform tico_transform torchvision_v2_compatibility utils vicreg_transform vicregl_transform "
        "wmse_transform"
    ),
    "data": "ijepa_collate multi_view_collate dataset collate",
    "utils": "benchmarking bounding_box cropping embeddings_2d io reordering",
}

# What lightly 1.6.0 has and we haven't -> what to do instead.
FREQUENCIES = "it changes an image's frequencies, which no recipe here does; use lightly's in front of a recipe"
TORCHVISION = "it is torchvision's: use torchvision.transforms.v2"
WORLD = "part of a world model of sequences, which isn't trained here; LeWMLoss and LeWMProjectionHead are here"
INSTEAD = {
    **dict.fromkeys(
        ["AmplitudeRescaleTransform", "FDATransform", "FDAView1Transform", "FDAView2Transform", "GaussianMixtureMask",
         "IRFFT2DTransform", "PhaseShiftTransform", "RandomFrequencyMaskTransform", "RFFT2DTransform"],
        FREQUENCIES,
    ),
    **dict.fromkeys(["ToTensor", "functional", "torchvision_transforms"], TORCHVISION),
    **dict.fromkeys(
        ["ActionEncoder", "AdaLNZero", "LatentDynamicsPredictor", "PredictorBlock", "LatentDistance"], WORLD
    ),
    "GaussianBlur": "gaussian_blur and sigmas of a transform blur its views; alone, torchvision's v2.GaussianBlur",
    "RandomSolarization": "views are solarized by a transform's arguments; alone, torchvision's v2.RandomSolarize",
    "RandomRotate": "rr_prob of a transform turns views by 90 degrees; others, torchvision's v2.RandomRotation",
    "RandomRotateDegrees": "use torchvision's v2.RandomRotation in front of a transform",
    "random_rotation_transform": "rr_prob of a transform turns views by 90 degrees",
    "Jigsaw": "the method pirl cuts images into pieces itself: fastjem pretrain --method pirl",
    "PIRLTransform": "the method pirl cuts images into pieces itself: fastjem pretrain --method pirl",
    "SwaVViewTransform": "it doesn't cut; use SwaVTransform, with crop_counts of your own",
    "VICRegLViewTransform": "it doesn't cut; use VICRegLTransform",
    "MultiCropTranform": "use SwaVTransform, with crop_sizes, crop_counts and scales of your own",
    "AddGridTransform": "masks aren't cut with images here; use lightly's transform and DetConSLoss of fastjem.nn",
    "DetConSTransform": "masks aren't cut with images here; use lightly's transform and DetConSLoss of fastjem.nn",
    "DetConSViewTransform": "masks aren't cut with images here; use lightly's transform and DetConSLoss of fastjem.nn",
    "MultiViewTransformV2": "use MultiViewTransform, or torchvision's v2 transforms",
    "ImageGridTransform": "use VICRegLTransform",
    "RandomResizedCropAndFlip": "use VICRegLTransform",
    "MAEBackbone": "of torchvision's parts, before timm's; use MaskedVisionTransformerTIMM",
    "MAEEncoder": "of torchvision's parts, before timm's; use MaskedVisionTransformerTIMM",
    "MAEDecoder": "of torchvision's parts, before timm's; use MaskedVisionTransformerDecoderTIMM",
    "MAEDecoderTIMM": "lightly itself replaces it by MaskedVisionTransformerDecoderTIMM, which is here",
    "PixioDecoderTIMM": "lightly itself replaces it by MaskedVisionTransformerDecoderTIMM, which is here",
    "MaskedVisionTransformer": "a base without code; use MaskedVisionTransformerTIMM",
    "MaskedVisionTransformerDecoder": "a base without code; use MaskedVisionTransformerDecoderTIMM",
    "ResNetGenerator": "backbones are timm's: timm.create_model, or torchvision.models",
    "ZOO": "checkpoints of lightly's; timm has weights to begin with",
    "checkpoints": "checkpoints of lightly's; timm has weights to begin with",
    "LightlyDataset": "use torchvision.datasets.ImageFolder, or fastjem's sources: fastjem pretrain --data DIR",
    "knn_predict": "use fastjem.functional.knn_votes, or fastjem evaluate",
    "plot_augmented_images": "fastjem views --data DIR draws what an augmentation does",
    "generate_grid_of_augmented_images": "fastjem views --data DIR draws what an augmentation does",
    "apply_transform_without_normalize": "fastjem views --data DIR draws what an augmentation does",
    "covariance_loss": "part of a loss: fastjem.functional.vicreg has all its terms",
    "invariance_loss": "part of a loss: fastjem.functional.vicreg has all its terms",
    "variance_loss": "part of a loss: fastjem.functional.vicreg has all its terms",
    "lejepa_invariance_loss": "part of a loss: fastjem.functional.lejepa has all its terms",
    **dict.fromkeys(
        ["visreg_center_loss", "visreg_scale_loss", "visreg_shape_loss"],
        "part of a loss: VISRegLoss has all its terms, in forward_components each by itself",
    ),
    "norm_mse_loss": "use fastjem.functional.w_mse",
    "prototype_probabilities": "part of a loss: MSNLoss makes them in tiles",
    "MultiViewCollate": "torch's default_collate stacks lists of views as they are",
    "tcr_loss": "use fastjem.functional.total_coding_rate, whose sign is the paper's",
    "sharpen": "use torch.softmax(x / temperature)",
}  # fmt: skip


# Of a file, and not what the package has by that name.
INSTEAD["msn_loss.sinkhorn"] = "use fastjem.functional.sinkhorn(..., normalize_samples_first=True)"


def absent(module: str, name: str) -> Exception:
    """For a name that isn't here: ImportError for one of lightly's, as `from` drops the text of an AttributeError."""
    place = module.replace(ROOT, "lightly", 1)
    instead = INSTEAD.get(f"{module.rpartition('.')[2]}.{name}", INSTEAD.get(name))
    if instead:
        return ImportError(f"{place}.{name} isn't in fastjem: {instead}", name=module)
    return AttributeError(f"module {module!r} has no attribute {name!r}: it isn't of lightly 1.6.0, or not here")


class Lookup(ModuleType):
    """A file of lightly's, whose names are those of the package that it is in."""

    def __init__(self, name: str, package: str):
        super().__init__(name, f"`{name.replace(ROOT, 'lightly', 1)}`, looked up in {package}.")
        self.__package__ = package
        self._package = package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or f"{self.__name__.rpartition('.')[2]}.{name}" in INSTEAD:
            raise absent(self.__name__, name)
        try:
            return getattr(importlib.import_module(self._package), name)
        except AttributeError:
            raise absent(self.__name__, name) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(x for x in dir(importlib.import_module(self._package)) if not x.startswith("_"))]


def register() -> None:
    """Make every file in the table importable, and an attribute of its package once that is imported."""
    for package, files in FILES.items():
        for file in files.split():
            name = f"{ROOT}.{package}.{file}"
            sys.modules.setdefault(name, Lookup(name, f"{ROOT}.{package}"))


def files_of(package: str) -> dict[str, ModuleType]:
    """The files of a package, for its attributes: `import lightly.loss as x; x.ntx_ent_loss.NTXentLoss`."""
    return {file: sys.modules[f"{ROOT}.{package}.{file}"] for file in FILES[package].split() if "." not in file}
