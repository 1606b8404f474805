"""Table 1: the sizes of OverLoCK, and two below the paper's.

Where Table 1 and the released weights differ, the weights rule: XT's Overview-Net is 336 channels wide (the table's 256
gives 15.0 M parameters, not the 16.4 M of its own Table 6), and ContMix has twice the groups of the table for each of
its two kernel sizes (S: 8 and 16 "heads", where the table has 5 and 8).
"""

from __future__ import annotations

from dataclasses import dataclass

from overlock.layers.arguments import check_count


@dataclass(frozen=True, kw_only=True)
class PaperFigures:
    """A row of Table 2 at 224 x 224: multiply-adds in G (the paper's "FLOPs"), parameters in M, top-1 in %."""

    macs: float
    params: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One size of the network. Stages 1 to 3 are Base-Net's, 4 Overview-Net's; Focus-Net has stages 3 and 4 again."""

    dims: tuple[int, int, int, int]
    """Channels of stages 1 to 4; the context has a quarter of the last."""
    base_depths: tuple[int, int, int]
    """Blocks of Base-Net's stages."""
    overview_depth: int
    """Blocks of Overview-Net."""
    focus_depths: tuple[int, int]
    """Blocks of Focus-Net's stages 3 and 4."""
    groups: tuple[int, int]
    """ContMix's groups for each kernel size in Focus-Net's stages."""
    kernel_sizes: tuple[int, int, int, int] = (17, 15, 13, 7)
    """Large kernels of stages 1 to 4, static and dynamic."""
    head_width: int = 1024
    """Channels of the classifier's hidden layer."""
    crop_pct: float = 0.95
    """Share of the image that the evaluation crop keeps."""
    drop_path: float = 0.0
    """Stochastic depth rate of the paper's ImageNet training."""
    paper: PaperFigures | None = None
    """What Table 2 prints."""

    def __post_init__(self) -> None:
        """Refuse rows of another length, and counts that are none.

        Raises:
            ValueError: naming the field.
        """
        lengths = dict(dims=4, base_depths=3, focus_depths=2, groups=2, kernel_sizes=4)
        for name, length in lengths.items():
            row = getattr(self, name)
            if len(row) != length:
                raise ValueError(f"{name} of a variant must be {length} numbers, got {len(row)}: {row}")
            for number in row:
                check_count(f"each of {name}", number)
        check_count("overview_depth", self.overview_depth)
        check_count("head_width", self.head_width)
        if self.dims[3] % 4:
            raise ValueError(f"the last of dims must be a multiple of 4, got {self.dims[3]}; the context has a quarter")

    @property
    def context_dim(self) -> int:
        """Channels of the context prior."""
        return self.dims[3] // 4

    @property
    def depths(self) -> list[int]:
        """Blocks in the order in which stochastic depth counts them."""
        return [*self.base_depths, self.overview_depth, *self.focus_depths]


# The two small ones keep the shape of XT (a third of the blocks in Focus-Net's stage 3, a narrow context, K 7 in the
# last stage) and the head width of 16 channels or so in each group. Their kernels shrink with their widths: at C = 32
# a 17x17 depthwise kernel would cost more than the block's 1x1 convolutions (289 against 8 C = 256 multiply-adds a
# channel), and their images are small. Their heads are narrower because a 1024-wide one would hold half the parameters.
VARIANTS: dict[str, Variant] = {
    "overlock_atto": Variant(
        dims=(24, 40, 64, 96), base_depths=(1, 1, 2), overview_depth=1, focus_depths=(3, 1), groups=(4, 6),
        kernel_sizes=(11, 9, 9, 7), head_width=256, crop_pct=0.925,
    ),
    "overlock_nano": Variant(
        dims=(40, 80, 160, 224), base_depths=(2, 2, 2), overview_depth=1, focus_depths=(4, 2), groups=(4, 8),
        kernel_sizes=(15, 13, 11, 7), head_width=512, crop_pct=0.925, drop_path=0.05,
    ),
    "overlock_xt": Variant(
        dims=(56, 112, 256, 336), base_depths=(2, 2, 3), overview_depth=2, focus_depths=(6, 2), groups=(8, 12),
        crop_pct=0.925, drop_path=0.1, paper=PaperFigures(macs=2.6, params=16, top1=82.7),
    ),
    "overlock_t": Variant(
        dims=(64, 128, 256, 512), base_depths=(4, 4, 6), overview_depth=2, focus_depths=(12, 2), groups=(8, 16),
        crop_pct=0.95, drop_path=0.15, paper=PaperFigures(macs=5.5, params=33, top1=84.2),
    ),
    "overlock_s": Variant(
        dims=(64, 128, 320, 512), base_depths=(6, 6, 8), overview_depth=3, focus_depths=(16, 3), groups=(16, 32),
        crop_pct=0.95, drop_path=0.4, paper=PaperFigures(macs=9.7, params=56, top1=84.8),
    ),
    "overlock_b": Variant(
        dims=(80, 160, 384, 576), base_depths=(8, 8, 10), overview_depth=4, focus_depths=(20, 4), groups=(12, 18),
        crop_pct=0.975, drop_path=0.5, paper=PaperFigures(macs=16.7, params=95, top1=85.1),
    ),
}  # fmt: skip
"""The sizes of the network by name, those of the paper and two smaller ones."""
