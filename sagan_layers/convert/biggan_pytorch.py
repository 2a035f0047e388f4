"""BigGAN-PyTorch, whose attention and spectral norm many others took over."""

from sagan_layers.convert.code_base import CodeBase, Entry, NetworkNames, Row

_STATISTICS: Row = {
    # By default; with its own synchronised batch norm; with torch's form of it.
    "norm.running_mean": ("stored_mean", "bn.stored_mean", "bn.running_mean"),
    "norm.running_var": ("stored_var", "bn.stored_var", "bn.running_var"),
    "norm.num_batches_tracked": None,
}

BIGGAN_PYTORCH = CodeBase(
    title="BigGAN-PyTorch",
    url="https://github.com/ajbrock/BigGAN-PyTorch",
    rows={
        "spectral_norm": {
            "weight_u": Entry("u0", leading=1),
            "weight_v": None,
            "sigma": Entry("sv0", leading=1),
        },
        "attention": {"query": "theta", "key": "phi", "value": "g", "out": "o"},
        "head": {"embedding": "embed"},
        "batch_norm": {"weight": "gain", **_STATISTICS},
        "class_batch_norm": {
            "weight": Entry("gain.weight", offset=1.0),
            "bias": "bias.weight",
            **_STATISTICS,
        },
        "vector_batch_norm": {"weight_projection": "gain", "bias_projection": "bias", **_STATISTICS},
    },
    ignored=("*accumulation_counter", "*bn.num_batches_tracked"),
    generator=NetworkNames(
        block=lambda place: f"blocks.{place.number}.0",
        attention=lambda place: f"blocks.{place.number}.1",
        parts={"norm1": "bn1", "norm2": "bn2", "conv1": "conv1", "conv2": "conv2", "shortcut": "conv_sc"},
        others=lambda blocks: {
            "linear": "linear",
            "embedding": "shared",
            "last_norm": "output_layer.0",
            "last_conv": "output_layer.2",
        },
    ),
    discriminator=NetworkNames(
        block=lambda place: f"blocks.{place.number}.0",
        attention=lambda place: f"blocks.{place.number}.1",
        parts={"conv1": "conv1", "conv2": "conv2", "shortcut": "conv_sc"},
        others=lambda blocks: {"head": ""},
    ),
    settings={
        "d_relu_before_blocks": False,
        "sn_eps_mode": "clamp",
        "bn_momentum": 0.1,
        "last_bn_momentum": 0.1,
        "last_bn_eps": 1e-5,
        "biased_running_var": False,
    },
)
