"""The demo: a class-conditional SAGAN learns handwritten digits, and a classifier judges the result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagan.data import open_dataset
from sagan.demo.digits import Judge, agreement, frechet_to_real, spread_by_class, train_judge, write_digits
from sagan.evaluation.precision_recall import precision_and_recall
from sagan.io import atomic_write_text
from sagan.names import program_name
from sagan.recipes import RunConfig
from sagan.report.figures import class_labels, default_points, draw_attention, save_grid
from sagan.report.page import finish_run
from sagan.sampling import TrainedGenerator, generate, load_generator, sample_inputs
from sagan.train.checkpoint import checkpoints_in
from sagan.train.logs import read_rows
from sagan.train.loop import TrainingResult, train
from sagan.train.update import Trainer

VERDICT_SAMPLES = 2000
CURVE_SAMPLES = 500
TARGET_SHARE = 0.9


@dataclass(frozen=True)
class Verdict:
    """The judge's results for the generated digits."""

    share: float  # of generated digits that the judge reads as their label
    share_by_class: tuple[float, ...]
    diversity: float  # mean distance between two images of a class, as a share of that of the real digits
    diversity_by_class: tuple[float, ...]
    precision: float  # of the generated digits, in the judge's features
    recall: float
    precision_real: (
        float  # of a random half of the real digits against the other half: what a perfect G would reach
    )
    recall_real: float
    frechet: float  # distance between the features of generated and of all real digits
    frechet_real: float  # between a random half of the real digits and all: what a perfect G would reach
    judge_accuracy: float  # on real digits that the judge was not trained on


def run_demo(config: RunConfig, *, progress: bool = True) -> tuple[TrainingResult, Verdict | None]:
    """Write the digits, train on them, judge the result and draw it, all in ``config.out``.

    A second call resumes an interrupted demo; it judges and draws a finished one again, without training. This sets
    the configuration's ``data`` and ``network.num_classes``. The verdict is None if training was interrupted.
    """
    start = time.perf_counter()
    out = config.out
    print(f"1/4  Writing scikit-learn's handwritten digits to {out / 'digits'} as a folder of images")
    dataset = open_dataset(write_digits(out / "digits"), config.network.resolution, config.images)
    check = dataset.check(config.images.check)
    check.save(out)
    print(_indented(check.text))
    dataset = dataset.without(check.unreadable).in_memory(config.images.cache_mib)
    images, labels = dataset.fetch(range(len(dataset)))
    print("2/4  Training the judge, a small classifier, on the real digits")
    judge = train_judge(images, labels)
    print(f"     It reads {judge.accuracy:.1%} of the real digits that it was not trained on.")
    network = replace(config.network, num_classes=dataset.num_classes)
    config = replace(config, data=out / "digits", network=network)
    print(f"3/4  Training SAGAN for {config.iterations} iterations of {config.batch_size} images")
    resume = bool(checkpoints_in(out / "checkpoints"))
    if resume:
        print(f"     {out} already holds this run: resuming. Delete the folder to start again.")
    observe = quality_curve(judge, out / "quality.jsonl")
    result = train(config, dataset, resume=resume, progress=progress, observe=observe)
    if result.interrupted:
        return result, None
    print("4/4  Judging the result")
    trained = load_generator(result.checkpoint, torch.device("cpu"))
    verdict, samples = _judge_samples(trained, judge, images)
    real = [images[labels == digit][:10] for digit in range(10)]
    beside = torch.cat([each for pair in zip(samples, real, strict=True) for each in pair])
    atomic_write_text(out / "verdict.json", json.dumps(vars(verdict), indent=2) + "\n")
    headings = ("generated", "real: 8x8 pixels, enlarged to 32")
    save_grid(
        out / "samples.png", beside, columns=20, row_names=dataset.class_names, headings=headings, gap=4
    )
    _draw_attention(trained, out / "attention_maps.png")
    finish_run(out)
    print(_indented(describe(verdict)))
    print(_indented(_what_was_written(out)))
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"     The demo took {minutes} min {seconds} s.")
    return result, verdict


