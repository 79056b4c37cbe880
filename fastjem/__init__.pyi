# Written by `python -m fastjem.api`; tests/test_api.py holds it equal to what the functions take.

import os
from typing import Any, Literal

import torch
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from fastjem.commands.embed import Embedded
from fastjem.config.options import Config
from fastjem.data.source import Source
from fastjem.methods.protocol import Method
from fastjem.run import Result
from pathlib import Path
from torch.nn.modules.module import Module
from torch.optim.optimizer import Optimizer

__version__: str

def pretrain(
    config: Config | None = None,
    *,
    out: str | os.PathLike[str] = 'runs/METHOD',
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    method: str | type[Method] | Method | None = 'simclr',
    backbone: str = 'resnet18',
    weights: str | os.PathLike[str] | None = None,
    weights_of: Literal['encoder', 'teacher', 'all'] = 'encoder',
    freeze: str | Sequence[Any] | None = None,
    head_warmup_epochs: float = 0.0,
    image_size: int | str | Sequence[int] = 224,
    channels: int = 3,
    value_range: str | Sequence[Any] = 'auto',
    mean: str | Sequence[Any] | None = None,
    std: str | Sequence[Any] | None = None,
    statistics: Literal['published', 'measure'] = 'published',
    epochs: int = 100,
    batch_size: int = 256,
    accumulate: int = 1,
    micro_batch: int = 0,
    max_steps: int = 0,
    optimizer: str | Callable[[list[dict[str, Any]]], Optimizer] | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    warmup_epochs: float | None = None,
    layer_decay: float | None = None,
    patch_embed_rate: float | None = None,
    clip: float | None = None,
    momentum: float | None = None,
    momentum_encoder: bool | None = None,
    preset: str = 'imagenet',
    options: Mapping[str, bool | int | float | str] = {},
    large_views: int | None = None,
    small_views: int | None = None,
    mask: float | None = None,
    masking: str | None = None,
    projector: str | Sequence[Any] | None = None,
    recipe: str | None = None,
    view: Mapping[str, bool | int | float | str | list[float]] = {},
    blur: bool | None = None,
    stem: str = 'auto',
    patch_size: int | Sequence[int] = 0,
    drop_path: float | None = None,
    sync_batch_norm: bool = False,
    shard: bool = False,
    activation_checkpointing: bool = False,
    timeout: float = 600,
    device: str | torch.device = 'auto',
    loader: str = 'auto',
    memory: float = 4.0,
    decoder_share: float | None = None,
    workers: int = -1,
    seed: int = 0,
    compile: bool = False,
    cuda_graph: Literal['auto', 'on', 'off'] = 'auto',
    precision: Literal['auto', 'bf16', 'fp16', 'fp32'] = 'auto',
    log: str | Sequence[Any] | None = None,
    tensorboard: bool = False,
    log_every: int = 10,
    checkpoint_every: float = 300,
    checkpoint_steps: int = 0,
    keep_checkpoints: int = 2,
    keep_best: bool = True,
    knn_every: float | None = None,
    teacher: bool = False,
    report: bool = True,
    resume: bool | Literal['auto'] = False,
    new_data: bool = False,
    encoder: str | Module | None = None,
    source: Source | None = None,
    loggers: Sequence[Any] = (),
) -> Result:
    """Pretrain an encoder on images; fields as in `fastjem.config.Config`, `out` among them.

    Args:
        out: folder of the run; else runs/ and the method's name, with a number where that is taken (default: 'runs/METHOD')
        data: folder, list, tar files, tables, arrays, s3://... too; a,b:0.3: both; none: the embedded data set (default: None)
        backbone: a timm model, or vit_tiny, vit_small, vit_base (default: 'resnet18')
        weights: to begin with: a run, an export, timm/MODEL.TAG, hf-hub:USER/MODEL, local-dir:FOLDER (default: None)
        weights_of: a run's encoder, its momentum encoder, or all of it, heads and momentum copies too (default: 'encoder')
        freeze: parts of the encoder that stay as they are: patch_embed,blocks.0 (default: None)
        head_warmup_epochs: in which the heads alone learn (default: 0.0)
        image_size: of the large views; 224x448: height x width; 112:75%,224: smaller ones for 75 % of the steps (default: 224)
        channels: of the images: 3: colours of any picture; 1: its gray; else as many as files have (default: 3)
        value_range: LOW,HIGH: black and white of images that aren't 8-bit; auto: by the data set (default: 'auto')
        mean: of images from 0 to 1, by channel: 0.5 or 0.5,0.4,0.3; the recipe's (default: None)
        std: the same: what images are divided by (default: None)
        statistics: measure: mean and deviation of these images, not ImageNet's (default: 'published')
        epochs: epochs (default: 100)
        batch_size: images of one forward pass over all ranks; by default less of little data (default: 256)
        accumulate: batches that make one optimiser step (default: 1)
        micro_batch: images of the encoder's passes within a batch, whose loss and gradient stay the whole batch's (GradCache); 0: one pass (default: 0)
        max_steps: end after so many steps; 0: after the epochs (default: 0)
        learning_rate: for 256 images; grows with the batch, or its root (default: None)
        weight_decay: weight decay (default: None)
        warmup_epochs: at most a tenth of the run (default: None)
        layer_decay: of the encoder's rate from layer to layer away from the heads; 1: none (default: None)
        patch_embed_rate: a factor on the patch embedding's rate (default: None)
        clip: the gradient's largest norm; 0: no clipping (default: None)
        momentum: of the momentum encoder at the start (default: None)
        momentum_encoder: give any method one, or take it away (default: None)
        preset: whose values a method takes: imagenet: the paper's; fastjem methods NAME lists others (default: 'imagenet')
        options: the method's own: temperature=0.2 ... (default: {})
        large_views: whole ones of an image, each a target of others (default: None)
        small_views: multi-crop's; none at 64 pixels and less (default: None)
        mask: share of the patches that any method's transformer isn't given of each view: 0.75 (default: None)
        masking: of mask: random | block | inverse_block (default: None)
        projector: widths of its layers, the last its output: 512,128; the method's own (default: None)
        recipe: augmentation: simclr, simclr_tf, mocov2, byol, mocov3, barlow, vicreg, swav, deepcluster, dino, ibot, dinov2, dinov2_intended, msn, ressl, wmse, wmse_cifar, empssl, lejepa, visreg, vicregl, pirl, capi, mae, data2vec, pairs, ijepa (default: None)
        view: fields of its views: flip=0 small.scale=0.05,0.2 ... (default: {})
        blur: as the recipe says; off at 64 pixels and less (default: None)
        stem: auto | standard | small (default: 'auto')
        patch_size: of a ViT; 0: its own (default: 0)
        drop_path: rate of stochastic depth in the trained encoder; 0: none (default: None)
        sync_batch_norm: statistics over all ranks (CUDA) (default: False)
        shard: weights and the optimiser's state in shards over the ranks (FSDP2) (default: False)
        activation_checkpointing: the encoder's blocks are computed again in the backward pass, not kept (default: False)
        timeout: seconds that ranks wait for one that doesn't come (default: 600)
        device: auto | cpu | cuda (default: 'auto')
        loader: who reads the images: auto | dali | dali-cpu | memory | torch (default: 'auto')
        memory: GiB that loader memory may take (default: 4.0)
        decoder_share: of JPEG files, for a GPU's fixed-function decoder; none: measured (default: None)
        workers: of the data loader, a rank; -1: one a core (default: -1)
        seed: seed (default: 0)
        compile: compile (default: False)
        cuda_graph: a whole step as one launch of a GPU's; auto: where it can be; off: its kernels one by one (default: 'auto')
        precision: auto: bf16 on GPUs since Ampere, fp16 on older ones, fp32 on CPUs (default: 'auto')
        log: figures go there, too: wandb,mlflow,tensorboard,trackio, one or several (default: None)
        tensorboard: log tensorboard (default: False)
        log_every: steps; every step, or every few, of a short run (default: 10)
        checkpoint_every: seconds (default: 300)
        checkpoint_steps: steps, in place of seconds (default: 0)
        keep_checkpoints: the last ones, for where the newest is damaged (default: 2)
        keep_best: keep the checkpoint of the best kNN accuracy, too (default: True)
        knn_every: epochs; 0: at start and end; a twentieth of the run (default: None)
        teacher: kNN, pictures and encoder.safetensors are the momentum encoder's, not the trained one's (default: False)
        report: report.html in the run's folder, new at each checkpoint (default: True)
        resume: go on with the run in out, by its own options; auto: or begin one (default: False)
        new_data: resume although the images have changed (default: False)
        config: all fields at once, in place of `fields`.
        encoder: a backbone's name, or any module [B, 3, H, W] -> [B, D] in place of one; `backbone` takes both, too.
        method: a name, or a subclass of `fastjem.methods.Method`, or one that is made for the encoder's width.
        source: any object with `len` and `read(i)` (bytes of an image file, or pixels [H, W, 3]) in place of `data`.
        optimizer: a name, or what makes one of parameter groups (a class of `torch.optim`, a `functools.partial`).
        loggers: objects with `log(step, figures)` beside the configured ones, or with `begin`, `log(row)` and `close`
            (`fastjem.loggers.Logger`).

    Raises:
        UserError: (a ValueError) for what can't be done, with the reason.
    """

