"""Files of weights: tensors by name, read without running code from the file, and the networks they belong to."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sagan.errors import UserError, listed, shown
from sagan.io import first_line, load_plain, open_regular
from sagan_layers.convert import CodeBase

State = Mapping[str, Any]  # tensors or arrays by name
_CONTAINERS = ("state_dict", "model_state_dict")
_NETWORKS = ("generator", "discriminator", "generator_ema")


def read_weights(path: Path) -> dict[str, Any]:
    """Return the tensors or arrays of a file of torch.save, safetensors or NumPy by name; no code in it is run.

    Containers such as {"state_dict": ...} are opened; names of nested dictionaries are joined with dots.

    Raises:
        UserError: if the file is none of these, or holds something else.
    """
    kind = _kind(path)
    if kind == ".npz":
        contents: Any = _read_npz(path)
    elif kind == ".safetensors":
        contents = _read_safetensors(path)
    else:
        try:
            contents = load_plain(path, legacy=True)
        except UserError as error:
            raise UserError(
                f"{path} is not read ({error}); expected a state dict of torch.save, safetensors or NumPy. If it "
                "holds other objects, save it again where it was written: torch.save(model.state_dict(), file)"
            ) from error
    for name in _CONTAINERS:
        if isinstance(contents, Mapping) and name in contents:
            contents = contents[name]
    if not isinstance(contents, Mapping) or not contents:
        raise UserError(f"{path}: expected tensors by name, got {shown(contents)}")
    entries = dict(_flat(contents))
    wrong = [name for name, value in entries.items() if not isinstance(value, (Tensor, np.ndarray))]
    if wrong:
        raise UserError(
            f"{path}: expected tensors only, got others in {listed(wrong)}; save the state dict of each network alone"
        )
    return entries


def _kind(path: Path) -> str:
    """Return the usual suffix of a file with such contents; the file's own if they do not tell."""
    with open_regular(path) as file:
        start = file.read(9)
        if start[8:] == b"{":
            return ".safetensors"
        if start.startswith(b"PK\3\4"):
            try:
                names = zipfile.ZipFile(file).namelist()
            except zipfile.BadZipFile:
                return path.suffix
            return ".npz" if all(name.endswith(".npy") for name in names) else ".pth"
    return path.suffix.lower()


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


def split_networks(
    weights: State, d_weights: State, ema_weights: State, code_base: CodeBase
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the entries of G, D and the moving average of G.

    Args:
        weights: G's entries; with a prefix for each network also D's and the average's.
        d_weights: D's entries, or nothing.
        ema_weights: entries of the moving average of G, or nothing.
        code_base: their code base.

    Raises:
        UserError: if other entries stand beside those with a network's prefix.
    """
    together, d_parts, ema_parts = (_parts(each, code_base) for each in (weights, d_weights, ema_weights))
    generator = together.get("generator") or together.get("", {})
    discriminator = d_parts.get("discriminator") or d_parts.get("") or together.get("discriminator", {})
    average = ema_parts.get("generator_ema") or ema_parts.get("generator") or ema_parts.get("")
    return generator, discriminator, average or together.get("generator_ema", {})


def _parts(entries: State, code_base: CodeBase) -> dict[str, dict[str, Any]]:
    """Return the entries of each network by its prefix, or all of them under ""."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in _unwrapped(entries, code_base).items():
        first, _, rest = name.partition(code_base.separator)
        part, inner = (first, rest) if first in _NETWORKS else ("", name)
        parts.setdefault(part, {})[inner] = value
    others = [name for name in parts.get("", ()) if not code_base.ignores(name)]
    if len(parts) > 1 and others:
        raise UserError(f"expected entries of {', '.join(_NETWORKS)}, got others too: {listed(others)}")
    return {part: _unwrapped(state, code_base) for part, state in parts.items()}


def _unwrapped(entries: State, code_base: CodeBase) -> dict[str, Any]:
    """Remove what all names begin with, such as DistributedDataParallel's "module."."""
    separator = code_base.separator
    names = [name for name in entries if not code_base.ignores(name)]
    firsts = {name.partition(separator)[0] for name in names}
    if len(firsts) != 1 or firsts & {*names, *_NETWORKS}:
        return dict(entries)
    prefix = firsts.pop() + separator
    return _unwrapped({name.removeprefix(prefix): value for name, value in entries.items()}, code_base)
