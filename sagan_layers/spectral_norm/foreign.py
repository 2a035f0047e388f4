"""The names under which other code bases store a weight and its vectors u and v."""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from sagan_layers.torch_support import accumulation_dtype

OWN_KEYS = ("weight", "weight_u", "weight_v")
# Theirs: ours, first those of the weight and u, which are always stored. None: it follows from the others.
FOREIGN_KEYS: dict[str, dict[str, str | None]] = {
    "torch.nn.utils.spectral_norm": {
        "weight_orig": "weight",
        "weight_u": "weight_u",
        "weight_v": "weight_v",
    },
    "torch.nn.utils.parametrizations.spectral_norm": {
        "parametrizations.weight.original": "weight",
        "parametrizations.weight.0._u": "weight_u",
        "parametrizations.weight.0._v": "weight_v",
    },
    "BigGAN-PyTorch": {"weight": "weight", "u0": "weight_u", "sv0": None},
    "mimicry": {"weight": "weight", "sn_u": "weight_u", "sn_sigma": None},
}


def rename_entries(state: MutableMapping[str, Any], prefix: str) -> None:
    """Give a layer's entries in a state our names; raise ``ValueError`` for entries of several kinds or half of one."""
    known = {name for keys in FOREIGN_KEYS.values() for name in keys} | set(OWN_KEYS)
    names = {name for name in known if prefix + name in state}
    for source, keys in FOREIGN_KEYS.items():
        if not names & (keys.keys() - set(OWN_KEYS)):
            continue
        weight, u, *_ = keys
        if not {weight, u} <= names <= keys.keys():
            raise ValueError(
                f"{prefix[:-1] or 'the layer'}: expected {', '.join(keys)} of {source} and no other form of them, got "
                f"{', '.join(sorted(names))}"
            )
        entries = {ours: state.pop(prefix + theirs, None) for theirs, ours in keys.items()}
        for ours, entry in entries.items():
            if ours is not None and entry is not None:
                is_u = ours == "weight_u" and isinstance(entry, Tensor)  # also stored as [1, n]
                state[prefix + ours] = entry.reshape(-1) if is_u else entry
        return


@torch.no_grad()
def leading_vectors(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the singular vectors u and v of a weight's largest singular value, in its dtype."""
    matrix = weight.detach().to(accumulation_dtype(weight.dtype)).transpose(0, dim).flatten(1)
    if weight.is_meta:
        return weight.new_empty(matrix.size(0)), weight.new_empty(matrix.size(1))
    matrix = matrix.nan_to_num()
    matrix = matrix / matrix.abs().amax().clamp_min(torch.finfo(matrix.dtype).tiny)  # no square overflows
    is_tall = matrix.size(0) > matrix.size(1)
    gram = (matrix.t() @ matrix if is_tall else matrix @ matrix.t()).cpu().double()
    first = torch.linalg.eigh(gram).eigenvectors[:, -1].to(matrix)
    second = torch.nn.functional.normalize(matrix @ first if is_tall else matrix.t() @ first, dim=0)
    u, v = (second, first) if is_tall else (first, second)
    return u.to(weight.dtype), v.to(weight.dtype)


_last_load: object = None


def warn_once_a_load(load: object, name: str) -> None:
    """Say that vectors were computed; ``load`` is the same object for all layers of one ``load_state_dict``."""
    global _last_load
    if load is not _last_load:
        _last_load = load
        warnings.warn(
            f"the state has weights of spectrally normalised layers without their vectors u and v (the first is "
            f"{name!r}); they were computed from the weights",
            stacklevel=2,
        )
