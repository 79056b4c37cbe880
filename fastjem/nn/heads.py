"""Projection and prediction heads: MLPs of 2-3 layers. Names, arguments, defaults and state dicts as in lightly.

A projector stands between the encoder and the loss and is dropped after pretraining; a predictor stands on the
student's side only.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from fastjem.nn.parts import MLP

Block = tuple[int, int, nn.Module | None, nn.Module | None] | tuple[int, int, nn.Module | None, nn.Module | None, bool]


class ProjectionHead(nn.Module):
    """Linear layers, each with an optional norm and non-linearity.

    Args:
        blocks: (width in, width out, norm or None, non-linearity or None[, bias]) each; without saying, a linear
            layer has a bias unless a norm follows. Or the layers themselves.
    """

    def __init__(self, blocks: Sequence[Block] | nn.Sequential):
        super().__init__()
        if isinstance(blocks, nn.Sequential):
            self.layers = blocks
            return
        layers: list[nn.Module] = []
        for width_in, width_out, norm, activation, *bias in blocks:
            layers.append(nn.Linear(width_in, width_out, bias=bias[0] if bias else norm is None))
            layers += [layer for layer in (norm, activation) if layer is not None]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _batch_norm(wanted: bool) -> str:
    """`MLP`'s norm from lightly's `batch_norm`."""
    return "batch" if wanted else "none"


class BarlowTwinsProjectionHead(ProjectionHead):
    """Three layers (arXiv 2103.03230)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 8192, output_dim: int = 8192):
        super().__init__(MLP(input_dim, hidden_dim, hidden_dim, output_dim))


class BYOLProjectionHead(ProjectionHead):
    """Two layers (arXiv 2006.07733)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 4096, output_dim: int = 256):
        super().__init__(MLP(input_dim, hidden_dim, output_dim))


class BYOLPredictionHead(ProjectionHead):
    """Two layers (arXiv 2006.07733)."""

    def __init__(self, input_dim: int = 256, hidden_dim: int = 4096, output_dim: int = 256):
        super().__init__(MLP(input_dim, hidden_dim, output_dim))


class _NormEverywhere(ProjectionHead):
    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int, batch_norm: bool):
        widths = [input_dim, *[hidden_dim] * max(1, num_layers - 1), output_dim]
        super().__init__(MLP(*widths, norm=_batch_norm(batch_norm), last_norm=True))


class MoCoProjectionHead(_NormEverywhere):
    """Two layers without norms for v2 (arXiv 2003.04297); 3, 4096 wide, with norms, for v3 (arXiv 2104.02057)."""

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        num_layers: int = 2,
        batch_norm: bool = False,
    ):
        super().__init__(input_dim, hidden_dim, output_dim, num_layers, batch_norm)


class SimCLRProjectionHead(_NormEverywhere):
    """Two layers for v1 (arXiv 2002.05709), 3 or more for v2 (arXiv 2006.10029); batch norm after each."""

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        num_layers: int = 2,
        batch_norm: bool = True,
    ):
        super().__init__(input_dim, hidden_dim, output_dim, num_layers, batch_norm)


class NNCLRProjectionHead(ProjectionHead):
    """Three layers, batch norm after each (arXiv 2104.14548)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 2048, output_dim: int = 256):
        super().__init__(MLP(input_dim, hidden_dim, hidden_dim, output_dim, last_norm=True))


class NNCLRPredictionHead(ProjectionHead):
    """Two layers (arXiv 2104.14548)."""

    def __init__(self, input_dim: int = 256, hidden_dim: int = 4096, output_dim: int = 256):
        super().__init__(MLP(input_dim, hidden_dim, output_dim))


class SimSiamProjectionHead(ProjectionHead):
    """Three layers, batch norm after each, the last without affine part (arXiv 2011.10566)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 2048, output_dim: int = 2048):
        super().__init__(MLP(input_dim, hidden_dim, hidden_dim, output_dim, last_norm=True, last_affine=False))


class SimSiamPredictionHead(ProjectionHead):
    """Two layers with a bottleneck (arXiv 2011.10566)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 512, output_dim: int = 2048):
        super().__init__(MLP(input_dim, hidden_dim, output_dim))


class SMoGProjectionHead(ProjectionHead):
    """Two layers, batch norm after each, the last without affine part (arXiv 2207.06167)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 2048, output_dim: int = 128):
        super().__init__(MLP(input_dim, hidden_dim, output_dim, last_norm=True, last_affine=False))


class SMoGPredictionHead(ProjectionHead):
    """Two layers (arXiv 2207.06167)."""

    def __init__(self, input_dim: int = 128, hidden_dim: int = 2048, output_dim: int = 128):
        super().__init__(MLP(input_dim, hidden_dim, output_dim))


class SwaVProjectionHead(ProjectionHead):
    """Two layers (arXiv 2006.09882)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 2048, output_dim: int = 128):
        super().__init__(MLP(input_dim, hidden_dim, output_dim))


class LeJEPAProjectionHead(ProjectionHead):
    """Three layers, narrow (arXiv 2511.08544)."""

    def __init__(self, input_dim: int, hidden_dim: int = 2048, output_dim: int = 64, num_layers: int = 3):
        if num_layers < 2:
            raise ValueError(f"LeJEPAProjectionHead: num_layers must be at least 2, got {num_layers}")
        super().__init__(MLP(input_dim, *[hidden_dim] * (num_layers - 1), output_dim))


class LeWMProjectionHead(ProjectionHead):
    """Two layers with GELU (arXiv 2603.19312)."""

    def __init__(self, input_dim: int, hidden_dim: int = 2048, output_dim: int = 192, batch_norm: bool = True):
        super().__init__(MLP(input_dim, hidden_dim, output_dim, norm=_batch_norm(batch_norm), activation=nn.GELU))


class MMCRProjectionHead(ProjectionHead):
    """`num_layers` hidden layers and one for the output, without biases (arXiv 2303.03307)."""

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 8192,
        output_dim: int = 512,
        num_layers: int = 2,
        batch_norm: bool = True,
        use_bias: bool = False,
    ):
        widths = [input_dim, *[hidden_dim] * max(1, num_layers), output_dim]
        super().__init__(MLP(*widths, norm=_batch_norm(batch_norm), bias=use_bias))


class MSNProjectionHead(ProjectionHead):
    """Three layers with GELU (arXiv 2204.07141)."""

    def __init__(self, input_dim: int = 768, hidden_dim: int = 2048, output_dim: int = 256):
        super().__init__(MLP(input_dim, hidden_dim, hidden_dim, output_dim, activation=nn.GELU))


class TiCoProjectionHead(ProjectionHead):
    """Two layers (arXiv 2206.10698)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 4096, output_dim: int = 256):
        super().__init__(MLP(input_dim, hidden_dim, output_dim))


class VICRegProjectionHead(ProjectionHead):
    """Three layers (arXiv 2105.04906)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 8192, output_dim: int = 8192, num_layers: int = 3):
        super().__init__(MLP(input_dim, *[hidden_dim] * max(1, num_layers - 1), output_dim))


class VicRegLLocalProjectionHead(ProjectionHead):
    """Three layers with layer norm, for local features [..., D] (arXiv 2210.01571)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 8192, output_dim: int = 8192):
        super().__init__(MLP(input_dim, hidden_dim, hidden_dim, output_dim, norm="layer"))


class DenseCLProjectionHead(ProjectionHead):
    """Two layers without norms, for global and local features (arXiv 2011.09157)."""

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 2048, output_dim: int = 128):
        super().__init__(MLP(input_dim, hidden_dim, output_dim, norm="none"))
