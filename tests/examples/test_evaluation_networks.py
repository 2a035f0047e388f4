"""Feature networks: TensorFlow's Inception-v3 from a file, an exported program, the proxy."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from feature_modules import SmallNetwork
from test_checkpoints import TouchesAFile
from torch import Tensor, nn

from sagan.errors import UserError
from sagan.evaluation.feature_networks import (
    FeatureNetwork,
    deterministic_float32,
    exported_network,
    proxy_network,
    tensorflow_inception,
)
from sagan.evaluation.inception import InceptionV3, load_inception, resize_like_tensorflow
from sagan.io import file_sha256

CPU = torch.device("cpu")
State = dict[str, Tensor]
ANYTHING_SHA256 = hashlib.sha256(b"anything").hexdigest()


def images_of(count: int, resolution: int = 32, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, resolution, resolution), generator=draws, dtype=torch.uint8)


@pytest.fixture(scope="session")
def random_inception() -> State:
    """Random weights under the names of pt_inception-2015-12-05-6726825d.pth."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in InceptionV3().state_dict().items()}
    draws = torch.Generator().manual_seed(0)
    state: State = {}
    for name, shape in shapes.items():
        if name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape, generator=draws) + 0.5
        elif not name.endswith("num_batches_tracked"):
            fan_in = max(1, shape[1:].numel()) if len(shape) > 1 else 100
            state[name] = torch.randn(shape, generator=draws) * (2 / fan_in) ** 0.5
    return state


@pytest.fixture(scope="session")
def inception_file(random_inception: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_inception, path)
    return path


class TestTensorFlowResize:
    def test_a_row_is_sampled_at_i_times_old_over_new(self) -> None:
        row = torch.tensor([0.0, 10.0, 40.0]).view(1, 1, 1, 3).expand(1, 1, 3, 3)
        found = resize_like_tensorflow(row, 6)
        assert found.shape == (1, 1, 6, 6)
        # positions 0, 0.5, 1, 1.5, 2, 2.5; the last column is repeated
        assert found[0, 0, 3].tolist() == [0, 5, 10, 25, 40, 40]
        column = resize_like_tensorflow(row.mT, 6)
        assert column[0, 0, :, 2].tolist() == [0, 5, 10, 25, 40, 40]

    def test_shrinking_takes_no_average(self) -> None:
        row = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
        assert resize_like_tensorflow(row, 4)[0, 0, 0].tolist() == [0, 2, 4, 6]
        assert resize_like_tensorflow(row, 5)[0, 0, 0].tolist() == pytest.approx([0, 1.6, 3.2, 4.8, 6.4])

    def test_the_same_size_does_not_change(self) -> None:
        x = torch.rand(1, 3, 5, 5)
        assert resize_like_tensorflow(x, 5) is x