def evaluate(
    run: str | os.PathLike[str],
    *,
    train: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    test: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    features: Literal['encoder', 'projector', 'both'] = 'encoder',
    teacher: bool = False,
    k: int = 20,
    temperature: float = 0.07,
    half: bool = False,
    workers: int = -1,
    device: Literal['auto', 'cpu', 'cuda'] | torch.device = 'auto',
    out: str | os.PathLike[str] | None = None,
    log: bool = False,
    encoder: Module | None = None,
) -> dict[str, Any]:
    """Every figure, also written to `evaluation.json` (of the momentum encoder `evaluation-teacher.json`) in the run's
    folder or beside an export, or to `options.out`. `teacher` in it says which encoder the figures are of. Those of
    RUN/checkpoints/best.pt go to `evaluation-best.json` in the run's folder.

    Images become numbers as they did in the run; those that can't be read are left out, said and counted.

    Args:
        run: run folder, or an exported folder or file
        train: images of known classes, as --data of pretrain; none: the run's (default: None)
        test: the same; none: beside `train`, or each tenth image of it (default: None)
        features: of which part (default: 'encoder')
        teacher: of the run's momentum encoder, not of the trained one (default: False)
        k: neighbours that vote (default: 20)
        temperature: votes weigh exp(cosine / temperature) (default: 0.07)
        half: keep features as float16, half the memory (default: False)
        workers: processes that read images; -1: one a core (default: -1)
        device: where the encoder runs (default: 'auto')
        out: file of the figures; none: evaluation.json, or evaluation-teacher.json, in the run's folder (default: None)
        log: give the figures to the trackers that the run went to, too (default: False)
        encoder: the module that the run was begun with in place of a backbone's name.

    Raises:
        NotWritten: with the figures, where the file could not be written.
        UserError: for what can't be done, with the reason.
    """

