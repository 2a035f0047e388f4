"""Make the pictures of README and docs out of a demo's folder: ``python -m benchmarks.demo_pictures runs/demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.plots import Lines, draw
from benchmarks.report import ROOT
from sagan.explore.page import PageOptions, explorer_page
from sagan.io import atomic_write, atomic_write_text
from sagan.names import figure_font
from sagan.report.figures import attention_at
from sagan.sampling import TrainedGenerator, generate, load_generator, sample_inputs
from sagan.sheets import Sheet, interpolation_sheet, truncation_sheet
from sagan.train.checkpoint import checkpoints_in
from sagan.train.logs import read_rows, series

STATIC = ROOT / "docs" / "_static"
# Dark on light pages too, as the digits are; of 24 pixels a phone leaves 12.
WIDTH, TEXT = 720, 24
PAPER, INK, POINT = "#131416", "#e6e8eb", "#39d98a"
GAP = 6

Row = tuple[Sequence[str], Sequence[Image.Image]]


def sheet(rows: Sequence[Row], columns: int) -> Image.Image:
    """Return rows of square pictures; the titles above a row share its width, and so do the pictures below them."""
    parts = max(len(titles) for titles, _ in rows)
    room = 3 * GAP * (parts - 1)  # between the parts
    side = (WIDTH - GAP - room) // columns - GAP
    font = ImageFont.truetype(str(figure_font()), TEXT)
    heights = [side + GAP + (TEXT + 14 if titles else 0) for titles, _ in rows]
    picture = Image.new("RGB", (WIDTH, sum(heights) + GAP), PAPER)
    pen = ImageDraw.Draw(picture)

    def x_of(column: int) -> int:
        return GAP + column * (side + GAP) + column * parts // columns * 3 * GAP

    y = GAP
    for (titles, images), height in zip(rows, heights, strict=True):
        for part, title in enumerate(titles):
            pen.text((x_of(part * columns // parts) + 2, y), title, fill=INK, font=font)
        for number, image in enumerate(images):
            enlarged = image.resize((side, side), Image.Resampling.BICUBIC)
            picture.paste(enlarged, (x_of(number), y + height - side - GAP))
        y += height
    return picture


def save(picture: Image.Image, path: Path, *, colours: int) -> None:
    """Write a picture as a PNG of few colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, sync=False) as file:
        picture.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)