def assert_same_outputs(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


class TestInception:
    def test_folding_batch_norm_changes_nothing(self, inception_file: Path, random_inception: State) -> None:
        with torch.device("meta"):
            plain = InceptionV3()
        counters = {n: torch.tensor(0) for n in plain.state_dict() if n.endswith("num_batches_tracked")}
        plain.load_state_dict(random_inception | counters, assign=True)
        folded = load_inception(inception_file)
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
        with torch.no_grad():
            assert_same_outputs(folded(images_of(2)), plain.eval()(images_of(2)))

    def test_logits_have_no_bias(self, inception_file: Path) -> None:
        network = load_inception(inception_file)
        with torch.no_grad():
            features, logits = network(images_of(2))
        assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
        torch.testing.assert_close(logits, features @ network.fc.weight.T, rtol=1e-4, atol=1e-4)

    def test_is_torch_fidelitys_network_on_the_same_file(self, inception_file: Path) -> None:
        theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
        extractor = theirs.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
        with torch.no_grad():
            assert_same_outputs(load_inception(inception_file)(images_of(2)), extractor(images_of(2)))

    def test_other_weights_than_the_published_ones_get_another_name(self, inception_file: Path) -> None:
        network = tensorflow_inception(inception_file, CPU, resolution=32)
        assert network.digest == file_sha256(inception_file)
        assert network.name == f"inception-{network.digest[:8]}"
        assert (network.num_features, network.num_logits, network.proxy) == (2048, 1008, False)

    def test_other_weights_are_refused_with_the_difference(
        self, random_inception: State, tmp_path: Path
    ) -> None:
        state = dict(random_inception)
        del state["Conv2d_1a_3x3.conv.weight"]
        state["AuxLogits.fc.weight"] = torch.zeros(1)
        state["fc.weight"] = torch.zeros(1000, 2048)
        path = tmp_path / "torchvision.pth"
        torch.save(state, path)
        with pytest.raises(UserError) as error:
            load_inception(path)
        assert 'Missing key(s) in state_dict: "Conv2d_1a_3x3.conv.weight"' in str(error.value)
        assert 'Unexpected key(s) in state_dict: "AuxLogits.fc.weight"' in str(error.value)
        assert re.search(r"size mismatch for fc\.weight: .*1000, 2048.*1008, 2048", str(error.value))
        torch.save([torch.zeros(1)], path)
        with pytest.raises(UserError, match="expected a state dict of tensors"):
            load_inception(path)
        trap = tmp_path / "was_run"
        path.write_bytes(pickle.dumps(TouchesAFile(trap)))
        with pytest.raises(UserError, match="is not a readable file of tensors"):
            load_inception(path)
        assert not trap.exists()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "small.pt2"
    exported = torch.export.export(
        SmallNetwork(), (images_of(4),), dynamic_shapes={"images": {0: torch.export.Dim("count")}}
    )
    torch.export.save(exported, path)
    return path


class TestExportedNetwork:
    def test_answers_as_its_module_for_any_number_of_images(self, program: Path) -> None:
        network = exported_network(program, CPU, sha256=file_sha256(program), resolution=32)
        features, logits = network(images_of(19))
        with torch.no_grad():
            expected = SmallNetwork()(images_of(19))
        torch.testing.assert_close((features, logits), expected, rtol=1e-5, atol=1e-6)
        assert network.name == f"small-{file_sha256(program)[:8]}"

    @pytest.mark.parametrize(
        ("sha256", "message"),
        [
            (None, f"can run code .* is {ANYTHING_SHA256}"),
            ("0" * 64, f"can run code .* is {ANYTHING_SHA256}"),
            (ANYTHING_SHA256, "is not an exported program"),
        ],
    )
    def test_needs_its_hash_and_a_program(self, sha256: str | None, message: str, tmp_path: Path) -> None:
        path = tmp_path / "any.pt2"
        path.write_bytes(b"anything")
        with pytest.raises(UserError, match=message):
            exported_network(path, CPU, sha256=sha256, resolution=32)

    def test_a_program_for_other_images_is_refused(self, program: Path) -> None:
        with pytest.raises(UserError, match="for any number of 64x64"):
            exported_network(program, CPU, sha256=file_sha256(program), resolution=64)


class TestFeatureNetwork:
    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda images: images, r"expected features \[2, d\] for 2 images, got \[2, 3, 8, 8\]"),
            (lambda _: "words", r"expected features \[2, d\] for 2 images, got str"),
            (
                lambda images: images.flatten(1) * torch.nan,
                "features: expected finite values, got 384 of 384",
            ),
            (
                lambda images: (images.flatten(1), torch.full((2, 3), torch.inf)),
                "probabilities: expected finite",
            ),
        ],
    )
    def test_other_outputs_are_refused(self, function: Callable[[Tensor], object], message: str) -> None:
        module = nn.Identity()
        module.forward = function
        with pytest.raises(UserError, match=message):
            FeatureNetwork(module, name="x", digest="0", resize="", device=CPU, resolution=8)

    def test_without_logits_there_are_none(self) -> None:
        network = proxy_network(CPU, resolution=32)
        features, logits = network(images_of(9))
        assert (features.shape, logits.shape) == ((9, 536), (9, 0))

    def test_tf32_is_off_inside_and_restored_after(self) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            with deterministic_float32():
                assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.backends.cuda.matmul.allow_tf32
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


class TestProxy:
    def test_is_the_same_everywhere_and_marked_as_proxy(self) -> None:
        network = proxy_network(CPU, resolution=32)
        assert network.proxy
        assert network.digest.startswith("ca9843cab9ab7096")
        assert proxy_network(CPU, resolution=128).digest == network.digest

    def test_separates_noise_from_flat_images_more_than_from_other_noise(self) -> None:
        network = proxy_network(CPU, resolution=32)
        noise, other, flat = (
            network(each)[0].mean(0)
            for each in (images_of(20), images_of(20, seed=1), images_of(20) // 8 + 112)
        )
        assert (noise - flat).norm() > 10 * (noise - other).norm()
