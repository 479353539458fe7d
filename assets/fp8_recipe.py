"""Draw assets/fp8_recipe.png: one transformer layer, each tensor's format, and the three GEMMs of a linear layer.

python assets/fp8_recipe.py
"""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

WIDTH, HEIGHT = 1200, 1070  # units of the drawing: pixels at 100 dpi
FP8, FP8_EDGE = "#ffe2c4", "#c2570c"
BF16, BF16_EDGE = "#e4ebf5", "#3b5b8c"
FP32, FP32_EDGE = "#e3f1e2", "#3f7a3d"
INK, FAINT = "#1c1c1c", "#6a6a6a"
SMALL, NORMAL, LARGE = 9.5, 10.5, 13.5


class Drawing:
    """Boxes, arrows and words in pixels, the origin at the top left."""

    def __init__(self):
        self.figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axes.axis("off")

    def text(self, x, y, words, size=NORMAL, color=INK, ha="center", va="center", **more):
        self.axes.text(x, y, words, fontsize=size, color=color, ha=ha, va=va, linespacing=1.25, **more)

    def box(self, x, y, width, height, words, fill, edge, size=NORMAL, weight="normal"):
        shape = FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=6", facecolor=fill, edgecolor=edge, linewidth=1.3
        )
        self.axes.add_patch(shape)
        self.text(x + width / 2, y + height / 2, words, size, weight=weight)

    def arrow(self, start, end, color=INK, width=1.3):
        style = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", xy=end, xytext=start, arrowprops=style)

    def line(self, *points, color=INK, width=1.3):
        self.axes.plot(*zip(*points, strict=True), color=color, linewidth=width, solid_capstyle="butt")

    def matrix(self, x, y, tile, size=88):
        """An operand cut into tiles of `tile` (width, height), the first one filled; without tiles a BF16 result."""
        fill, edge = ("white", FP8_EDGE) if tile else (BF16, BF16_EDGE)
        self.axes.add_patch(Rectangle((x, y), size, size, facecolor=fill, edgecolor=edge, linewidth=1.3))
        if tile is None:
            return
        width, height = tile
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor="#f5a65b", edgecolor="none"))
        for i in range(1, size // width):
            self.line((x + i * width, y), (x + i * width, y + size), color=edge, width=0.8)
        for i in range(1, size // height):
            self.line((x, y + i * height), (x + size, y + i * height), color=edge, width=0.8)


# Name, kind, and for a linear layer its weight's size.
LAYER = [
    ("RMSNorm", "bf16", ""),
    ("qkv", "fp8", "[q+2kv, h]"),
    ("attention\ncore, RoPE", "bf16", ""),
    ("proj", "fp8", "[h, q]"),
    ("+", "add", ""),
    ("RMSNorm", "bf16", ""),
    ("fc1", "fp8", "[2 ffn, h]"),
    ("SwiGLU", "bf16", ""),
    ("fc2", "fp8", "[h, ffn]"),
    ("+", "add", ""),
]


def draw_layer(d: Drawing, top: float) -> None:
    """The layer from left to right, its residual stream above."""
    d.text(30, top, "One transformer layer", LARGE, ha="left", weight="bold")
    legend = [("FP8 E4M3 GEMM", FP8, FP8_EDGE), ("BF16", BF16, BF16_EDGE), ("FP32", FP32, FP32_EDGE)]
    for i, (words, fill, edge) in enumerate(legend):
        x = 830 + (0, 170, 264)[i]
        d.axes.add_patch(Rectangle((x, top - 9), 22, 18, facecolor=fill, edgecolor=edge, linewidth=1.2))
        d.text(x + 30, top, words, ha="left")
    stream, middle, height = top + 62, top + 140, 56
    widths = {"bf16": 100, "fp8": 94, "add": 30}
    gap = (WIDTH - 2 * 40 - sum(widths[kind] for _, kind, _ in LAYER)) / (len(LAYER) + 1)
    x, end = 40.0, WIDTH - 40
    d.line((40, stream), (end - 14, stream), color=BF16_EDGE, width=2.6)
    d.arrow((end - 20, stream), (end, stream), color=BF16_EDGE, width=2.6)
    d.text(44, stream - 17, "residual stream  BF16 [tokens, hidden]", color=BF16_EDGE, ha="left")
    for name, kind, size in LAYER:
        x += gap
        width = widths[kind]
        if kind == "add":
            d.arrow((x - gap, middle), (x + width / 2 - 0.5, middle), color=INK)
            d.line((x + width / 2, middle + 0.6), (x + width / 2, stream + 13))
            d.arrow((x + width / 2, stream + 24), (x + width / 2, stream + 11))
            d.axes.plot(x + width / 2, stream, "o", markersize=16, mfc="white", mec=BF16_EDGE, mew=1.6, zorder=5)
            d.text(x + width / 2, stream, "+", 13, zorder=6)
        else:
            if name == "RMSNorm":
                d.line((x - gap / 2, stream), (x - gap / 2, middle), color=INK)
                d.arrow((x - gap / 2, middle), (x, middle))
            else:
                d.arrow((x - gap, middle), (x, middle))
            fill, edge = (FP8, FP8_EDGE) if kind == "fp8" else (BF16, BF16_EDGE)
            d.box(x, middle - height / 2, width, height, name, fill, edge, weight="bold" if kind == "fp8" else "normal")
            if kind == "fp8":
                d.text(x + width / 2, middle + height / 2 + 17, f"weight {size}", SMALL)
                d.text(x + width / 2, middle + height / 2 + 34, "128x128 blocks", SMALL, color=FP8_EDGE)
        x += width
    d.text(
        WIDTH / 2,
        middle + 96,
        "Every arrow is a BF16 tensor. A linear layer quantises its input, its weight and its output's gradient "
        "itself, and returns BF16.",
        color=FAINT,
    )


PANELS = [
    # Title; both operands: name, size of a tile, what it is, shape; the result: name, what becomes of it, shape.
    (
        "forward   y = x w$^\\mathsf{T}$",
        ("x", (44, 11), "activations\n1x128 along K", "[T, K]"),
        ("w$^\\mathsf{T}$", (44, 44), "weight\n128x128", "[K, N]"),
        ("y", "rounded\nonce", "[T, N]"),
    ),
    (
        "dgrad   dx = g w",
        ("g", (44, 11), "gradient\n1x128 along N", "[T, N]"),
        ("w", (44, 44), "the same codes\n128x128", "[N, K]"),
        ("dx", "rounded\nonce", "[T, K]"),
    ),
    (
        "wgrad   dw = g$^\\mathsf{T}$ x",
        ("g$^\\mathsf{T}$", (44, 11), "gradient\n1x128 along T", "[N, T]"),
        ("x", (11, 44), "activations\n128x1 along T", "[T, K]"),
        ("dw", "added to FP32\nmain gradient", "[N, K]"),
    ),
]


def draw_gemms(d: Drawing, top: float) -> None:
    """Three panels: operands with one tile filled, and the result."""
    d.text(30, top, "The three GEMMs of a linear layer", LARGE, ha="left", weight="bold")
    d.text(
        420,
        top,
        "T tokens, K inputs, N outputs; a filled tile shares one scale; sums in FP32",
        color=FAINT,
        ha="left",
    )
    for i, (title, left, right, result) in enumerate(PANELS):
        x = 30 + i * 388
        d.axes.add_patch(Rectangle((x, top + 24), 364, 232, facecolor="#fafafa", edgecolor="#c8c8c8", linewidth=1))
        d.text(x + 182, top + 46, title, 12.5, weight="bold")
        y = top + 86
        for offset, (name, tile, words, shape) in ((14, left), (140, right)):
            d.text(x + offset + 44, y - 12, f"{name}  {shape}", SMALL)
            d.matrix(x + offset, y, tile)
            d.text(x + offset + 44, y + 128, words, SMALL, color=FP8_EDGE)
            d.text(x + offset + 44, y + 103, "E4M3", SMALL, weight="bold", color=FP8_EDGE)
        d.text(x + 121, y + 44, "x", 13)
        d.text(x + 248, y + 44, "=", 14)
        name, words, shape = result
        d.text(x + 308, y - 12, f"{name}  {shape}", SMALL)
        d.matrix(x + 264, y, None)
        d.text(x + 308, y + 103, "BF16", SMALL, weight="bold", color=BF16_EDGE)
        d.text(x + 308, y + 128, words, SMALL, color=BF16_EDGE)
    d.text(
        30,
        top + 280,
        "x and g are quantised twice, along each GEMM's inner dimension; w once, because a 128x128 block serves both.",
        color=FAINT,
        ha="left",
    )


TABLE = [
    ("tensor", "format", "one scale for", "scale"),
    ("weights of qkv, proj, fc1, fc2", "E4M3", "128x128 block", "power of two (SCALE_FMT=fp32: any)"),
    ("inputs of those layers, forward", "E4M3", "1x128 along hidden", "the same"),
    ("inputs of those layers, wgrad", "E4M3", "128x1 along tokens", "the same"),
    ("gradients of outputs, dgrad and wgrad", "E4M3 (fp8-hybrid: E5M2)", "1x128 and 128x1", "the same"),
    ("embedding, lm_head, norms, biases", "BF16", "-", "-"),
    ("residual stream, RoPE, attention core, SwiGLU", "BF16", "-", "-"),
    ("sums in GEMMs, main gradients", "FP32", "-", "-"),
    ("master weights, both Adam moments", "FP32", "-", "-"),
]


def draw_table(d: Drawing, top: float) -> None:
    d.text(30, top, "Every tensor", LARGE, ha="left", weight="bold")
    columns, row_height = (42, 440, 660, 850), 30
    for i, row in enumerate(TABLE):
        y = top + 40 + i * row_height
        fill, edge = {"E4M3": (FP8, FP8_EDGE), "BF16": (BF16, BF16_EDGE), "FP32": (FP32, FP32_EDGE)}.get(
            row[1].split()[0], ("white", INK)
        )
        rectangle = Rectangle((30, y - row_height / 2), WIDTH - 60, row_height, facecolor=fill, edgecolor="white")
        d.axes.add_patch(rectangle)
        for j, (x, words) in enumerate(zip(columns, row, strict=True)):
            heavy = "bold" if i == 0 or j == 1 else "normal"
            d.text(x, y, words, color=edge if j == 1 else INK, ha="left", weight=heavy)
    y = top + 40 + len(TABLE) * row_height
    d.line((30, top + 40 + row_height / 2), (WIDTH - 30, top + 40 + row_height / 2), width=1)
    d.text(
        30,
        y + 22,
        "Scale of a tile, as TransformerEngine computes it:   s = 448 / amax in FP32,   its mantissa cleared if scales "
        "are powers of two,\ncode = E4M3(x s), rounded to nearest even,   stored scale_inv = 1 / s,   "
        "s = 1 for a tile of zeros.   E5M2: 57344 for 448.",
        ha="left",
        va="center",
    )


def main() -> int:
    plt.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})
    d = Drawing()
    d.text(30, 38, "InfiR2 in FP8: precision fp8", 18, ha="left", weight="bold")
    draw_layer(d, 92)
    draw_gemms(d, 372)
    draw_table(d, 700)
    path = Path(__file__).with_suffix(".png")
    d.figure.savefig(path, dpi=150, metadata={"Software": None})
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