def embed(
    run: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    out: str | os.PathLike[str] | None = None,
    teacher: bool = False,
    half: bool = False,
    neighbors: int = 0,
    duplicates: float = 0.0,
    overwrite: bool = False,
    batch_size: int = 256,
    workers: int = -1,
    device: Literal['auto', 'cpu', 'cuda'] | torch.device = 'auto',
    encoder: Module | None = None,
    source: Source | None = None,
) -> Embedded:
    """Embeddings of images, prepared as those of the run were, as arrays in memory, and as a file where `out` says.

    With `out` the rows go to the folder OUT.part first; a call that was killed goes on there, and what it writes in the
    end is what one go would have written. Images that can't be read are left out, said, and listed with the reasons in
    NAME.unreadable.csv beside the file.

    Args:
        run: run folder, or an exported encoder.safetensors
        data: images, as data of pretrain; none: the run's (default: None)
        out: file to write: .parquet, .npz or .csv (default: None)
        teacher: of the run's momentum encoder, not of the trained one (default: False)
        half: as float16, half the size (default: False)
        neighbors: so many nearest other images of each, in NAME.neighbors.ENDING beside out (default: 0)
        duplicates: groups of images linked by a cosine of at least this, in NAME.duplicates.ENDING: 0.97 (default: 0.0)
        overwrite: a finished file, or a part of other embeddings (default: False)
        batch_size: images of one forward pass (default: 256)
        workers: processes that read images; -1: one a core (default: -1)
        device: where the encoder runs (default: 'auto')
        encoder: the module that the run was begun with in place of a backbone's name.
        source: any object with `len` and `read(i)` in place of `data`.

    Raises:
        UserError: for what can't be done, with the reason: a file that is there already, a part of other embeddings.
    """

