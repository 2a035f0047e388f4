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
    """How images were generated and measured. Two figures are comparable if their protocols are equal."""

    network: str  # short name of the feature network
    network_sha256: str  # of its weights
    resize: str  # how it resizes images
    precision: str  # of the generator and the feature network
    proxy: bool  # whether the network is the stand-in for Inception on small machines
    real_split: str  # which real images: "train", "val", ...
    real_count: int
    real_checksum: str  # SHA-256 of the SHA-256 of each real image's pixels at the generator's resolution
    real_resolution: int  # that resolution
    sample_count: int  # generated images
    sample_seed: int
    sample_classes: int  # how many classes the samples cycle through
    weights: str  # "ema" for the moving average of G's weights, "raw" for the weights
    bn_statistics: str  # "running", "batch" (of each block of images) or "standing" (of many blocks)
    standing_batches: int  # blocks that standing statistics come from; 0 without
    block_size: int  # images generated at once where batch norm makes that matter; else 0
    truncation: float | None  # largest coordinate of a latent, larger ones are redrawn; None without
    splits: int  # of the Inception Score
    kid_subsets: int  # pairs of subsets for KID
    kid_subset_size: int
    neighbours: int  # k of precision and recall

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
