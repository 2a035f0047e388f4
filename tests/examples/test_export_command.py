"""``export``: files that other programs read, and that make the generator's images."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import python, refused, succeed
from safetensors import safe_open
from torch import Tensor
from training_runs import TINY_NETWORK, assert_same

from sagan import export
from sagan.networks import Generator, NetworkConfig
from sagan.recipes import RunConfig
from sagan.sampling import TrainedGenerator, load_generator, sample_inputs

CPU = torch.device("cpu")
FORMATS = pytest.mark.parametrize("format", export.SUFFIXES)


@pytest.fixture(scope="module")
def trained(trained_run: Path) -> TrainedGenerator:
    return load_generator(trained_run, CPU)


def needs_onnx() -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="in the extra 'export'")


def images_of(trained: TrainedGenerator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    latents, labels = sample_inputs(range(count), trained.config.network, seed=3)
    with torch.no_grad():
        return latents, labels, trained.generator(latents, labels)


def test_an_onnx_file_has_names_a_dynamic_batch_and_metadata(
    trained_run: Path, trained: TrainedGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_onnx()
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    printed = succeed("export", "--source", trained_run, "--title", "Drei Klassen, schön")
    size = Path("generator.onnx").stat().st_size
    assert printed.startswith(
        f"generator.onnx written (iteration 4, averaged weights): {size / 1e6:.3g} MB; "
    )
    assert float(printed.split()[-1]) <= 1e-5
    session = onnxruntime.InferenceSession("generator.onnx")
    shapes = {each.name: each.shape for each in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {"latents": ["batch", 6], "labels": ["batch"], "images": ["batch", 3, 32, 32]}
    latents, labels, expected = images_of(trained, 5)
    (images,) = session.run(["images"], {"latents": latents.numpy(), "labels": labels.numpy()})
    torch.testing.assert_close(torch.from_numpy(images), expected, rtol=0, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert about["title"] == "Drei Klassen, schön"
    assert (about["iteration"], about["weights"]) == ("4", "averaged")
    assert json.loads(about["class_names"]) == trained.class_names
    assert json.loads(about["network"]) == json.loads(json.dumps(asdict(trained.config.network)))


def test_a_program_runs_in_a_process_without_this_library(
    trained_run: Path, trained: TrainedGenerator, tmp_path: Path
) -> None:
    path, inputs, result = (tmp_path / name for name in ("generator.pt2", "inputs.pt", "images.pt"))
    succeed("export", "--source", trained_run, "--out", path, "--format", "torch-export", "--weights", "ema")
    latents, labels, expected = images_of(trained, 5)
    torch.save((latents, labels), inputs)
    script = """
import sys, torch
sys.modules["sagan_layers"] = sys.modules["sagan"] = None
extra = {"metadata.json": ""}
network = torch.export.load(sys.argv[1], extra_files=extra).module()
torch.save(network(*torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
print(extra["metadata.json"])
"""
    process = python(script, path, inputs, result)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(printed)["title"] == "SAGAN generator of 32 pixels, iteration 4"
    torch.testing.assert_close(torch.load(result, weights_only=True), expected, rtol=0, atol=1e-5)


def test_safetensors_hold_the_state_dict_and_the_configuration(
    trained_run: Path, trained: TrainedGenerator, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "generator.safetensors"
    printed = succeed(
        "export", "--source", trained_run, "--out", path, "--format", "safetensors", "--weights", "raw"
    )
    assert float(printed.split()[-1]) <= 1e-6
    raw = load_generator(trained_run, CPU, weights="raw").generator.state_dict()
    with safe_open(path, "pt") as file:
        about = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert about["weights"] == "raw"
    assert Generator(NetworkConfig(**json.loads(about["network"]))).load_state_dict(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in raw.items())


BIGGAN = {"condition": "embedding", "hierarchical_latents": True, "latent_dim": 8, "embedding_dim": 5}
PLAIN = {"num_classes": 0, "g_spectral_norm": False, "mixer": "residual"}


@FORMATS
@pytest.mark.parametrize(
    "changes", [pytest.param(BIGGAN, marks=pytest.mark.slow), PLAIN], ids=["BigGAN", "plain"]
)
def test_networks_of_every_kind_are_exported_and_stay_as_they_are(
    tiny_config: RunConfig, format: export.Format, changes: dict[str, Any]
) -> None:
    if format == "onnx":
        needs_onnx()
    network = replace(TINY_NETWORK, **changes)
    config = replace(tiny_config, network=network)
    generator = Generator(network).eval()
    trained = TrainedGenerator(generator, config, 0, ["a", "b", "c"], torch.arange(3), averaged=False)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    _, difference = export.exported_generator(trained, format, "title")
    assert difference <= 1e-5
    assert_same(dict(generator.state_dict()), before)


class TestErrors:
    def test_a_missing_package_names_the_extra(
        self, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        message = refused("export", "--source", trained_run, "--out", tmp_path / "file.onnx")
        assert "format: 'onnx' needs onnx, onnxscript and onnxruntime" in message
        assert "pip install 'sagan-layers[export]'" in message
        assert not any(tmp_path.iterdir())

    def test_a_file_that_computes_something_else_is_not_written(
        self, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def changed(generator: Generator, metadata: dict[str, str]) -> tuple[bytes, Any]:
            return b"", lambda *inputs: generator(*inputs) + 0.01

        monkeypatch.setitem(export._WRITERS, "torch-export", changed)
        arguments = (
            "export",
            "--source",
            trained_run,
            "--out",
            tmp_path / "file.pt2",
            "--format",
            "torch-export",
        )
        assert "expected images within 1e-04 of the network's, got differences of 1.0e-02" in refused(
            *arguments
        )
        assert not any(tmp_path.iterdir())

    def test_a_folder_and_a_network_too_large_for_onnx_are_refused(
        self, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert f"out: expected a file, got the folder {tmp_path}" in refused(
            "export", "--source", trained_run, "--out", tmp_path
        )
        needs_onnx()
        monkeypatch.setattr(export, "_PROTOBUF_BYTES", 1000)
        assert "expected a network below 2 GiB for 'onnx'" in refused(
            "export", "--source", trained_run, "--out", tmp_path / "file.onnx"
        )

    @pytest.mark.parametrize(
        ("format", "suffix"),
        [("onnx", ".onnx"), ("torch-export", ".pt2"), ("safetensors", ".safetensors")],
    )
    def test_a_name_of_another_kind_of_file_is_refused_and_a_checkpoint_stays(
        self, trained_run: Path, format: str, suffix: str
    ) -> None:
        (checkpoint,) = (trained_run / "checkpoints").glob("*.pt")
        before = checkpoint.read_bytes()
        message = refused("export", "--source", checkpoint, "--out", checkpoint, "--format", format)
        assert f"out: expected a name that ends in {suffix} for {format}, got {checkpoint}" in message
        assert checkpoint.read_bytes() == before