def finetune(
    run: str | os.PathLike[str],
    *,
    train: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    test: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    out: str | os.PathLike[str] | None = None,
    tune: Literal['whole', 'linear'] = 'whole',
    scratch: bool = False,
    teacher: bool = False,
    percent: float = 100.0,
    epochs: int = 30,
    batch_size: int = 128,
    optimizer: str = 'adamw',
    learning_rate: float | None = None,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
    warmup_epochs: float | None = None,
    clip: float = 0.0,
    augmentation: Literal['light', 'strong', 'none'] = 'light',
    crop_scale: float | None = None,
    auto_augment: str | None = None,
    erase: float | None = None,
    mixup: float | None = None,
    cutmix: float | None = None,
    smoothing: float | None = None,
    drop_path: float | None = None,
    overwrite: bool = False,
    checkpoint_every: float = 60.0,
    seed: int = 0,
    workers: int = -1,
    device: Literal['auto', 'cpu', 'cuda'] | torch.device = 'auto',
    encoder: Module | None = None,
) -> dict[str, Any]:
    """Every figure, also in `finetune.json` of the folder `out`, beside the classifier: `timm.create_model(
    "local-dir:OUT", pretrained=True)` or `fastjem.load_classifier(OUT)` opens it.

    The test's images are looked at once, at the end: nothing is chosen by them. A call that was killed goes on at its
    last checkpoint where it is made again, and ends as one go would have. It runs in one process, on one device.

    Args:
        run: run folder, or an exported encoder.safetensors
        train: images of known classes, as --data of pretrain; none: the run's (default: None)
        test: the same; none: beside `train`, or each tenth image of it (default: None)
        out: folder of the classifier; none: finetune-whole, say, in the run's (default: None)
        tune: whole: all layers learn; linear: the head alone, on a frozen encoder (default: 'whole')
        scratch: from random weights: what the run's are worth (default: False)
        teacher: the run's momentum encoder, not the trained one (default: False)
        percent: of the labels of each class that are known: 1, 10 (default: 100.0)
        epochs: epochs (default: 30)
        batch_size: images of one step (default: 128)
        optimizer: one of timm's (default: 'adamw')
        learning_rate: for 256 images, grows with the batch; none: 0.001, linear: 0.01 (default: None)
        weight_decay: not of biases and norms (default: 0.05)
        layer_decay: of the rate from layer to layer away from the head; none: 0.75 of transformers, else 1 (default: None)
        warmup_epochs: none: a tenth of the epochs, at most 5 (default: None)
        clip: the gradient's largest norm; 0: no clipping (default: 0.0)
        augmentation: light: crop, flip, label smoothing; strong: RandAugment, erasing, mixup and cutmix, too (default: 'light')
        crop_scale: least share of an image's area that is cut out; 0.08, 0.5 at 64 pixels (default: None)
        auto_augment: timm's: rand-m9-mstd0.5-inc1, augmix-m5-w4 ... (default: None)
        erase: probability that a rectangle is erased (default: None)
        mixup: alpha; 0: none (default: None)
        cutmix: alpha; 0: none (default: None)
        smoothing: of labels (default: None)
        drop_path: rate of stochastic depth; none: 0.1 of transformers with strong, else 0 (default: None)
        overwrite: a classifier, or the beginning of one, in out (default: False)
        checkpoint_every: seconds (default: 60.0)
        seed: of augmentation, order, and the labels of percent (default: 0)
        workers: processes that read images; -1: one a core (default: -1)
        device: where it is trained (default: 'auto')
        encoder: the module that the run was begun with in place of a backbone's name; its weights change.

    Raises:
        UserError: for what can't be done, with the reason.
    """

