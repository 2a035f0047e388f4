"""The evaluator, its cache of real features, and several processes that evaluate as one."""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean
from tempfile import mkdtemp
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import torch.distributed as dist
from feature_modules import SmallNetwork
from several_processes import results_by_rank
from torch import Tensor
from training_runs import assert_same

from sagan.data import ImageDataset
from sagan.distributed import World
from sagan.errors import NotFiniteError, UserError, check_finite
from sagan.evaluation import results
from sagan.evaluation.config import METRICS, EvaluationConfig, TrainingEvaluationConfig
from sagan.evaluation.evaluator import Evaluator
from sagan.evaluation.feature_networks import FeatureNetwork, proxy_network
from sagan.evaluation.fid import Moments, frechet_distance_of_features, frechet_distance_of_moments
from sagan.evaluation.protocol import FIGURES, Protocol, ProtocolError
from sagan.evaluation.real_features import RealFeaturesError
from sagan.evaluation.real_images import RealImages
from sagan.evaluation.results import Evaluation
from sagan.io import file_sha256
from sagan.networks import Generator, NetworkConfig
from sagan.sampling import generate, sample_inputs

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
LABELS = torch.tensor([0, 1, 2])
SUBJECT = results.Subject(Path("run"), 7, "paper", CPU)


class InMemory(ImageDataset):
    """Images of three classes, each with another brightness."""

    class_names = ("ant", "bee", "cat")
    num_classes = 3
    resolution = 32
    cached = True

    def __init__(self, images: Tensor, labels: Tensor, name: str) -> None:
        self.images, self.labels, self.name, self.failures = images, labels, name, []

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.images[list(indices)], self.labels[list(indices)]

    def fingerprint(self) -> str:
        return self.name

    def check(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError


def network() -> FeatureNetwork:
    return FeatureNetwork(SmallNetwork(), "small", digest="5" * 64, resize="none", device=CPU, resolution=32)


def real_images_of(count: int = 47, seed: int = 0) -> RealImages:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(100, (count, 3, 32, 32), generator=draws, dtype=torch.uint8)
    images += (40 * labels).to(torch.uint8)[:, None, None, None]
    return RealImages(InMemory(images, labels, f"in memory {count} {seed}"), "train")


def generator_of(num_classes: int = 3, resolution: int = 32) -> Generator:
    config = NetworkConfig(
        resolution, base_width=2, num_classes=num_classes, latent_dim=6, g_attention=(16,), d_attention=()
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = Generator(config)
        for parameter in generator.parameters():  # so that images differ visibly
            parameter.data += 0.1 * torch.randn_like(parameter)
    return generator.eval()


def evaluator_of(
    folder: Path, world: World = ALONE, real_images: RealImages | None = None, **options: Any
) -> Evaluator:
    options = {"metrics": METRICS, "count": 53, "block_size": 10, "cache": folder / "cache", **options}
    return Evaluator(EvaluationConfig(**options), real_images or real_images_of(), world, network=network())


def evaluate(folder: Path, world: World = ALONE, **options: Any) -> Evaluation:
    return evaluator_of(folder, world, **options).evaluate(generator_of(), LABELS, weights="ema")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluate(tmp_path_factory.mktemp("evaluation"))


class TestFigures:
    def test_are_those_of_all_samples_and_all_real_images_at_once(self, evaluation: Evaluation) -> None:
        latents, labels = sample_inputs(range(53), generator_of().config, 0, LABELS)
        features, _ = network()(generate(generator_of(), latents, labels, batch_size=10))
        dataset = real_images_of().dataset
        real, _ = network()(dataset.images)
        fid = frechet_distance_of_moments(Moments.of(real), Moments.of(features))
        by_class = {
            name: frechet_distance_of_features(real[dataset.labels == label], features[labels == label])
            for label, name in enumerate(dataset.class_names)
        }
        assert evaluation.figure("fid").value == pytest.approx(fid, rel=1e-5)
        assert evaluation.by_class == pytest.approx(by_class, rel=1e-5)
        assert evaluation.figure("intra-fid").value == pytest.approx(mean(by_class.values()), rel=1e-5)

    def test_are_named_by_their_protocol(self, evaluation: Evaluation) -> None:
        assert [figure.name for figure in evaluation.figures] == [
            "fid53-train-small",
            "is53-small",
            "kid53-train-small",
            "intra-fid53-train-small",
            "precision53-train-small",
            "recall53-train-small",
        ]
        assert next(iter(evaluation.scalars())) == "evaluation/fid53-train-small"
        for figure in evaluation.figures:
            assert figure.name in results.markdown_row(evaluation, SUBJECT)

    def test_a_lower_score_is_better(self, evaluation: Evaluation) -> None:
        assert evaluation.score() == evaluation.figure("fid").value
        assert evaluation.score("is") == -evaluation.figure("is").value
        with pytest.raises(UserError, match="metric: expected one of fid, is, kid"):
            evaluation.score("pr")

    def test_real_images_scores_are_shown_and_saved(self, evaluation: Evaluation, tmp_path: Path) -> None:
        facts = evaluation.real_facts
        assert facts.count == 47
        assert facts.inception_score[0] >= 1
        assert 0 < facts.half_distance < evaluation.figure("fid").value
        table = results.table(evaluation, SUBJECT)
        assert f"Inception Score {facts.inception_score[0]:.2f} +- {facts.inception_score[1]:.2f}" in table
        assert f"FID of a random half to the other {facts.half_distance:.4g}" in table
        values = json.loads(results.save(evaluation, SUBJECT, tmp_path).read_text())
        assert values["reals"]["inception_score"] == list(facts.inception_score)
        assert values["reals"]["half_distance"] == facts.half_distance
        assert values["figures"]["is53-small"]["deviation"] == evaluation.figure("is").deviation
        assert values["protocol"]["identity"] == evaluation.protocol.identity

    def test_evaluated_again_adds_no_second_row(self, evaluation: Evaluation, tmp_path: Path) -> None:
        for subject in (SUBJECT, SUBJECT, replace(SUBJECT, iteration=8)):
            results.save(evaluation, subject, tmp_path)
        assert len((tmp_path / results.RESULTS).read_text().splitlines()) == 4

    def test_generator_and_random_state_do_not_change(self, tmp_path: Path) -> None:
        generator = generator_of().train()
        before = copy.deepcopy(generator.state_dict())
        state = torch.random.get_rng_state()
        for statistics in ("running", "batch", "standing"):
            evaluator = evaluator_of(tmp_path, bn_statistics=statistics, standing_batches=2)
            evaluator.evaluate(generator, LABELS, weights="raw")
        assert generator.training
        assert torch.equal(torch.random.get_rng_state(), state)
        assert_same(generator.state_dict(), before)

    def test_options_change_samples_and_names(self, evaluation: Evaluation, tmp_path: Path) -> None:
        checksums = {evaluation.samples_checksum}
        for options, name in (
            ({"bn_statistics": "batch"}, "fid53-train-small-batch"),
            ({"bn_statistics": "standing", "standing_batches": 3}, "fid53-train-small-standing"),
            ({"truncation": 0.5}, "fid53-train-small-trunc0.5"),
            ({"sample_seed": 1}, "fid53-train-small"),
        ):
            other = evaluate(tmp_path, metrics=("fid",), **options)
            assert other.figure("fid").name == name
            assert other.protocol.identity != evaluation.protocol.identity
            checksums.add(other.samples_checksum)
        assert len(checksums) == 5

    def test_classes_with_one_real_image_are_skipped_and_named(self, tmp_path: Path) -> None:
        dataset = real_images_of().dataset
        keep = (dataset.labels != 2) | (torch.arange(47) == 2)
        few = InMemory(dataset.images[keep], dataset.labels[keep], "few of 2")
        found = evaluate(tmp_path, real_images=RealImages(few, "train"), metrics=("intra-fid",))
        assert found.skipped_classes == ("cat",)
        assert list(found.by_class or ()) == ["ant", "bee"]
        assert "skipped by intra-FID, with fewer than 2 real images: cat" in results.table(found, SUBJECT)

    def test_figures_of_the_proxy_are_labelled_everywhere(self, tmp_path: Path) -> None:
        config = EvaluationConfig(proxy=True, count=40, block_size=10, cache=tmp_path)
        evaluator = Evaluator(config, real_images_of(), ALONE)
        found = evaluator.evaluate(generator_of(), LABELS, weights="raw")
        assert [figure.name for figure in found.figures] == ["proxy-fid40-train-randomconv-raw"]
        assert list(found.scalars()) == ["evaluation/proxy-fid40-train-randomconv-raw"]
        table = results.table(found, SUBJECT)
        assert "PROXY figures" in table
        assert " FID" not in table.replace("published FIDs", "")
        assert "proxy's Frechet distance" in evaluator.describe_real_images()
        assert found.to_dict()["protocol"]["proxy"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"metrics": ("fid", "fid")}, "metrics: expected some of fid, is"),
            ({"metrics": ("FID",)}, "metrics: expected some of fid, is"),
            ({"count": 19}, "count: expected at least 20, got 19"),
            ({"block_size": 0}, "block_size: expected at least 1, got 0"),
            ({"sample_seed": -1}, "sample_seed: expected at least 0, got -1"),
            ({"bn_statistics": "none"}, "bn_statistics: expected running, batch or standing"),
            ({"truncation": 0.0}, r"truncation: expected at least 0\.02"),
            ({"proxy": True, "inception_weights": "x"}, "expected one, got inception-weights and proxy"),
            ({"proxy": True, "metrics": ("is",)}, "proxy network has no classes"),
            ({"every": -1}, "every: expected at least 0, got -1"),
            (
                {"every": 5},
                "expected --evaluation.inception-weights FILE, --evaluation.proxy or .*, got none",
            ),
            ({"proxy": True, "best_by": "is"}, "best_by: expected one of fid; got 'is'"),
            ({"metrics": ("pr",), "best_by": "pr"}, "best_by: expected one of precision, recall; got 'pr'"),
        ],
    )
    def test_options_out_of_range(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            TrainingEvaluationConfig(**options)

    def test_networks_without_logits_and_too_few_real_images(self, tmp_path: Path) -> None:
        proxy = proxy_network(CPU, resolution=32)
        with pytest.raises(UserError, match="the network randomconv has no logits"):
            Evaluator(EvaluationConfig(cache=tmp_path), real_images_of(), ALONE, network=proxy)
        with pytest.raises(UserError, match="real images: expected more than 3, got 3"):
            evaluator_of(tmp_path, real_images=real_images_of(3))

    def test_unsuitable_generators(self, tmp_path: Path) -> None:
        evaluator = evaluator_of(tmp_path)
        for generator, num_labels, message in (
            (generator_of(), 27, "at least 2 samples of each of 27 classes for intra-fid, got 53"),
            (generator_of(num_classes=0), 1, "expected a run with classes for intra-fid"),
            (generator_of(resolution=64), 3, "expected images of 64 pixels as the generator's, got 32"),
        ):
            with pytest.raises(UserError, match=message):
                evaluator.evaluate(generator, torch.arange(num_labels), weights="raw")


class TestCache:
    def test_features_are_computed_once(self, tmp_path: Path) -> None:
        first, again = evaluate(tmp_path), evaluate(tmp_path)
        assert (first.real_facts.from_cache, again.real_facts.from_cache) == (False, True)
        assert replace(first.real_facts, from_cache=True) == again.real_facts
        assert first.figures == again.figures
        assert not list((tmp_path / "cache").glob("*.partial"))

    def test_other_images_and_features_of_all_images_are_computed(self, tmp_path: Path) -> None:
        def from_cache(metric: str, **options: Any) -> bool:
            return evaluator_of(tmp_path, metrics=(metric,), **options).real_facts.from_cache

        assert not from_cache("fid")
        assert not from_cache("fid", real_images=real_images_of(seed=1))
        assert not from_cache("intra-fid")  # which needs the features of all images
        assert from_cache("intra-fid")
        assert from_cache("fid")
        assert len(list((tmp_path / "cache").iterdir())) == 2

    @pytest.mark.parametrize("name", ["manifest.json", "statistics.npz", "features.npy"])
    def test_damaged_files_are_made_again_with_a_warning(
        self, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = evaluate(tmp_path).figures
        [path] = (tmp_path / "cache").glob(f"*/{name}")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if name != "manifest.json" else content[:50])
        again = evaluate(tmp_path)
        assert not again.real_facts.from_cache
        assert f"{name} is damaged" in caplog.text
        assert again.figures == expected
        assert evaluator_of(tmp_path).real_facts.from_cache

    def test_facts_that_are_none_are_made_again(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = evaluator_of(tmp_path).real_facts
        [path] = (tmp_path / "cache").glob("*/manifest.json")
        for name, value in (
            *(("count", "many"), ("checksum", None), ("half_distance", float("nan")), ("unknown", 1)),
            *(("inception_score", [1.0]), ("inception_score", 3)),
        ):
            manifest = json.loads(path.read_text())
            path.write_text(json.dumps({**manifest, "facts": {**manifest["facts"], name: value}}))
            caplog.clear()
            assert evaluator_of(tmp_path).real_facts == expected
            assert "manifest.json is damaged" in caplog.text

    def test_statistics_that_are_none_are_refused(self, tmp_path: Path) -> None:
        evaluator_of(tmp_path)
        [path] = (tmp_path / "cache").glob("*/statistics.npz")
        sound, manifest = dict(np.load(path)), json.loads(path.with_name("manifest.json").read_text())
        for name, value, message in (
            ("mean", None, "mean is not a file in the archive"),
            ("products", np.zeros((2, 2)), r"products: expected \[\d+, \d+\], got \[2, 2\]"),
            ("sample", sound["sample"] * np.nan, "sample: expected finite values, got"),
        ):
            arrays = {**sound, name: value}
            np.savez(path, **{each: array for each, array in arrays.items() if array is not None})
            manifest["files"]["statistics.npz"] = file_sha256(path)
            path.with_name("manifest.json").write_text(json.dumps(manifest))
            with pytest.raises(RealFeaturesError, match=f"holds damaged features .*{message}.*: delete it"):
                evaluator_of(tmp_path)

    def test_a_full_disk_is_named_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> NoReturn:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
        with pytest.raises(OSError, match=r"No space left on device: .*statistics.npz"):
            evaluator_of(tmp_path)
        assert not list((tmp_path / "cache").iterdir())

    def test_features_of_other_images_are_refused(self, tmp_path: Path) -> None:
        evaluator_of(tmp_path)
        [path] = (tmp_path / "cache").glob("*/manifest.json")
        path.write_text(path.read_text().replace("in memory", "elsewhere"))
        with pytest.raises(RealFeaturesError, match="features of other images or another network: delete"):
            evaluator_of(tmp_path)


class TestProtocol:
    def test_each_field_changes_its_identity_and_is_named_when_compared(self, evaluation: Evaluation) -> None:
        protocol = evaluation.protocol
        for field in fields(Protocol):
            other = replace(protocol, **{field.name: "another"})
            assert other.identity != protocol.identity
            with pytest.raises(ProtocolError, match=f"cannot be compared: {field.name} "):
                protocol.check_comparable(other)
        protocol.check_comparable(replace(protocol))

    def test_names_follow_how_papers_write_them(self, evaluation: Evaluation) -> None:
        protocol = replace(evaluation.protocol, sample_count=50_000, network="tfinception")
        assert protocol.name("fid") == "fid50k-train-tfinception"
        assert protocol.name("is") == "is50k-tfinception"
        assert replace(protocol, weights="raw").name("is") == "is50k-tfinception-raw"
        assert {metric: protocol.name(metric) for metric in FIGURES}


def work(world: World) -> dict[str, Any]:
    """Every kind of batch-norm statistics in this process, and an error on rank 0."""
    folder = Path(world.run_on_main(mkdtemp))
    found = {}
    for statistics in ("running", "batch", "standing"):
        evaluation = evaluate(folder, world, bn_statistics=statistics, standing_batches=2)
        found[statistics] = replace(evaluation, seconds=0.0).to_dict()
    world.barrier()
    if world.is_main:
        for path in (folder / "cache").glob("*/manifest.json"):
            path.write_text(path.read_text().replace("in memory", "elsewhere"))
    world.barrier()
    try:
        evaluator_of(folder, world)
    except UserError as error:
        found["refusal"] = f"{type(error).__name__}: {error}"
    diverged = generator_of()
    diverged.get_parameter("blocks.0.conv1.weight").data[:] = torch.nan
    try:
        evaluator_of(folder / "new", world).evaluate(diverged, LABELS, weights="ema")
    except UserError as error:
        found["diverged"] = type(error).__name__
    is_last = world.rank == world.world_size - 1
    for name, call in (
        ("nan", lambda: world.raise_together(NotFiniteError() if is_last else None)),
        ("disk", lambda: world.raise_together(OSError() if is_last else None)),
        ("main", lambda: world.run_on_main(lambda: check_finite("main", torch.tensor(torch.nan)))),
    ):
        try:
            call()
        except (UserError, OSError) as error:
            found[name] = type(error).__name__
    world.raise_together(None)
    return found


needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


@pytest.fixture(scope="module", params=[2, 4], ids=lambda count: f"{count} processes")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_by_rank(work, request.param, "evaluation", tmp_path_factory)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return work(ALONE)


@needs_gloo
def test_all_processes_return_the_figures_of_one(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for found in ranks:
        for statistics in ("running", "batch", "standing"):
            assert found[statistics] == alone[statistics]


@needs_gloo
def test_a_refusal_reaches_all_processes(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for found in (alone, ranks[0]):
        assert "RealFeaturesError: " in found["refusal"]
    for found in (alone, *ranks):
        assert found["diverged"] == found["nan"] == found["main"] == "NotFiniteError"
    assert [found["disk"] for found in ranks] == ["ReportedElsewhereError"] * (len(ranks) - 1) + ["OSError"]
    for found in ranks[1:]:
        assert "ReportedElsewhereError: " in found["refusal"]
