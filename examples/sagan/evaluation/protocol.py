"""What a figure depends on besides the generator, and the names made of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from sagan.errors import UserError

# Which direction is better, and whether the figure compares with real images.
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
    """Figures of different protocols cannot be compared."""


@dataclass(frozen=True)
class Protocol:
    """How images were generated and measured. Two figures are comparable if their protocols are equal.

    Attributes:
        network: short name of the feature network.
        network_sha256: of its weights.
        resize: how it resizes images.
        precision: of the generator and the feature network.
        proxy: whether the network is the stand-in for Inception on small machines.
        real_split: which real images: "train", "val", ...
        real_count: how many.
        real_checksum: SHA-256 of the SHA-256 of each real image's pixels at the generator's resolution.
        real_resolution: that resolution.
        sample_count: generated images.
        sample_seed: their seed.
        sample_classes: how many classes they cycle through.
        weights: "ema" for the moving average of G's weights, "raw" for the weights.
        bn_statistics: "running", "batch" (of each block of images) or "standing" (of many blocks).
        standing_batches: blocks that standing statistics come from; 0 without.
        block_size: images generated at once where batch norm makes that matter; else 0.
        truncation: largest coordinate of a latent, larger ones are redrawn; None without.
        splits: of the Inception Score.
        kid_subsets: pairs of subsets for KID.
        kid_subset_size: samples in each.
        neighbours: k of precision and recall.
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
        """Return a name such as fid50k-train-tfinception, of what differs most between publications."""
        _, compares_with_real = FIGURES[figure]
        thousands, rest = divmod(self.sample_count, 1000)
        parts = [f"{figure}{self.sample_count if rest else f'{thousands}k'}"]
        if compares_with_real:
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
        """12 hex digits, different for every other protocol."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def check_comparable(self, other: Protocol) -> None:
        """Raise ProtocolError, which names the fields that differ, if figures of the two may not be compared."""
        theirs = asdict(other)
        changes = [
            f"{name} {mine!r} against {theirs[name]!r}"
            for name, mine in asdict(self).items()
            if mine != theirs[name]
        ]
        if changes:
            raise ProtocolError(f"figures of different protocols cannot be compared: {'; '.join(changes)}")
