"""DetCon: regions of an image against the regions of all images, where several regions may show the same."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement
from fastjem.functional import checks
from fastjem.functional.candidates import negatives_of
from fastjem.functional.compiled import over_ranks
from fastjem.functional.options import Options, dots_of_rows, reduced
from fastjem.functional.precision import without_autocast
from fastjem.functional.seen import Side, View
from fastjem.functional.unit import unit_rows
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
    with without_autocast(prediction0):
        unit = [unit_rows(torch.stack(checks.common(*pair))) for pair in (features[:2], features[2:])]  # [2, B, M, D]
        targets = unit[1]
        inverse = 1 / (widest(temperature) if isinstance(temperature, Tensor) else temperature)
        rows = unit[0] * (inverse.to(targets.dtype) if isinstance(inverse, Tensor) else inverse)
        masks = torch.stack([mask0.long(), mask1.long()])  # [2, B, M]
        view = View(op, None, False, False, prediction0.dtype, sizes, group)
        lse = _over_candidates(rows, targets, masks, before, view)
        others = targets.flip(0)
        same = (masks[:, :, :, None] == masks.flip(0)[:, :, None, :]).to(rows.dtype)  # [2, B, M, M]
        count = same.sum(3)
        positives = dots_of_rows(rows, same / count.clamp_min(1)[..., None] @ others)
        of_own = (masks[:, :, :, None] == masks[:, :, None, :]).sum(3)
        losses = (lse - positives).masked_fill(count == 0, 0) / of_own
        return 2 * reduced(losses, Options(), prediction0, group)


def _over_candidates(
    rows: Tensor,  # [2, B, M, D], of both views, over the temperature
    targets: Tensor,  # [2, B, M, D]
    masks: Tensor,  # [2, B, M]
    before: int,  # images of earlier ranks
    view: View,
) -> Tensor:
    """[2, B, M]: each region's log-sum-exp over the other view's regions and those of its own that show others."""
    images = masks.shape[1]
    numbers = torch.arange(before, before + images, device=masks.device)[:, None] * OF_REGIONS
    ids = (masks % OF_REGIONS + numbers).flatten(1)  # [2, B M]
    # Nothing of the other view is left out: no region has the id -1.
    of_columns = torch.stack([torch.full_like(ids, -1), ids], 1)
    columns = targets.flatten(1, 2)  # [2, B M, D], of which the other view's come first
    lse = []
    for own, side in enumerate(rows.flatten(1, 2).unbind()):
        candidates = Side(columns if own else columns.flip(0), of_columns[own])
        lse.append(negatives_of(Side(side[None], ids[own][None]), candidates, None, view, 0.0)[0].lse)
    return torch.cat(lse).view(masks.shape)
