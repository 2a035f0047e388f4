"""The diagrams of the pages, as SVG: ``python -m benchmarks.diagrams``. Building the documentation draws them, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.report import ROOT
from benchmarks.style import GREEN, GREY, OURS, PAPER, PURPLE, SMALL, STYLE_SHEET, TEXT, VERMILLION, WIDTH

FOLDER = ROOT / "docs" / "_static" / "diagrams"
LINE = 19  # pixels from one line of text to the next

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """Where a box is, for arrows to and from it."""

    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> Point:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        return self.x + self.width / 2, self.y + self.height

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2


class Drawing:
    """An SVG picture of WIDTH pixels with boxes, arrows and text; its ink is the page's.

    Args:
        height: in pixels.
        title: what it shows, for those who cannot see it.
    """

    def __init__(self, height: float, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{WIDTH}" height="{height:g}" '
            f'viewBox="0 0 {WIDTH} {height:g}">',
            f"<title>{escape(title)}</title>",
            STYLE_SHEET,
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="currentColor"/></marker></defs>',
            f'<rect class="paper" width="{WIDTH}" height="{height:g}" fill="{PAPER}"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        *lines: str,
        anchor: str = "middle",
        size: int = TEXT,
        bold: bool = False,
        color: str = "currentColor",
    ) -> None:
        """Write lines; ``y`` is the middle of the first."""
        weight = ' font-weight="bold"' if bold else ""
        for number, line in enumerate(lines):
            self._parts.append(
                f'<text x="{x:g}" y="{y + number * LINE + size * 0.35:.1f}" text-anchor="{anchor}" '
                f'style="font-size: {size}px" fill="{color}"{weight}>{escape(line)}</text>'
            )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        *lines: str,
        color: str | None = None,
        dashed: bool = False,
        height: float | None = None,
    ) -> Box:
        """Draw a box with centred lines, the first bold; a colour fills it lightly."""
        height = height or 14 + LINE * len(lines)
        fill = (
            f'fill="{color}" fill-opacity="0.14" stroke="{color}"'
            if color
            else 'fill="none" stroke="currentColor"'
        )
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" {fill} '
            f'stroke-width="1.4"{dashes}/>'
        )
        start = y + height / 2 - LINE * (len(lines) - 1) / 2
        for number, line in enumerate(lines):
            self.text(
                x + width / 2,
                start + number * LINE,
                line,
                bold=number == 0,
                size=TEXT if number == 0 else SMALL,
            )
        return Box(x, y, width, height)

    def arrow(self, *points: Point, dashed: bool = False) -> None:
        """Draw an arrow along points."""
        path = " ".join(f"{'L' if number else 'M'}{x:g} {y:g}" for number, (x, y) in enumerate(points))
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.4"{dashes} marker-end="url(#tip)"/>'
        )

    def line(
        self, points: Iterable[Point], *, color: str = "currentColor", width: float = 1.4, dashes: str = ""
    ) -> None:
        """Draw a line along points."""
        path = " ".join(f"{'L' if number else 'M'}{x:.1f} {y:.1f}" for number, (x, y) in enumerate(points))
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{dashed}/>'
        )

    def area(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Fill a rectangle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{color}" fill-opacity="0.35"/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


def self_attention() -> Drawing:
    """The block, with shapes."""
    d = Drawing(
        622, "SelfAttention2d: three 1x1 convolutions of x; keys and values are pooled; y = x + gamma out"
    )
    x = d.box(125, 8, 220, "x", "[N, C, H, W]")
    query = d.box(4, 104, 144, "query", "1×1 conv", "C → C/8")
    key = d.box(163, 104, 144, "key", "1×1 conv", "C → C/8")
    value = d.box(322, 104, 144, "value", "1×1 conv", "C → C/2")
    for box in (query, key, value):
        d.arrow(x.bottom, (x.bottom[0], 80), (box.top[0], 80), box.top)
    key_pool = d.box(163, 200, 144, "max-pool 2×2")
    value_pool = d.box(322, 200, 144, "max-pool 2×2")
    d.arrow(key.bottom, key_pool.top)
    d.arrow(value.bottom, value_pool.top)
    for pool, text in ((query, "[N, L, C/8]"), (key_pool, "[N, S, C/8]"), (value_pool, "[N, S, C/2]")):
        d.text(pool.bottom[0] + 8, 262, text, anchor="start", size=SMALL)
    weights = d.box(4, 288, 303, "softmax(query · keyᵀ)", "over the S keys, no 1/√d", color=OURS)
    d.arrow(query.bottom, (query.bottom[0], weights.y))
    d.arrow(key_pool.bottom, (key_pool.bottom[0], weights.y))
    product = d.box(84, 384, 304, "weights · value", "[N, L, C/2]", color=OURS)
    d.arrow(weights.bottom, (weights.bottom[0], product.y))
    d.text(164, 362, "[N, L, S]", anchor="start", size=SMALL)
    d.arrow(value_pool.bottom, (value_pool.bottom[0], 362), (350, 362), (350, product.y))
    out = d.box(125, 464, 220, "out", "1×1 conv, C/2 → C")
    d.arrow(product.bottom, out.top)
    result = d.box(125, 552, 220, "y = x + γ · out", "[N, C, H, W]")
    d.arrow(out.bottom, result.top)
    d.text(247, 534, "× γ, which starts at 0", anchor="start", size=SMALL)
    d.text(4, 480, "L = H · W", "S = ⌊H/2⌋·⌊W/2⌋", anchor="start", size=SMALL)
    d.arrow(x.right, (475, x.right[1]), (475, result.right[1]), result.right)
    return d


def attention_blocks() -> Drawing:
    """One block of queries at a time."""
    d = Drawing(392, "Attention by blocks of queries: only the weights of one block are in memory")
    d.text(8, 18, "One block of queries at a time", anchor="start", bold=True)
    left, top, width, height, rows = 120, 92, 150, 220, 44
    y = top + 88
    d.box(24, top, 40, height=height)
    d.area(24, y, 40, rows, OURS)
    d.box(left, 50, width, height=28)
    d.area(left, 50, width, 28, VERMILLION)
    d.box(left, top, width, height=height, dashed=True)
    d.area(left, y, width, rows, OURS)
    d.box(310, top, 46, height=width)
    d.area(310, top, 46, width, VERMILLION)
    d.box(410, top, 46, height=height)
    d.area(410, y, 46, rows, OURS)
    d.text(44, top + height + 18, "query", "L × E", size=SMALL)
    d.text(left + width / 2, 64, "all keys, S × E", size=SMALL)
    d.text(left + width / 2, y + 14, "weights of", "one block", size=SMALL)
    d.text(left + width / 2, top + 34, "L × S weights:", "never whole", size=SMALL)
    d.text(333, top + width + 18, "value", "S × Ev", size=SMALL)
    d.text(433, top + height + 18, "y", "L × Ev", size=SMALL)
    d.arrow((64, y + 22), (left - 2, y + 22))
    d.arrow((left + width, y + 22), (306, y + 22))
    d.arrow((356, y + 22), (408, y + 22))
    d.text(
        8, 372, "Backward computes a block's weights again, unless they are few.", anchor="start", size=SMALL
    )
    return d


def spectral_norm() -> Drawing:
    """The power iteration, and when u and v are stored."""
    d = Drawing(
        512, "A power iteration from the stored u gives v, u and sigma; the weight is divided by sigma"
    )
    stored = d.box(8, 16, 130, "u", "stored")
    v = d.box(186, 16, 130, "v", "Wᵀu / ‖Wᵀu‖", color=OURS)
    u = d.box(342, 16, 130, "u", "Wv / ‖Wv‖", color=OURS)
    d.arrow(stored.right, v.left)
    d.arrow(v.right, u.left)
    sigma = d.box(186, 116, 130, "σ = uᵀ W v", color=OURS)
    d.arrow(u.bottom, (u.bottom[0], sigma.left[1]), sigma.right)
    d.arrow(v.bottom, sigma.top)
    weight = d.box(186, 196, 130, "W / σ", "used by forward", color=OURS)
    d.arrow(sigma.bottom, weight.top)
    w = d.box(342, 196, 130, "W", "the parameter")
    d.arrow(w.left, weight.right)
    d.arrow(sigma.left, (stored.bottom[0], sigma.left[1]), stored.bottom, dashed=True)
    d.text(78, 92, "u and v stored,", "in training only", anchor="start", size=SMALL)
    d.text(8, 286, "A forward ...", anchor="start", bold=True)
    d.text(292, 286, "iterates", bold=True)
    d.text(418, 286, "stores u and v", bold=True)
    rows = (
        ("in training", "yes", "yes"),
        ("in frozen_spectral_norm", "yes", "no"),
        ("in evaluation", "yes", "no"),
        ("the two above with", "no", "no"),
    )
    for number, (name, iterates, stores) in enumerate(rows):
        y = 320 + 34 * number
        d.line([(8, y - 17), (472, y - 17)], width=0.6)
        d.text(8, y, name, anchor="start")
        for x, answer in ((292, iterates), (418, stores)):
            d.text(x, y, answer, bold=answer == "yes", color=GREEN if answer == "yes" else "currentColor")
    d.text(8, 442, "iterate_when_frozen=False", anchor="start")
    d.text(8, 484, "Autograd takes u and v as constants: ∂σ/∂W = u vᵀ.", anchor="start", size=SMALL)
    return d


def resampling() -> Drawing:
    """Composed and as one operation."""
    d = Drawing(
        500, "Upsampling and convolution, convolution and pooling: two operations, or one with fewer products"
    )
    for top, title, steps, fused, note in (
        (
            0,
            "upsample=2",
            (("x", "h × w"), ("nearest ×2", "2h × 2w"), ("3×3 conv", "2h × 2w")),
            ("one transposed convolution, stride 2", "folded: 4/9 of the products; filtered: 1/4"),
            "every pixel four times, then 9 products for each",
        ),
        (
            252,
            "downsample=2",
            (("x", "2h × 2w"), ("3×3 conv", "2h × 2w"), ("mean 2×2", "h × w")),
            ("one convolution, stride 2", "folded: 4/9 of the products; filtered: 1/4"),
            "9 products for each value, then means of four",
        ),
    ):
        d.text(8, top + 18, title, anchor="start", bold=True)
        boxes = [d.box(8 + 166 * number, top + 40, 132, *lines) for number, lines in enumerate(steps)]
        d.arrow(boxes[0].right, boxes[1].left)
        d.arrow(boxes[1].right, boxes[2].left)
        d.text(88, top + 116, note, anchor="start", size=SMALL)
        one = d.box(90, top + 150, 300, *fused, color=OURS)
        d.arrow(boxes[0].bottom, (boxes[0].bottom[0], one.left[1]), one.left)
        at = boxes[2].bottom[0] + 30
        d.arrow(one.right, (at, one.right[1]), (at, boxes[2].bottom[1]))
        d.text(240, top + 216, "the same result", size=SMALL)
    return d


def conditional_batch_norm() -> Drawing:
    """Statistics of the batch, gain and bias of the class."""
    d = Drawing(440, "Conditional batch norm: statistics of the batch, gain and bias of each image's class")
    x = d.box(8, 16, 150, "x", "[N, C, H, W]")
    labels = d.box(322, 16, 150, "labels", "[N]")
    statistics = d.box(8, 116, 206, "mean μ, variance σ²", "[C], over N, H and W", "of all classes together")
    d.arrow(x.bottom, (x.bottom[0], statistics.y))
    tables = d.box(266, 116, 206, "tables", "gain and bias", "[classes, C] each", color=OURS)
    d.arrow(labels.bottom, (labels.bottom[0], tables.y))
    normal = d.box(8, 234, 206, "(x − μ) / √(σ² + ε)")
    d.arrow(statistics.bottom, normal.top)
    chosen = d.box(266, 234, 206, "gain, bias of each image", "[N, C] each", color=OURS)
    d.arrow(tables.bottom, chosen.top)
    y = d.box(90, 326, 300, "y = gain · normalised + bias", "[N, C, H, W]", color=OURS)
    d.arrow(normal.bottom, (normal.bottom[0], y.y))
    d.arrow(chosen.bottom, (chosen.bottom[0], y.y))
    d.text(240, 400, 'then ReLU, in the same pass, with activation="relu"', size=SMALL)
    d.text(240, 424, "evaluation takes the running statistics for μ and σ²", size=SMALL)
    return d


def projection_head() -> Drawing:
    """Features and class embedding make a logit."""
    d = Drawing(396, "Projection head: ReLU, sum, a linear layer, plus the product with the class embedding")
    x = d.box(8, 16, 206, "features", "[N, C, H, W]")
    pooled = d.box(8, 116, 206, "h = Σ ReLU(features)", "[N, C], sum over H and W")
    d.arrow(x.bottom, pooled.top)
    labels = d.box(266, 16, 206, "labels", "[N]")
    embedding = d.box(266, 116, 206, "e = embedding[label]", "SNEmbedding, [N, C]", color=OURS)
    d.arrow(labels.bottom, embedding.top)
    linear = d.box(8, 222, 206, "w · h + b", "SNLinear, [N, 1]", color=OURS)
    d.arrow(pooled.bottom, linear.top)
    inner = d.box(266, 222, 206, "⟨e, h⟩", "[N, 1]", color=OURS)
    d.arrow(embedding.bottom, inner.top)
    d.arrow((214, 160), (300, inner.y))
    logit = d.box(108, 328, 264, "logit = w · h + b + ⟨e, h⟩", "[N, 1]")
    d.arrow(linear.bottom, (linear.bottom[0] + 30, logit.y))
    d.arrow(inner.bottom, (inner.bottom[0] - 30, logit.y))
    return d


def losses() -> Drawing:
    """Hinge and softplus against the logit."""
    d = Drawing(
        424, "D's hinge and softplus losses of real and generated images, and G's loss, against the logit"
    )
    x0, y0, unit = 240, 262, 62

    def curve(function: Callable[[float], float], color: str, dashes: str = "") -> None:
        points = [(step / 20, function(step / 20)) for step in range(-60, 61)]
        shown = [(x0 + x * unit, y0 - y * unit) for x, y in points if -1.55 <= y <= 3.2]
        d.line(shown, color=color, width=2.4, dashes=dashes)

    for tick in range(-3, 4):
        d.line([(x0 + tick * unit, y0 - 3.2 * unit), (x0 + tick * unit, y0 + 1.55 * unit)], width=0.25)
        d.text(x0 + tick * unit + (12 if tick == 0 else 0), y0 + 14, f"{tick}".replace("-", "−"), size=SMALL)
    for tick in range(-1, 4):
        d.line([(x0 - 3 * unit, y0 - tick * unit), (x0 + 3 * unit, y0 - tick * unit)], width=0.25)
        if tick:
            d.text(x0 - 3 * unit - 8, y0 - tick * unit, f"{tick}".replace("-", "−"), size=SMALL, anchor="end")
    d.line([(x0 - 3 * unit, y0), (x0 + 3 * unit, y0)])
    d.line([(x0, y0 - 3.2 * unit), (x0, y0 + 1.55 * unit)])
    curve(lambda t: max(0.0, 1 - t), OURS)
    curve(lambda t: math.log1p(math.exp(-t)), OURS, "6 4")
    curve(lambda t: max(0.0, 1 + t), VERMILLION)
    curve(lambda t: math.log1p(math.exp(t)), VERMILLION, "6 4")
    curve(lambda t: -t, PURPLE)
    d.text(468, y0 - 12, "logit", anchor="end", size=SMALL)
    d.text(x0 + 8, y0 - 3.2 * unit - 8, "loss", anchor="start", size=SMALL)
    for number, (color, dashes, text) in enumerate(
        (
            (OURS, "", "D, real: hinge"),
            (VERMILLION, "", "D, fake: hinge"),
            (PURPLE, "", "G (both): −logit"),
            (OURS, "6 4", "D, real: softplus"),
            (VERMILLION, "6 4", "D, fake: softplus"),
        )
    ):
        x, y = 16 + 156 * (number % 3), 386 + 22 * (number // 3)
        d.line([(x, y), (x + 24, y)], color=color, width=2.4, dashes=dashes)
        d.text(x + 30, y, text, anchor="start", size=SMALL)
    return d


def training_step() -> Drawing:
    """The passes of D's and G's update."""
    d = Drawing(
        640, "A training step: D's update on generated and real images at once, G's update, G's average"
    )
    d.text(4, 16, "shared_spectral_norm(G) around both: its u and v move once", anchor="start", size=SMALL)
    d.box(4, 34, 472, height=272, dashed=True)
    d.text(16, 54, "DiscriminatorPass", anchor="start", bold=True)
    latents = d.box(16, 86, 120, "latents")
    g = d.box(180, 78, 120, "G", "no graph", color=GREY)
    fake = d.box(344, 86, 120, "fake")
    d.arrow(latents.right, g.left)
    d.arrow(g.right, fake.left)
    network = d.box(180, 156, 284, "D, once on both", "its u and v move once", color=OURS)
    real = d.box(16, 163, 120, "real")
    d.arrow(real.right, network.left)
    d.arrow(fake.bottom, (fake.bottom[0], network.y))
    loss = d.box(180, 236, 284, "hinge loss of D", "backward: gradients of D's weights")
    d.arrow(network.bottom, loss.top)
    step = d.box(16, 246, 120, "D's Adam", color=OURS)
    d.arrow(loss.left, step.right)
    d.box(4, 322, 472, height=244, dashed=True)
    d.text(16, 342, "GeneratorPass", anchor="start", bold=True)
    latents = d.box(16, 374, 120, "latents")
    g = d.box(180, 366, 120, "G", "same weights", color=OURS)
    network = d.box(344, 366, 120, "D", "as a constant", color=GREY)
    d.arrow(latents.right, g.left)
    d.arrow(g.right, network.left)
    d.text(396, 446, "frozen: its u and v stay", anchor="end", size=SMALL)
    loss = d.box(180, 470, 284, "−mean(logits)", "backward through D:", "gradients of G's weights only")
    d.arrow(network.bottom, (network.bottom[0], loss.y))
    step = d.box(16, 490, 120, "G's Adam", color=OURS)
    d.arrow(loss.left, step.right)
    average = d.box(16, 592, 284, "moving average of G's weights")
    d.arrow(step.bottom, (step.bottom[0], average.y))
    return d


def one_call() -> Drawing:
    """A call through the files of an operation."""
    d = Drawing(520, "One call of SelfAttention2d through the files of sagan_layers/attention")
    d.box(4, 4, 472, height=402, dashed=True)
    d.text(16, 24, "sagan_layers/attention/", anchor="start", bold=True)
    module = d.box(16, 44, 448, "module.py", "SelfAttention2d: parameters, and a short forward")
    functional = d.box(16, 118, 448, "functional.py", "self_attention_2d, attention: checks, plain tensors")
    table = d.box(16, 192, 448, "table.py", 'the backends; "auto" takes the first that can serve')
    d.arrow(module.bottom, functional.top)
    d.arrow(functional.bottom, table.top)
    names = (
        ("fused", "block"),
        ("triton", "CUDA"),
        ("sdpa", "torch's"),
        ("chunked", "any"),
        ("reference", "defines"),
    )
    for number, lines in enumerate(names):
        box = d.box(12 + 92 * number, 282, 88, *lines, color=OURS if number < 4 else GREY)
        d.arrow((box.top[0], table.y + table.height), box.top)
    d.text(240, 354, "autograd.py", bold=True)
    d.text(240, 376, "makes kernels differentiable, twice", size=SMALL)
    d.line([(16, 340), (464, 340)], width=0.6)
    files = (
        ("checks.py", "expected, got"),
        ("backends.py", "select, force"),
        ("torch_support.py", "dtypes, tracing"),
    )
    for number, lines in enumerate(files):
        box = d.box(4 + 160 * number, 446, 152, *lines, color=VERMILLION)
        d.arrow((box.top[0], 408), box.top)
    return d


DIAGRAMS: Sequence[Callable[[], Drawing]] = (
    self_attention,
    attention_blocks,
    spectral_norm,
    resampling,
    conditional_batch_norm,
    projection_head,
    losses,
    training_step,
    one_call,
)


def write(folder: Path = FOLDER) -> None:
    """Draw every diagram; files that do not change are not touched."""
    folder.mkdir(parents=True, exist_ok=True)
    for diagram in DIAGRAMS:
        path, text = folder / f"{diagram.__name__}.svg", str(diagram())
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
