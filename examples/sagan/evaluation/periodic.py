"""Evaluation of a run while it trains."""

from __future__ import annotations

from sagan.data import ImageDataset
from sagan.distributed import World
from sagan.evaluation import results
from sagan.evaluation.evaluator import Evaluator
from sagan.evaluation.feature_networks import FeatureNetwork
from sagan.evaluation.real_images import open_real_images, training_images
from sagan.networks import Generator
from sagan.recipes import RunConfig
from sagan.train.loop import Evaluate
from sagan.train.output import Score
from sagan.train.update import Trainer


def periodic_evaluation(
    run: RunConfig, dataset: ImageDataset, world: World, network: FeatureNetwork
) -> Evaluate:
    """Return the function that evaluates a run's G against its training images, or those its configuration names.

    All processes call this together, and then what it returns. Features of the real images are computed here, or read
    from the cache. Each evaluation is written to the run's folder "evaluation".
    """
    config = run.evaluation
    if config.data is None and config.split in (None, run.images.split):
        real_images = training_images(dataset, run)
    else:
        real_images = open_real_images(config, run, list(dataset.class_names), world)
    evaluator = Evaluator(config, real_images, world, network=network, progress=True)
    if world.is_main:
        print(evaluator.describe_real_images() + "\n")

    def evaluate(trainer: Trainer) -> Score:
        generator = trainer.sampling_generator
        assert isinstance(generator, Generator)
        evaluation = evaluator.evaluate(
            generator, trainer.labels_in_use, weights="raw" if trainer.average is None else "ema"
        )
        if world.is_main:
            subject = results.Subject(run.out, trainer.iteration, run.recipe, world.device)
            results.save(evaluation, subject, run.out / "evaluation")
        figure = evaluation.figure(config.best_by)
        return Score(
            value=evaluation.score(config.best_by),
            of=f"{figure.name} of protocol {evaluation.protocol.identity}",
            figures=evaluation.scalars(),
        )

    return evaluate
