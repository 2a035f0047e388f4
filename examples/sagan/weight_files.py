"""Files of weights: tensors by name, read without running code from the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sagan.errors import UserError, listed, shown
from sagan.io import first_line, load_plain, open_regular

_CONTAINERS = ("state_dict", "model_state_dict")


def read_weights(path: Path) -> dict[str, Any]:
    """Return the tensors or arrays of a file of torch.save, safetensors or NumPy by name; no code in it is run.

    Containers such as {"state_dict": ...} are opened; names of nested dictionaries are joined with dots.

    Raises:
        UserError: if the file is none of these, or holds something else.
    """
    if path.suffix == ".npz":
        contents: Any = _read_npz(path)
    elif path.suffix == ".safetensors":
        contents = _read_safetensors(path)
    else:
        try:
            contents = load_plain(path, legacy=True)
        except UserError as error:
            raise UserError(
                f"{path} is not read ({error}); expected a state dict of torch.save, .safetensors or .npz. A file "
                "with other objects must be saved again where it was written: torch.save(model.state_dict(), file)"
            ) from error
    for name in _CONTAINERS:
        if isinstance(contents, Mapping) and name in contents:
            contents = contents[name]
    if not isinstance(contents, Mapping) or not contents:
        raise UserError(f"{path}: expected tensors by name, got {shown(contents)}")
    entries = dict(_flat(contents))
    wrong = [name for name, value in entries.items() if not isinstance(value, (Tensor, np.ndarray))]
    if wrong:
        raise UserError(f"{path}: expected tensors only, got others in {listed(wrong)}")
    return entries


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # of many types
        raise UserError(
            f"{path} is not read ({first_line(error)}); expected arrays of numpy.savez"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not read ({first_line(error)}); expected a file of safetensors"
        ) from error


def _flat(contents: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in contents.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
