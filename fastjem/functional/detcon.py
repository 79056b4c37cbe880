"""DetCon: regions of an image against the regions of all images, where several regions may show the same."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement
from fastjem.functional import checks
from fastjem.functional.candidates import negatives_of
from fastjem.functional.compiled import over_ranks
from fastjem.functional.options import Options, dots_of_rows, reduced
from fastjem.functional.precision import in_float32, without_autocast
from fastjem.functional.seen import Side, View
from fastjem.kernels.arithmetic import widest
from fastjem.ops.forward_mode import refuse_forward_mode

OF_REGIONS = 2**32  # an image's number in ids is above its regions'


@over_ranks()
def detcon(
    prediction0: Tensor,
    prediction1: Tensor,
    target0: Tensor,
    target1: Tensor,
    mask0: Tensor,
    mask1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """DetCon's contrastive loss of regions (Hénaff et al. 2021, arXiv 2103.10957), of both directions.

    A region's candidates are all regions of the other view's targets, of all images, and those of its own view's but
    for the ones of the same image that show the same. Its positives are the regions of its image's other view that show
    the same: the loss is `logsumexp(cosines with candidates / temperature) - mean(positives' cosines) / temperature`,
    over how many regions of its own view show the same, and 0 without positives. The mean over regions, of view 0 and
    of view 1, is added.

    Args:
        prediction0, prediction1: [B, M, D], features pooled over M regions of each image, of two views; normalised
            inside.
        target0, target1: [B, M, D], of the target network (DetConB), or the predictions themselves (DetConS).
        mask0, mask1: [B, M] integers, what each region shows: equal ones of an image show the same.
        temperature: what cosines are divided by, a number or a 0-dim tensor that gets its gradient.
        group: the process group whose ranks' regions are candidates; every rank gets the mean over all of them, and
            batches may be uneven. None: this rank's alone.

    Returns:
        0-dim float32 (float64 for float64 inputs). Neither cosines nor labels are in memory, but for those within
        images, [B, M, M].

    Raises:
        ValueError: for other shapes, dtypes or temperatures.
    """
    op = "detcon"
    features = (prediction0, prediction1, target0, target1)
    with Agreement(op, group) as ranks:
        contract = "predictions and targets must be [B, M, D], all of one shape"
        checks.matrices(op, contract, *features, dims=3, may_be_empty=None if group is None else 0)
        for mask in (mask0, mask1):
            is_mask = isinstance(mask, Tensor) and mask.shape == prediction0.shape[:2]
            if not is_mask or mask.is_floating_point() or mask.is_complex():
                came = f"{checks.shape(mask)} {getattr(mask, 'dtype', '')}".strip()
                checks.fail(op, f"masks must be {list(prediction0.shape[:2])} integers", came)
            checks.one_device(op, (prediction0, mask))
        temperature = checks.positive(op, "temperature", temperature, prediction0)
        ranks.rows_of(prediction0)
        ranks.backward_of(*features, *([temperature] if isinstance(temperature, Tensor) else []))
    refuse_forward_mode(op, (*features, temperature))
    images, regions, _ = prediction0.shape
    before = 0 if group is None else sum(ranks.sizes[: dist.get_rank(group)])
    sizes = [images * regions] if group is None else [size * regions for size in ranks.sizes]
    masks = [mask.long() for mask in (mask0, mask1)]
    numbers = (torch.arange(images, device=mask0.device) + before)[:, None] * OF_REGIONS
    ids = [(numbers + mask % OF_REGIONS).flatten() for mask in masks]  # [B M]
    with without_autocast(prediction0):
        inverse = 1 / (widest(temperature) if isinstance(temperature, Tensor) else temperature)
        unit = [torch.nn.functional.normalize(in_float32(x), dim=2) for x in features]
        by = inverse.to(unit[0].dtype) if isinstance(inverse, Tensor) else inverse
        view = View(op, None, False, False, prediction0.dtype, sizes, group)
        losses = []
        for own in (0, 1):
            rows = unit[own] * by
            own_target = unit[2 + own]
            other_target = unit[3 - own]
            columns = torch.stack([other_target.flatten(0, 1), own_target.flatten(0, 1)])  # [2, B M, D]
            # Nothing of the other view is left out: no region has the id -1.
            of_columns = torch.stack([torch.full_like(ids[own], -1), ids[own]])
            side = Side(rows.flatten(0, 1)[None], ids[own][None])
            lse = negatives_of(side, Side(columns, of_columns), None, view, 0.0)[0].lse.view(images, regions)
            same = (masks[own][:, :, None] == masks[1 - own][:, None, :]).to(rows.dtype)  # [B, M, M]
            count = same.sum(2)
            positives = dots_of_rows(rows, same / count.clamp_min(1)[..., None] @ other_target)
            of_own = (masks[own][:, :, None] == masks[own][:, None, :]).sum(2)
            losses.append(torch.where(count > 0, lse - positives, 0) / of_own)
        return 2 * reduced(torch.stack(losses), Options(), prediction0, group)