def export(
    run: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    teacher: bool = False,
    onnx: bool = False,
    push: str | None = None,
    private: bool = False,
    license: str | None = None,
    encoder: Module | None = None,
) -> list[Path]:
    """The files written: of a folder `model.safetensors`, `config.json`, `README.md` (a model card), and `model.onnx`
    where that is asked for; or one .safetensors, with an .onnx beside it. Metadata and `config.json` say how images
    become numbers, and `"teacher": "true"` where the weights are a momentum encoder's. What timm can't open is said
    before it is written, and `fastjem.load_encoder` opens it.

    Args:
        run: run folder; an export, to be written again or sent
        out: folder to write, or a file that ends in .safetensors; none: export, or export-teacher, in the run's folder (default: None)
        teacher: the run's momentum encoder, not the trained one (default: False)
        onnx: an ONNX file with it, checked against the encoder (default: False)
        push: USER/MODEL on the Hugging Face hub, which gets the folder, too (default: None)
        private: push makes a model that its owner alone sees (default: False)
        license: of the weights, for the model card, as the hub names it: apache-2.0, say (default: None)
        encoder: the module that the run was begun with in place of a backbone's name: the export then holds its weights
            and how its images become numbers, and whoever opens it needs the module, too.

    Raises:
        UserError: for what is no run, a run without a momentum encoder where that is asked for, what can't be written,
            and a hub that can't be reached or doesn't know who we are; then before anything is written.
    """