def pictures(images: Tensor) -> list[Image.Image]:
    """Return uint8 images [N, 3, H, W] as pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]


def real_digits(run: Path, digit: int, count: int) -> list[Image.Image]:
    """Return the first real digits of a class, as the demo enlarged them."""
    paths = sorted((run / "digits" / "train" / str(digit)).iterdir())[:count]
    return [Image.open(path).convert("RGB") for path in paths]


def samples(run: Path, trained: TrainedGenerator, path: Path) -> None:
    """Real digits, then generated ones: the first of each class, not chosen."""
    latents, labels = sample_inputs(range(80), trained.config.network, trained.config.seed + 1)
    generated = generate(trained.generator, latents, labels, batch_size=80)
    rows: list[Row] = []
    for digit in range(10):
        row = real_digits(run, digit, 5) + pictures(generated[labels == digit][:5])
        titles = () if digit else ("real: 8×8, enlarged", "generated")
        rows.append((titles, row))
    save(sheet(rows, 10), path, colours=32)


def strip(run: Path, trained: TrainedGenerator, path: Path) -> None:
    """One row: the first real image of every second digit, and the first generated one."""
    digits = range(0, 10, 2)
    latents, labels = sample_inputs(range(80), trained.config.network, trained.config.seed + 1)
    generated = generate(trained.generator, latents, labels, batch_size=80)
    first = [labels.tolist().index(digit) for digit in digits]
    real = [real_digits(run, digit, 1)[0] for digit in digits]
    row: Row = (
        ("real: 8×8, enlarged", "generated"),
        real + pictures(generated[first]),
    )
    save(sheet([row], 10), path, colours=32)


def attention(run: Path, trained: TrainedGenerator, path: Path) -> None:
    """Real digits, generated ones with a point on the stroke of each, and where attention looks from it."""
    digits = (0, 2, 3, 5, 6, 8)
    latents, labels = sample_inputs(range(10), trained.config.network, trained.config.seed + 1)
    chosen = torch.tensor([labels.tolist().index(digit) for digit in digits])
    generated = generate(trained.generator, latents[chosen], labels[chosen], batch_size=len(digits))
    marked: list[Image.Image] = []
    seen: list[Image.Image] = []
    for number, at in enumerate(chosen):
        point = _on_the_stroke(generated[number])
        images, maps, _ = attention_at(trained.generator, latents[at, None], labels[at, None], [point])
        ((picture,), size) = pictures(images), images.size(2)
        scale = 4  # a round point
        large = picture.resize((size * scale, size * scale), Image.Resampling.BICUBIC)
        heat = torch.nn.functional.interpolate(maps, large.size, mode="bicubic")[0, 0].clamp(min=0)
        colours = matplotlib.colormaps["inferno"]((heat / heat.max()).numpy())[..., :3]
        overlay = Image.fromarray((colours * 255).round().astype("uint8"))
        for target, picture in ((marked, large), (seen, Image.blend(large, overlay, 0.75))):
            middle = [(place + 0.5) * scale for place in reversed(point)]
            box = [*(place - 6 for place in middle), *(place + 6 for place in middle)]
            ImageDraw.Draw(picture).ellipse(box, fill=POINT, outline="white", width=2)
            target.append(picture)
    real = [real_digits(run, digit, 1)[0] for digit in digits]
    rows: list[Row] = [
        (["real digits, 8×8 pixels enlarged"], real),
        (["generated, each with a point"], marked),
        (["where attention looks from that point"], seen),
    ]
    save(sheet(rows, len(digits)), path, colours=256)


def _on_the_stroke(image: Tensor) -> tuple[int, int]:
    """Return row and column of the brightest pixel, the one nearest to the top where several are."""
    row, column = divmod(int(image.float().mean(0).flatten().argmax()), image.size(2))
    return row, column


def curves(run: Path, path: Path) -> None:
    """Losses, gamma and quality over the iterations."""
    metrics, quality = (read_rows(run / name) for name in ("metrics.jsonl", "quality.jsonl"))

    def line(rows: list[dict[str, Any]], key: str) -> dict[float, float]:
        return dict(zip(*series(rows, key), strict=True))

    gammas = {name[6].upper(): line(metrics, name) for name in metrics[0] if name.startswith("gamma_")}
    losses = {"D": line(metrics, "d_loss"), "G": line(metrics, "g_loss")}
    titles = {
        "share": "Generated digits read as their label",
        "diversity": "Distance within a class, as a share of the real digits'",
        "frechet": "Fréchet distance to the real digits, in a classifier's features",
    }
    panels = [
        Lines("", "", losses, "Loss", log=False),
        Lines("", "", gammas, "Gamma of attention", log=False),
    ]
    panels += [
        Lines("", "", {"G": line(quality, key)}, title, log=False)
        for key, title in titles.items()
        if key in quality[0]
    ]
    panels[-1] = Lines("iteration", "", panels[-1].lines, panels[-1].title, log=False)
    draw(path, "The demo learns the digits", panels)


def sheets(trained: TrainedGenerator, out: Path) -> None:
    """What `sample --layout interpolation` and `truncation` draw, with text for phones."""
    options = {"columns": 8, "seed": trained.config.seed + 1, "batch_size": 80}
    classes = torch.tensor([3, 8, 9])
    path = interpolation_sheet(trained, classes, rows=1, class_steps=2, **options)
    _save_sheet(path, out / "demo_interpolation.png")
    sweep = truncation_sheet(trained, classes[:1], [0.25, 0.5, 1.0, None], **options)
    _save_sheet(sweep, out / "demo_truncation.png")


def _save_sheet(drawn: Sheet, path: Path) -> None:
    names = drawn.row_names or []
    images = pictures(drawn.images)
    columns = len(images) // len(names)
    rows: list[Row] = [
        ((name,), images[columns * number : columns * (number + 1)]) for number, name in enumerate(names)
    ]
    save(sheet(rows, columns), path, colours=64)


def explorer(run: Path, path: Path) -> None:
    """The page that explores attention, at the first, the middle and the last iteration that the demo kept."""
    kept = [int(each.stem.rpartition("_")[2]) for each in checkpoints_in(run / "checkpoints")]
    chosen = tuple(dict.fromkeys([kept[0], kept[len(kept) // 2], kept[-1]]))
    options = PageOptions(count=1, real=1, iterations=chosen, max_mib=1.6)
    page = explorer_page(run, torch.device("cpu"), options)
    atomic_write_text(path, page.text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make every picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_pictures", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished demo")
    parser.add_argument("--out", type=Path, default=STATIC, help="folder of the pictures")
    options = parser.parse_args(arguments)
    trained = load_generator(options.run, torch.device("cpu"))
    samples(options.run, trained, options.out / "demo_samples.png")
    strip(options.run, trained, options.out / "demo_strip.png")
    attention(options.run, trained, options.out / "demo_attention.png")
    curves(options.run, options.out / "demo_curves.svg")
    with Image.open(options.run / "attention_maps.png") as maps:
        size = (WIDTH, round(WIDTH * maps.height / maps.width))
        save(maps.convert("RGB").resize(size), options.out / "demo_attention_maps.png", colours=128)
    sheets(trained, options.out)
    explorer(options.run, options.out / "explore_demo.html")
    for path in sorted([*options.out.glob("demo_*"), *options.out.glob("explore_*")]):
        print(f"Wrote {path}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
