"""What a figure depends on besides the generator, and the name that says so."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from sagan.errors import UserError

# Which way each figure is better, and whether it compares with real images.
LOWER, HIGHER = "lower", "higher"
FIGURES: dict[str, tuple[str, bool]] = {
    "fid": (LOWER, True),
    "is": (HIGHER, False),
    "kid": (LOWER, True),
    "intra-fid": (LOWER, True),
    "precision": (HIGHER, True),
    "recall": (HIGHER, True),
}


class ProtocolError(UserError):
    """Figures of different protocols, which cannot be compared."""


@dataclass(frozen=True)
class Protocol:
    """How generated images were made and measured. Figures are comparable if their protocols are equal.

    Attributes:
        network: short name of the feature network.
        network_sha256: of its weights.
        resize: how it resizes images.
        precision: of generator and feature network.
        proxy: whether it stands in for the Inception network, on a small machine.
        real_split: which images it compares with: "train", "val", ...
        real_count: how many there are.
        real_checksum: SHA-256 of the SHA-256 of each one's pixels at the generator's resolution.
        real_resolution: that resolution.
        sample_count: generated images.
        sample_seed: of the set of them.
        sample_classes: labels that they go through in turn.
        weights: "ema" for the moving average of G's weights, "raw" for the weights.
        bn_statistics: "running", "batch" (of each block of images) or "standing" (of many blocks).
        standing_batches: how many blocks standing statistics are from; 0 without.
        block_size: images made at once, where batch norm makes that matter; else 0.
        truncation: largest coordinate of a latent, larger ones are drawn again; None without.
        splits: of the Inception Score.
        kid_subsets: pairs of subsets for KID.
        kid_subset_size: samples in each.
        neighbours: for precision and recall.
    """

    network: str
    network_sha256: str
    resize: str
    precision: str
    proxy: bool
    real_split: str
    real_count: int
    real_checksum: str
    real_resolution: int
    sample_count: int
    sample_seed: int
    sample_classes: int
    weights: str
    bn_statistics: str
    standing_batches: int
    block_size: int
    truncation: float | None
    splits: int
    kid_subsets: int
    kid_subset_size: int
    neighbours: int

    def name(self, figure: str) -> str:
        """Return the name of a figure under this protocol, such as fid50k-train-tfinception.

        It is made of what differs most between publications; :attr:`identity` covers all.
        """
        _, compares = FIGURES[figure]
        parts = [figure + _short(self.sample_count)]
        if compares:
            parts.append(self.real_split)
        parts.append(self.network)
        if self.weights == "raw":
            parts.append("raw")
        if self.bn_statistics != "running":
            parts.append(self.bn_statistics)
        if self.truncation is not None:
            parts.append(f"trunc{self.truncation:g}")
        return ("proxy-" if self.proxy else "") + "-".join(parts)

    @property
    def identity(self) -> str:
        """12 hex digits that are others for any other protocol."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: Protocol) -> dict[str, tuple[Any, Any]]:
        """Return the fields in which two protocols differ, with both values."""
        theirs = asdict(other)
        return {name: (world, theirs[name]) for name, world in asdict(self).items() if world != theirs[name]}

    def check_comparable(self, other: Protocol) -> None:
        """Check that figures of this and another protocol may be compared.

        Raises:
            ProtocolError: naming what differs.
        """
        different = self.differences(other)
        if different:
            changes = "; ".join(
                f"{name} {mine!r} against {their!r}" for name, (mine, their) in different.items()
            )
            raise ProtocolError(f"figures of different protocols cannot be compared: {changes}")


def _short(count: int) -> str:
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)