def views(
    *,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    out: str | os.PathLike[str] = 'views.png',
    method: str = 'simclr',
    preset: str = 'imagenet',
    recipe: str | None = None,
    view: Mapping[str, bool | int | float | str | Sequence] = {},
    image_size: int | str | Sequence[int] = 224,
    channels: int = 3,
    value_range: str = 'auto',
    images: int = 6,
    large_views: int | None = None,
    small_views: int | None = None,
    blur: bool | None = None,
    mask: str | None = None,
    masking: str | None = None,
    patch_size: int = 16,
    seed: int = 0,
    epoch: int = 0,
) -> Path:
    """A picture of what a method sees: rows are images of the folder, columns the views it trains on; its path.

    With a mask there is a last column. The share of the patches that it hides is what `mask` says, or the method's, or
    75 %; "block" has DINOv2's (10 to 50 %), "multi_block" I-JEPA's, whose targets are framed.

    Args:
        data: images, as data of pretrain; none: the embedded data set (default: None)
        out: the picture (default: 'views.png')
        method: one of simclr, moco, byol, simsiam, swav, dino, barlow_twins, vicreg, data2vec, dcl, supcon, clip, siglip, mocov3, nnclr, ressl, tico, wmse, mmcr, frossl, empssl, lejepa, visreg, ijepa, mae, ibot, dinov2, dinov3, simdino, simdinov2, msn, pmsn, deepcluster, smog, pirl, vicregl, all4one, capi, distill (default: 'simclr')
        preset: of the method: fastjem methods NAME lists them (default: 'imagenet')
        recipe: in place of the method's: simclr, simclr_tf, mocov2, byol, mocov3, barlow, vicreg, swav, deepcluster, dino, ibot, dinov2, dinov2_intended, msn, ressl, wmse, wmse_cifar, empssl, lejepa, visreg, vicregl, pirl, capi, mae, data2vec, pairs, ijepa (default: None)
        view: fields of its views: flip=0 ... (default: {})
        image_size: of the large views; of several, as in 112:75%,224, the last (default: 224)
        channels: of the images; more than three are shown by the first three (default: 3)
        value_range: LOW,HIGH: black and white of images that aren't 8-bit; auto: by the data set (default: 'auto')
        images: images (default: 6)
        large_views: whole ones of an image; none: the method's (default: None)
        small_views: multi-crop's; none at 64 pixels and less (default: None)
        blur: as the recipe says; off at 64 pixels and less (default: None)
        mask: a last view through a mask: a run's mask 0.75, or even_block, random, inverse_block, inverse_rectangle, block, multi_block; none: the method's (default: None)
        masking: of mask 0.75: random | block | inverse_block (default: None)
        patch_size: pixels, of a mask (default: 16)
        seed: the run's (default: 0)
        epoch: the run's (default: 0)

    Raises:
        UserError: for what can't be drawn, with the reason.
    """

def check_data(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    views: int = 2,
    image_size: int | str | Sequence[int] = 224,
    channels: int = 3,
    value_range: str = 'auto',
    workers: int = -1,
    show: int = 20,
    json: bool = False,
) -> dict[str, Any]:
    """Counts, sizes, skipped files [(path, reason)] and expected seconds of an epoch of a folder.

    Args:
        data: images, as data of pretrain
        views: of an image, for the expected time (default: 2)
        image_size: of a view; smaller images are counted; of several, the last (default: 224)
        channels: as of pretrain (default: 3)
        value_range: as of pretrain (default: 'auto')
        workers: processes; -1: one a core (default: -1)
        show: skipped files that are named; 0: all (default: 20)
        json: everything as one JSON object, all skipped files in it (default: False)

    Raises:
        UserError: if there is no folder, no image in it, or no option like that.
    """

def load_encoder(
    path: str | os.PathLike[str],
    *,
    teacher: bool = False,
    encoder: Module | None = None,
) -> Module:
    """The encoder of a run folder, at its last checkpoint, or of an export, a file or a folder; in eval mode.

    `encoder(encoder.prepare(images))` are embeddings: `prepare` is `fastjem.data.pixels.Pixels.prepare` of the run,
    which takes paths, arrays or Pillow's images. A module of the user's own that has a `prepare` keeps that.

    Args:
        path: of the folder or the file; of one of a run's checkpoints, RUN/checkpoints/best.pt say; "hf-hub:USER/MODEL"
            of an exported folder on Hugging Face's hub.
        teacher: the momentum encoder of a run, in place of the trained one.
        encoder: the module that a run was begun with in place of a backbone's name; the weights are loaded into it.

    Raises:
        UserError: for what is no run and no encoder, a run without a momentum encoder, and weights that don't fit.
    """

def load_classifier(
    path: str | os.PathLike[str],
    *,
    encoder: Module | None = None,
) -> Module:
    """The classifier in a folder that `fastjem finetune` wrote; in eval mode.

    `model(model.prepare(images))` are logits [B, K], `model.classes` the K names: `prepare` takes paths, files' bytes,
    arrays or Pillow's images.

    Args:
        path: of the folder.
        encoder: the module that the run was begun with in place of a backbone's name; the weights are loaded into it.

    Raises:
        UserError: for what is no folder of a classifier, and weights that don't fit.
    """
