"""What each loss sends over ranks, by formula: `python benchmarks/traffic.py` prints the tables of docs/scaling.md.

tests/test_traffic.py holds each formula against the collectives that two, three and four ranks are seen to make.
"""

from dataclasses import dataclass

SYMBOLS = """\
W ranks of N images each, V views, D wide, K prototypes, S slices, R regions of an image, J nearest neighbours; e bytes
of an element as it is given (2 for bfloat16), w bytes of the widest dtype (4 on CUDA, 8 on the CPU)."""


@dataclass(frozen=True)
class Loss:
    """Bytes that a rank puts in, as expressions of the symbols."""

    name: str
    gathered: str = "0"  # what every other rank gets, forward
    summed: str = "0"  # forward
    gathered_backward: str = "0"
    calls: str = "0"  # collectives forward, but for the exchange of shapes
    calls_backward: str = "0"
    exchanges: int = 1  # each a gather of 16 bytes

    def sent(self, **sizes: int) -> float:
        """Bytes that a rank sends, and receives, in a step."""
        ranks = sizes["W"]
        gathered = of(self.gathered, sizes) + of(self.gathered_backward, sizes) + 16 * self.exchanges
        return (ranks - 1) * gathered + 2 * (ranks - 1) / ranks * of(self.summed, sizes)

    def collectives(self, **sizes: int) -> int:
        return of(self.calls, sizes) + of(self.calls_backward, sizes) + self.exchanges


def of(expression: str, sizes: dict[str, int]) -> int:
    return eval(expression.replace("²", "**2"), {}, sizes)


LOSSES = (
    Loss("nt_xent, dcl", "2*N*D*e", "w", "2*N*(D*e + w)", "W + 1", "W"),
    Loss("nt_xent with ids", "2*N*(4*D + 8)", "2*w", "2*N*(4*D + 8 + 2*w)", calls="W + 2", calls_backward="W"),
    Loss("dclw", "2*N*D*e + 4*N", "w", "2*N*(D*e + w)", calls="W + 2", calls_backward="W"),
    Loss("nnclr", "4*N*D*e", "2*w", "4*N*(D*e + w)", "2*W + 2", "2*W", exchanges=3),
    Loss("supcon", "2*N*D*e + N*(D*w + w + 8)", "2*w", "2*N*(D*e + w)", "2*W + 2", "W"),
    Loss("detcon", "6*N*R*(4*D + 8)", "2*w", "6*N*R*(4*D + 8) + 4*N*R*w", "2*W + 2", "2*W"),
    Loss("clip_loss", "2*N*D*e", "w", "2*N*(D*e + w)", "W + 1", "W"),
    Loss("clip_loss, local, no gradient of others", "4*N*D*e", calls="2*W"),
    Loss("siglip_loss", "2*N*D*e", "w", calls="W + 1"),
    Loss("siglip_loss with ids", "N*(D*e + 8)", "2*w", "N*(2*D*e + 8 + w)", "W + 2", "W"),
    Loss("barlow_twins, squares", summed="4*D² + 16*D + 4*D*w + w", calls="4"),
    Loss("barlow_twins, rows", "2*N*D*e", calls="2"),
    Loss("vicreg, squares", summed="8*D² + 4*D*w + w", calls="3"),
    Loss("vicreg, rows", "2*N*D*e", calls="2"),
    Loss("tico, squares", summed="4*D² + 4", calls="2"),
    Loss("total_coding_rate", summed="4*V*D²", calls="1"),
    Loss("simdino", summed="4*V*D² + 4", calls="2"),
    Loss("sigreg, 17 knots", summed="16*V*S*w", calls="1"),
    Loss("lejepa, 17 knots", summed="16*V*S*w + 4", calls="2"),
    Loss("visreg", "V*N*D*e", "4", calls="2"),
    Loss("koleo", "N*(D*e + 8*J)", calls="2"),
    Loss("mean_entropy", summed="4*K + 4", calls="1"),
    Loss("sinkhorn, up to 4 ranks", "3*K*w", calls="3"),
    Loss("sinkhorn, more ranks", summed="6*K*w", calls="6"),
    Loss("prototype_cross_entropy", summed="2*w", calls="1"),
    Loss("prototype_head_cross_entropy", summed="2*w", calls="1"),
    Loss("DINOLoss, IBOTPatchLoss: the centre", summed="4*K + 4", calls="1"),
)


def naive_nt_xent(**sizes: int) -> float:
    """Bytes of NT-Xent behind an all-gather that is differentiated (lightly's GatherLayer): its backward adds the
    gradients of all ranks' rows, of which each rank keeps its own."""
    ranks = sizes["W"]
    rows = of("2*N*D*e", sizes)
    return (ranks - 1) * rows + 2 * (ranks - 1) / ranks * ranks * rows


def table() -> str:
    lines = [
        "| loss | gathered, forward | gathered, backward | summed | collectives |",
        "|---|---|---|---|---|",
    ]
    for loss in LOSSES:
        calls = loss.calls if loss.calls_backward == "0" else f"{loss.calls}, backward {loss.calls_backward}"
        if loss.exchanges > 1:
            calls += f", {loss.exchanges} exchanges"
        cells = [written(x) for x in (loss.gathered, loss.gathered_backward, loss.summed, calls)]
        lines.append(f"| {loss.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(expression: str) -> str:
    return "" if expression == "0" else expression.replace("*", " ")


def on_paper() -> str:
    """NT-Xent of 32,768 images over 512 ranks, in bfloat16 on CUDA."""
    lines = [
        "| D | fastjem | all-gather with gradient | a rank's rows | all rows |",
        "|---|---|---|---|---|",
    ]
    loss = LOSSES[0]
    for width in (128, 256):
        sizes = {"W": 512, "N": 64, "D": width, "e": 2, "w": 4}
        rows = of("2*N*D*e", sizes)
        inside = [f"{sent / 1e6:.1f} MB" for sent in (loss.sent(**sizes), naive_nt_xent(**sizes))]
        lines.append(f"| {width} | {' | '.join(inside)} | {rows / 1e3:.1f} kB | {512 * rows / 1e6:.1f} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), on_paper(), sep="\n\n")
