"""The recipes against the published settings, and the configuration's own rules."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sagan.data import DataConfig
from sagan.errors import UserError
from sagan.recipes import (
    DEFAULT_RECIPE,
    RECIPES,
    OptimizerConfig,
    OutputConfig,
    RunConfig,
    config_from_dict,
    differences,
)

EVERY_RECIPE = pytest.mark.parametrize("name", list(RECIPES))
# Later fields of the networks, for other code bases, by dotted name.
ADDED = {
    "network.g_channels": [],
    "network.d_channels": [],
    "network.d_last_blocks": 1,
    "network.d_hidden_channels": "out",
    "network.d_relu_before_blocks": False,
    "network.attention_bias": False,
    "network.upsampling": "nearest",
    "network.condition": "table",
    "network.embedding_dim": 128,
    "network.hierarchical_latents": False,
    "network.sn_eps_mode": "add",
    "network.sn_iterate_in_evaluation": True,
    "network.last_bn_eps": None,
}
# The ICML paper's settings, by dotted name.
PAPER = {
    **ADDED,
    "iterations": 1_000_000,
    "batch_size": 256,
    "accumulation": 1,
    "d_steps": 1,
    "loss": "hinge",
    "d_vectors_move_in_g_step": False,
    "ema_decay": 0.0,
    "ema_start": 0,
    "precision": "fp32",
    "network.resolution": 128,
    "network.base_width": 64,
    "network.num_classes": None,
    "network.latent_dim": 128,
    "network.g_attention": [32],
    "network.d_attention": [32],
    "network.mixer": "attention",
    "network.g_spectral_norm": True,
    "network.d_spectral_norm": True,
    "network.sn_eps": 1e-12,
    "network.bn_eps": 1e-5,
    "network.bn_momentum": 0.001,
    "network.last_bn_momentum": 0.0001,
    "network.biased_running_var": True,
    "network.init": "xavier_uniform",
    "optimizer.g_lr": 1e-4,
    "optimizer.d_lr": 4e-4,
    "optimizer.beta1": 0.0,
    "optimizer.beta2": 0.9,
    "optimizer.eps": 1e-8,
    "images.horizontal_flip": False,
}
NO_ATTENTION: dict[str, Any] = {"network.g_attention": [], "network.d_attention": []}
# What each recipe changes against the paper.
PUBLISHED: dict[str, dict[str, Any]] = {
    "paper": {},
    "released_code": {"iterations": 2_000_000, "optimizer.beta2": 0.999},
    "best_known": {
        "d_vectors_move_in_g_step": True,
        "ema_decay": 0.999,
        "ema_start": 2000,
        "network.sn_eps": 1e-8,
        "network.bn_momentum": 0.1,
        "network.last_bn_momentum": 0.1,
        "network.biased_running_var": False,
        "optimizer.beta2": 0.999,
    },
    "sn_on_d_only": {**NO_ATTENTION, "network.g_spectral_norm": False, "optimizer.d_lr": 1e-4},
    "sn_on_gd": {**NO_ATTENTION, "optimizer.d_lr": 1e-4},
    "sn_on_gd_ttur": NO_ATTENTION,
    **{
        f"{mixer}_{n}": {"network.mixer": mixer, "network.g_attention": [n], "network.d_attention": [n]}
        for mixer in ("attention", "residual")
        for n in (8, 16, 32, 64)
    },
}


class TestRecipes:
    def test_there_is_one_for_each_published_setting_and_the_demo(self) -> None:
        assert set(RECIPES) == {*PUBLISHED, "digits"}
        assert DEFAULT_RECIPE == "best_known"

    @pytest.mark.parametrize("name", list(PUBLISHED))
    def test_values_are_the_published_ones(self, name: str) -> None:
        values = RECIPES[name]().by_name()
        expected = {**PAPER, **PUBLISHED[name]}
        assert {key: values[key] for key in expected} == expected
        groups = ("images.", "output.", "health.", "step.", "evaluation.")
        others = {key: values[key] for key in values.keys() - expected if not key.startswith(groups)}
        assert others == {"recipe": name, "data": None, "out": "runs/sagan", "device": "auto", "seed": 0}

    def test_digits_differ_from_the_paper_where_its_docstring_says(self) -> None:
        run = RECIPES["digits"]()
        assert (run.recipe, run.loss) == ("digits", "hinge")
        assert (run.network.resolution, run.network.g_attention) == (32, (16,))
        assert run.optimizer.d_lr == 4 * run.optimizer.g_lr
        assert run.ema_decay > 0


class TestRunConfig:
    @EVERY_RECIPE
    def test_round_trip_through_json(self, name: str) -> None:
        config = replace(RECIPES[name](), data=Path("some/where"))
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config_from_dict(RECIPES[name]().to_dict()).data is None

    @pytest.mark.parametrize("group", [None, "network", "optimizer", "images", "output"])
    def test_unknown_and_missing_fields_are_refused_by_name(self, group: str | None) -> None:
        values = RunConfig(recipe="paper").to_dict()
        part = values if group is None else values[group]
        removed = next(iter(part))
        value = part.pop(removed)
        with pytest.raises(UserError, match=rf"missing \['{removed}'\]"):
            config_from_dict(values)
        part.update({removed: value, "lerning_rate": 1})
        with pytest.raises(UserError, match=r"unknown \['lerning_rate'\]$"):
            config_from_dict(values)

    def test_a_configuration_from_before_a_field_of_the_networks_means_its_default(self) -> None:
        run = RECIPES["best_known"]()
        values = run.to_dict()
        older = {name: value for name, value in values["network"].items() if f"network.{name}" not in ADDED}
        assert config_from_dict({**values, "network": older}) == run

    def test_values_out_of_range_are_refused_when_read(self) -> None:
        values = RunConfig(recipe="paper").to_dict()
        values["network"]["resolution"] = 100
        with pytest.raises(UserError, match="resolution"):
            config_from_dict(values)

    def test_configurations_are_frozen(self) -> None:
        run = RunConfig(recipe="paper")
        for config in (run, run.network, run.optimizer, run.images, run.step, run.health, run.output):
            with pytest.raises(FrozenInstanceError):
                setattr(config, next(iter(asdict(config))), 1)

    def test_differences_name_fields_by_their_dotted_path_with_both_values(self) -> None:
        one = RECIPES["paper"]()
        other = replace(one, seed=3, network=replace(one.network, g_attention=(8, 16)))
        assert differences(one, other) == {"seed": (0, 3), "network.g_attention": ([32], [8, 16])}
        assert differences(one, one) == {}

    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            (RunConfig, {"iterations": 0}, "iterations: expected at least 1, got 0"),
            (RunConfig, {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
            (RunConfig, {"accumulation": 0}, "accumulation: expected at least 1, got 0"),
            (RunConfig, {"d_steps": 0}, "d_steps: expected at least 1, got 0"),
            (RunConfig, {"accumulation": 3}, "accumulation: expected a divisor of batch_size = 256, got 3"),
            (RunConfig, {"ema_decay": 1.0}, "ema_decay: expected from 0 to below 1, got 1.0"),
            (RunConfig, {"ema_decay": -0.1}, "ema_decay: expected from 0 to below 1, got -0.1"),
            (RunConfig, {"ema_start": -1}, "ema_start: expected at least 0, got -1"),
            (RunConfig, {"seed": -1}, "seed: expected at least 0, got -1"),
            (RunConfig, {"loss": "wasserstein"}, "loss: expected one of .*, got 'wasserstein'"),
            (RunConfig, {"precision": "fp8"}, "precision: expected one of .*, got 'fp8'"),
            (OptimizerConfig, {"g_lr": 0.0}, "g_lr: expected above 0, got 0.0"),
            (OptimizerConfig, {"d_lr": -1.0}, "d_lr: expected above 0, got -1.0"),
            (OptimizerConfig, {"eps": float("nan")}, "eps: expected above 0, got nan"),
            (OptimizerConfig, {"beta1": 1.0}, "beta1, beta2: expected from 0 to below 1, got 1.0, 0.9"),
            (OptimizerConfig, {"beta2": -0.1}, "beta1, beta2: expected from 0 to below 1, got 0.0, -0.1"),
            (DataConfig, {"resample": "cubic"}, "resample: expected one of bilinear, .*, got 'cubic'"),
            (DataConfig, {"workers": -1}, "workers: expected at least 0, got -1"),
            (DataConfig, {"cache_mib": -1}, "cache_mib: expected at least 0, got -1"),
            (OutputConfig, {"log_every": 0}, "log_every: expected at least 1, got 0"),
            (OutputConfig, {"keep_checkpoints": 0}, "keep_checkpoints: expected at least 1, got 0"),
        ],
    )
    def test_values_out_of_range_are_refused_by_name(
        self, kind: Any, changes: dict[str, Any], message: str
    ) -> None:
        required = {"recipe": "paper"} if kind is RunConfig else {}
        with pytest.raises(UserError, match=message):
            kind(**required, **changes)
