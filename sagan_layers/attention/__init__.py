"""Self-attention: the module, its functional forms, their definition and their backends."""

from sagan_layers.attention.module import SelfAttention2d

__all__ = ["SelfAttention2d"]
