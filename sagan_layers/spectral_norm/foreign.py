"""The names under which other code bases store a weight and its vectors u and v."""

from __future__ import annotations

import warnings
from collections.abc import Collection, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sagan_layers.torch_support import accumulation_dtype


class SpectralNormKeys(NamedTuple):
    """The names of a layer's entries in a state, after the layer's own name.

    Attributes:
        weight: of the weight before it is normalised, in the plain layer's shape.
        u: of the vector with one entry for each output, also stored as [1, n].
        v: of the other vector; "" where it is not stored.
        unused: of what follows from the others.
    """

    weight: str
    u: str
    v: str = ""
    unused: str = ""


OWN_KEYS = SpectralNormKeys("weight", "weight_u", "weight_v")
FOREIGN_KEYS = {
    "torch.nn.utils.spectral_norm": SpectralNormKeys("weight_orig", "weight_u", "weight_v"),
    "torch.nn.utils.parametrizations.spectral_norm": SpectralNormKeys(
        "parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v"
    ),
    "BigGAN-PyTorch": SpectralNormKeys("weight", "u0", unused="sv0"),
    "mimicry": SpectralNormKeys("weight", "sn_u", unused="sn_sigma"),
}


def rename_entries(state: MutableMapping[str, Any], prefix: str) -> None:
    """Give a layer's entries in a state our names; raise ``ValueError`` for entries of several kinds or half of one."""
    names = {name for name in _all_names() if prefix + name in state}
    for source, keys in FOREIGN_KEYS.items():
        if not names & (set(keys) - set(OWN_KEYS) - {""}):
            continue
        if not {keys.weight, keys.u} <= names <= set(keys):
            expected = ", ".join(name for name in keys if name)
            raise ValueError(
                f"{prefix[:-1] or 'the layer'}: expected {expected} of {source} and no other form of them, got "
                f"{', '.join(sorted(names))}"
            )
        entries = [state.pop(prefix + name, None) for name in keys]
        for name, entry in zip(OWN_KEYS[:3], entries[:3], strict=True):
            if entry is not None:
                is_u = name == OWN_KEYS.u and isinstance(entry, Tensor)
                state[prefix + name] = entry.reshape(-1) if is_u else entry
        return


def _all_names() -> Collection[str]:
    return {name for keys in (OWN_KEYS, *FOREIGN_KEYS.values()) for name in keys if name}


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
