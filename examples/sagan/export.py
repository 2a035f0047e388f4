"""A trained generator as a file for other programs: ONNX, a program of torch.export, or safetensors."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from sagan.errors import UserError
from sagan.extras import needs
from sagan.networks import Generator
from sagan.sampling import TrainedGenerator, sample_inputs
from sagan_layers import remove_spectral_norm

Format = Literal["onnx", "torch-export", "safetensors"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
# Of images from -1 to 1, where a grey level is 8e-3.
_MOST_DIFFERENCE = 1e-4
_PROTOBUF_BYTES = 2**31  # of an ONNX file that is one message
_Run = Callable[..., Tensor]


def exported_generator(trained: TrainedGenerator, format: Format, title: str) -> tuple[bytes, float]:
    """Return the contents of a file, and how far its images are from the generator's at most.

    The file is read again and run on batches of two sizes.

    Args:
        trained: a generator on the CPU.
        format: "onnx" and "torch-export" hold a program that takes ``latents`` [N, latent_dim] and, unless the network
            is unconditional, int64 ``labels`` [N], and returns ``images`` [N, 3, height, width]; its weights are
            divided by their spectral norms. "safetensors" holds the state dict as it is.
        title: kept in the file, with the network's configuration and the names of the classes.

    Raises:
        UserError: if a package is missing, a file of this format cannot hold the network, or images differ.
    """
    network = trained.config.network
    metadata = {
        "title": title,
        "iteration": str(trained.iteration),
        "weights": "averaged" if trained.averaged else "raw",
        "network": json.dumps(asdict(network)),
        "class_names": json.dumps(trained.class_names if network.num_classes else []),
    }
    contents, run = _WRITERS[format](trained.generator, metadata)
    differences = []
    for count in (1, 3):
        inputs = _inputs(trained.generator, count)
        with torch.no_grad():
            differences.append((run(*inputs) - trained.generator(*inputs)).abs().max().item())
    if not max(differences) <= _MOST_DIFFERENCE:
        raise UserError(
            f"format: expected images within {_MOST_DIFFERENCE:.0e} of the network's, got differences of "
            f"{max(differences):.1e} from the {format} file, which is not written"
        )
    return contents, max(differences)


def _inputs(generator: Generator, count: int) -> tuple[Tensor, ...]:
    latents, labels = sample_inputs(range(count), generator.config, seed=0)
    return (latents, labels) if generator.config.num_classes else (latents,)


def _program(generator: Generator) -> torch.export.ExportedProgram:
    plain = remove_spectral_norm(copy.deepcopy(generator))
    plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    inputs = _inputs(generator, 2)  # a program of a batch of 1 serves no other
    return torch.export.export(plain, inputs, dynamic_shapes=_dynamic_batch(inputs), strict=False)


def _dynamic_batch(inputs: Sequence[object]) -> tuple[dict[int, Any], ...]:
    return ({0: torch.export.Dim("batch", min=1)},) * len(inputs)


def _as_program(generator: Generator, metadata: dict[str, str]) -> tuple[bytes, _Run]:
    file = io.BytesIO()
    torch.export.save(_program(generator), file, extra_files={"metadata.json": json.dumps(metadata)})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def _as_onnx(generator: Generator, metadata: dict[str, str]) -> tuple[bytes, _Run]:
    with needs("format: 'onnx'", "onnx, onnxscript and onnxruntime", "export"):
        import onnx  # noqa: F401  (torch.onnx needs it)
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    if sum(tensor.nbytes for tensor in generator.state_dict().values()) >= _PROTOBUF_BYTES:
        raise UserError(
            "format: expected a network below 2 GiB for 'onnx', got a larger one; see torch-export"
        )
    names = ["latents", "labels"] if generator.config.num_classes else ["latents"]
    with _quiet():
        converted = torch.onnx.export(
            _program(generator),
            input_names=names,
            output_names=["images"],
            dynamic_shapes=_dynamic_batch(names),  # for the axis's name
            dynamo=True,
            verbose=False,
        )
    assert converted is not None
    converted.model.metadata_props.update(metadata)
    contents = converted.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["images"], arrays)[0])

    return contents, run


def _as_safetensors(generator: Generator, metadata: dict[str, str]) -> tuple[bytes, _Run]:
    tensors = {name: tensor.contiguous() for name, tensor in generator.state_dict().items()}
    contents = safetensors.torch.save(tensors, metadata)
    loaded = Generator(generator.config)
    loaded.load_state_dict(safetensors.torch.load(contents))
    return contents, loaded.eval()


_WRITERS: dict[Format, Callable[[Generator, dict[str, str]], tuple[bytes, _Run]]] = {
    "onnx": _as_onnx,
    "torch-export": _as_program,
    "safetensors": _as_safetensors,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's converter says about torchvision and about torch itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