def describe(verdict: Verdict) -> str:
    """Return the verdict in plain words."""
    passed = "reached" if verdict.share >= TARGET_SHARE else "NOT reached"
    right, diversity = (
        "  ".join(f"{digit}: {share:.0%}" for digit, share in enumerate(shares))
        for shares in (verdict.share_by_class, verdict.diversity_by_class)
    )
    return (
        f"VERDICT: the judge reads {verdict.share:.1%} of {VERDICT_SAMPLES} generated digits as their label "
        f"(goal {TARGET_SHARE:.0%}: {passed}).\n"
        f"By digit: {right}\n"
        f"Diversity, the distance between two images of a digit: {verdict.diversity:.0%} of the real digits'.\n"
        f"By digit: {diversity}\n"
        f"Precision {verdict.precision:.2f} and recall {verdict.recall:.2f} in the judge's features "
        f"(half of the real digits against the rest: {verdict.precision_real:.2f} and {verdict.recall_real:.2f}).\n"
        f"Frechet distance to the real digits in the judge's features: {verdict.frechet:.2f} "
        f"(a random half of the real digits: {verdict.frechet_real:.2f})."
    )


def quality_curve(judge: Judge, path: Path) -> Callable[[Trainer], None]:
    """Return a function that judges the current G and adds a row to a JSON-lines file."""

    def observe(trainer: Trainer) -> None:
        latents, labels = sample_inputs(range(CURVE_SAMPLES), trainer.config.network, trainer.config.seed)
        images = generate(trainer.sampling_generator, latents, labels, batch_size=100)
        row = {
            "iteration": trainer.iteration,
            "share": agreement(judge, images, labels).double().mean().item(),
            "frechet": frechet_to_real(judge, images),
            "diversity": (spread_by_class(images, labels) / judge.real_spread).mean().item(),
        }
        # A resumed run repeats the iterations since its checkpoint.
        earlier = [old for old in _read_rows(path) if old["iteration"] < trainer.iteration]
        atomic_write_text(path, "".join(json.dumps(each) + "\n" for each in [*earlier, row]))

    return observe


def _judge_samples(trained: TrainedGenerator, judge: Judge, real: Tensor) -> tuple[Verdict, list[Tensor]]:
    """Return the verdict on new samples, and the first ten of each digit."""
    seed, classes = trained.config.seed + 1, trained.labels_in_use
    latents, labels = sample_inputs(range(VERDICT_SAMPLES), trained.config.network, seed, classes)
    images = generate(trained.generator, latents, labels, batch_size=100)
    right = agreement(judge, images, labels).double()
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    half, rest = order[: len(real) // 2], order[len(real) // 2 :]
    diversity = (spread_by_class(images, labels) / judge.real_spread).tolist()
    with torch.no_grad():
        precision, recall = precision_and_recall(judge.real_features, judge.classifier.features(images))
    of_real = precision_and_recall(judge.real_features[rest], judge.real_features[half])
    verdict = Verdict(
        share=right.mean().item(),
        share_by_class=tuple(right[labels == digit].mean().item() for digit in range(10)),
        diversity=sum(diversity) / 10,
        diversity_by_class=tuple(diversity),
        precision=precision,
        recall=recall,
        precision_real=of_real[0],
        recall_real=of_real[1],
        frechet=frechet_to_real(judge, images),
        frechet_real=frechet_to_real(judge, real[half]),
        judge_accuracy=judge.accuracy,
    )
    return verdict, [images[labels == digit][:10] for digit in range(10)]


def _draw_attention(trained: TrainedGenerator, path: Path) -> None:
    network = trained.config.network
    latents, labels = sample_inputs(range(10), network, trained.config.seed + 1)
    names = class_labels(trained.class_names, labels.tolist())
    draw_attention(path, trained.generator, latents, labels, default_points(network.resolution), names=names)


def _what_was_written(out: Path) -> str:
    return f"""
Written to {out}:
  samples.png         ten generated digits of each class beside ten real ones, which have 8x8 pixels
  samples/            samples during training, always of the same latents;  attention/  their attention maps
  attention_maps.png  attention of chosen points
  curves.png          losses, gamma, share with the right label, distance, diversity;  report.html  all in one page
  verdict.json        the figures above
  metrics.jsonl       all logged numbers;  config.json  the whole configuration
  checkpoints/        weights and everything else needed to resume

Next:
  {program_name()} sample --source {out} --out samples
  {program_name()} explore --source {out} --out explore.html

To train on ImageNet, or on any folder with a folder of images for each class:
  {program_name()} train --data /path/to/imagenet --out runs/imagenet
with images in /path/to/imagenet/train/n01440764/*.JPEG and so on. It checks all images first.
"""


def _indented(text: str) -> str:
    return "\n".join("     " + line if line else "" for line in text.strip("\n").splitlines())


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.exists() else []
