"""Networks of other code bases: recognised by their entries, read from files, made runs, and written back."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peer_vectors
import pytest
import torch
from command_line import refused, succeed
from safetensors.torch import save_file
from test_peer_networks import PEERS, TABLES, Peer
from torch import Tensor
from training_runs import assert_same

from sagan.convert import layout, load_network, save_network
from sagan.errors import UserError
from sagan.networks import Discriminator, Generator, NetworkConfig, discriminator_widths, generator_widths
from sagan.recipes import config_from_dict
from sagan.recognition import read_networks
from sagan.train.checkpoint import find_checkpoint, load_checkpoint
from sagan.weight_files import read_weights
from sagan_layers import convert
from sagan_layers.convert import CODE_BASES

State = dict[str, Tensor]
UNTOLD = ("bn_eps", "sn_eps", "d_relu_before_blocks")  # fields of peers that names and shapes do not tell
SAVED_UNTOLD = ("sn_eps_mode", "bn_momentum", "last_bn_momentum", "last_bn_eps", "biased_running_var")
FROM = ("convert", "--from", "biggan_pytorch", "--weights")
TINY = NetworkConfig(
    resolution=32,
    g_channels=(8, 8, 16, 8),
    d_channels=(8, 16, 16, 16),
    d_last_blocks=2,
    num_classes=3,
    latent_dim=8,
    g_attention=(16,),
    d_attention=(8,),
    sn_eps_mode="clamp",
    bn_momentum=0.1,
    last_bn_momentum=0.1,
    last_bn_eps=1e-5,
    biased_running_var=False,
)


def networks_of(config: NetworkConfig, seed: int = 0) -> tuple[Generator, Discriminator]:
    torch.manual_seed(seed)
    networks = Generator(config), Discriminator(config)
    for network in networks:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return networks


def states_of(code_base: str, config: NetworkConfig = TINY, seed: int = 0) -> tuple[State, State]:
    generator, discriminator = networks_of(config, seed)
    table = CODE_BASES[code_base]
    return save_network(generator, table), save_network(discriminator, table)


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: value for name, value in state.items()}


def saved(path: Path, contents: Any) -> Path:
    torch.save(contents, path)
    return path


def recognised(code_base: str, *states: State, **overrides: Any) -> NetworkConfig:
    states += ({},) * (3 - len(states))
    return read_networks(TABLES[code_base], *states, **overrides).config


def assert_build_the_same(found: NetworkConfig, expected: NetworkConfig) -> None:
    assert generator_widths(found) == generator_widths(expected)
    assert discriminator_widths(found) == discriminator_widths(expected)
    widths = {name: getattr(found, name) for name in ("base_width", "g_channels", "d_channels")}
    assert replace(expected, **widths) == found


class TestRecognition:
    @pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.vectors)
    def test_a_peers_networks_are_recognised_by_their_entries(self, peer: Peer) -> None:
        vectors = peer_vectors.read(peer.vectors)
        states = [peer_vectors.draw_state(shapes) for shapes in (vectors.g_shapes, vectors.d_shapes)]
        untold = {name: peer.fields[name] for name in UNTOLD if name in peer.fields}
        assert_build_the_same(recognised(peer.code_base, *states, **untold), peer.config())
        with pytest.raises(UserError, match=r"^weights: .* got a discriminator's, which are d_weights$"):
            recognised(peer.code_base, *reversed(states), **untold)
        with pytest.raises(UserError, match=r"^d_weights: .* got a generator's$"):
            recognised(peer.code_base, states[0], states[0], **untold)

    @pytest.mark.parametrize(
        ("code_base", "changes"),
        [
            ("biggan_pytorch", {}),
            ("biggan_pytorch", {"num_classes": 0}),
            ("biggan_pytorch", {"g_attention": (), "d_attention": ()}),
            ("biggan_pytorch", {"g_attention": (8, 16, 32), "d_attention": (16, 8)}),
            ("biggan_pytorch", {"g_spectral_norm": False}),
            ("biggan_pytorch", {"condition": "embedding", "embedding_dim": 5}),
            (
                "biggan_pytorch",
                {"condition": "embedding", "embedding_dim": 5, "hierarchical_latents": True},
            ),
            (
                "biggan_pytorch",
                {"d_channels": (4, 8, 16, 32, 32), "d_attention": (), "d_hidden_channels": "in"},
            ),
            ("biggan_pytorch", {"d_channels": (4, 8, 16), "d_last_blocks": 1}),
            ("tensorflow", {"g_channels": (8, 8, 16, 24)}),
        ],
    )
    def test_every_structure_that_is_saved_is_recognised(
        self, code_base: str, changes: dict[str, Any]
    ) -> None:
        config = replace(TINY, **changes)
        untold = {name: getattr(config, name) for name in SAVED_UNTOLD}
        assert_build_the_same(recognised(code_base, *states_of(code_base, config), **untold), config)

    def test_channels_that_follow_the_rule_become_its_base_width(self) -> None:
        config = replace(TINY, base_width=2, g_channels=(), d_channels=(), d_last_blocks=1)
        found = recognised("biggan_pytorch", *states_of("biggan_pytorch", config))
        assert (found.base_width, found.g_channels, found.d_channels) == (2, (), ())

    def test_places_that_names_and_shapes_do_not_tell_are_asked_for(self) -> None:
        config = replace(TINY, g_channels=(8, 8, 8, 8))
        states = states_of("tensorflow", config)
        expected = r"g_attention: expected \[8\] or \[16\] or \[32\], which fit the weights, got "
        with pytest.raises(UserError, match=expected + "None"):
            recognised("tensorflow", *states)
        with pytest.raises(UserError, match=expected + r"\(4,\)"):
            recognised("tensorflow", *states, g_attention=(4,))
        assert recognised("tensorflow", *states, g_attention=(16,)).g_attention == (16,)

    def test_networks_that_only_look_like_those_that_ours_can_express_are_refused(self) -> None:
        networks = networks_of(NetworkConfig(resolution=64, base_width=2, num_classes=0))
        states = [
            convert.save(network, "mimicry", **layout(network, CODE_BASES["mimicry"])) for network in networks
        ]
        expected = "the discriminator of mimicry cannot be expressed: expected resolution 32 or 128, got 64"
        with pytest.raises(UserError, match=expected):
            recognised("mimicry", *states)
        with pytest.raises(UserError, match=expected):
            load_network(networks[1], states[1], "mimicry")
        with pytest.raises(UserError, match=expected):
            save_network(networks[1], "mimicry")
        assert recognised("mimicry", states[0]).resolution == 64

    def test_a_place_other_than_the_weights_tell_is_refused(self) -> None:
        with pytest.raises(
            UserError, match=r"d_attention: expected \[8\], which fit the weights, got \(16,\)"
        ):
            recognised("biggan_pytorch", *states_of("biggan_pytorch"), d_attention=(16,))

    def test_a_new_discriminator_attends_where_the_generator_does(self) -> None:
        generator, _ = states_of("biggan_pytorch", replace(TINY, g_attention=(16, 32)))
        assert recognised("biggan_pytorch", generator).d_attention == (16,)


class TestUnfittingEntries:
    @pytest.fixture
    def states(self) -> tuple[State, State]:
        return states_of("biggan_pytorch")

    def test_missing_entries_of_the_nearest_structure_are_named(self, states: tuple[State, State]) -> None:
        generator, discriminator = states
        del generator["blocks.1.0.conv2.bias"], discriminator["blocks.0.0.conv_sc.weight"]
        with pytest.raises(
            UserError, match=r"no generator of BigGAN-PyTorch .* missing: blocks.1.0.conv2.bias$"
        ):
            recognised("biggan_pytorch", generator)
        with pytest.raises(UserError, match=r"no discriminator .* missing: blocks.0.0.conv_sc.weight$"):
            recognised("biggan_pytorch", states_of("biggan_pytorch")[0], discriminator)

    def test_many_entries_are_named_by_the_first_and_a_count(self, states: tuple[State, State]) -> None:
        extra = {f"extra.{number}": torch.zeros(1) for number in range(40)}
        with pytest.raises(UserError, match=r"left over: extra.0, .*, extra.4 and 35 more$"):
            recognised("biggan_pytorch", {**states[0], **extra})

    def test_misshapen_entries_are_named_with_both_shapes(self, states: tuple[State, State]) -> None:
        states[0]["blocks.0.0.conv1.bias"] = torch.zeros(7)
        with pytest.raises(UserError, match=r"blocks.0.0.conv1.bias \(expected \[8\], got \[7\]\)"):
            recognised("biggan_pytorch", *states)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((), "linear.weight: expected 2 axes, got []"),
            ((3,), "linear.weight: expected 2 axes, got [3]"),
            ((0, 0), "latent_dim: expected at least 1, got 0"),
        ],
    )
    def test_shapes_that_tell_no_sizes_are_named(
        self, shape: tuple[int, ...], message: str, states: tuple[State, State]
    ) -> None:
        states[0]["linear.weight"] = torch.zeros(shape)
        with pytest.raises(UserError, match=re.escape(f"that is known; {message}") + "$"):
            recognised("biggan_pytorch", *states)

    def test_weights_that_are_no_floating_point_ones_are_named(self, states: tuple[State, State]) -> None:
        states[1]["linear.weight"] = states[1]["linear.weight"].int()
        with pytest.raises(
            UserError, match=r"^linear.weight: expected a floating-point tensor, got torch.int32"
        ):
            recognised("biggan_pytorch", *states)

    def test_weights_of_another_code_base_are_refused(self, states: tuple[State, State]) -> None:
        with pytest.raises(UserError, match="no generator of PyTorch-StudioGAN that is known; missing: "):
            recognised("studiogan", *states)

    def test_networks_with_other_classes_are_refused(self, states: tuple[State, State]) -> None:
        _, other = states_of("biggan_pytorch", replace(TINY, num_classes=4))
        with pytest.raises(UserError, match=r"embed.weight \(expected \[3, 16\], got \[4, 16\]\)"):
            recognised("biggan_pytorch", states[0], other)

    def test_a_discriminator_for_larger_images_is_refused(self, states: tuple[State, State]) -> None:
        larger = replace(TINY, resolution=128, g_channels=(8,) * 6, d_channels=(8,) * 6, d_last_blocks=1)
        _, other = states_of("biggan_pytorch", larger)
        with pytest.raises(UserError, match=r"no discriminator .* left over: blocks.3.0.conv_sc"):
            recognised("biggan_pytorch", states[0], other)

    def test_attention_after_a_block_that_keeps_the_resolution_is_refused(
        self, states: tuple[State, State]
    ) -> None:
        moved = {name.replace("blocks.1.1.", "blocks.2.1."): value for name, value in states[1].items()}
        with pytest.raises(UserError, match="expected attention after blocks that halve the resolution only"):
            recognised("biggan_pytorch", states[0], moved)

    def test_an_average_of_another_generator_is_refused(self, states: tuple[State, State]) -> None:
        other, _ = states_of("biggan_pytorch", replace(TINY, latent_dim=9))
        with pytest.raises(
            UserError, match=r"^the moving average: .*linear.weight \(expected \[128, 8\], got \[128, 9\]\)"
        ):
            recognised("biggan_pytorch", *states, other)

    def test_a_file_without_a_generator_is_refused(self, states: tuple[State, State]) -> None:
        with pytest.raises(UserError, match="weights: expected those of a generator, got none"):
            recognised("biggan_pytorch", prefixed("discriminator.", states[1]))

    def test_entries_beside_those_of_networks_are_named(self, states: tuple[State, State]) -> None:
        weights = {**prefixed("generator.", states[0]), "loss.weight": torch.zeros(1)}
        with pytest.raises(UserError, match=r"got others too: \['loss.weight'\]"):
            recognised("biggan_pytorch", weights)


class TestFiles:
    @pytest.fixture
    def states(self) -> tuple[State, State, State]:
        return *states_of("biggan_pytorch"), states_of("biggan_pytorch", seed=1)[0]

    def files(self, form: str, folder: Path, states: tuple[State, State, State]) -> list[object]:
        generator, discriminator, average = states
        if form == "prefixes":
            parts = zip(("generator.", "discriminator.", "generator_ema."), states, strict=True)
            together = {
                name: value for prefix, state in parts for name, value in prefixed(prefix, state).items()
            }
            return ["--weights", saved(folder / "all.pth", {"state_dict": together, "meta": {"epoch": 3}})]
        if form == "arrays":
            paths = [folder / f"{name}.npz" for name in ("G", "D", "E")]
            for path, state in zip(paths, states, strict=True):
                np.savez(path, **{name: value.numpy() for name, value in state.items()})
        elif form == "safetensors":
            paths = [folder / f"{name}.safetensors" for name in ("G", "D", "E")]
            for path, state in zip(paths, states, strict=True):
                save_file(state, path)
        else:
            paths = [
                saved(folder / "G.pth", generator),
                saved(folder / "D.pth", {"model_state_dict": discriminator, "global_step": 7}),
                saved(folder / "E.pth", prefixed("module.", average)),
            ]
        return ["--weights", paths[0], "--d-weights", paths[1], "--ema-weights", paths[2]]

    @pytest.mark.parametrize("form", ["containers", "prefixes", "arrays", "safetensors"])
    def test_files_of_every_form_become_the_same_run(
        self, form: str, tmp_path: Path, states: tuple[State, State, State]
    ) -> None:
        options = self.files(form, tmp_path, states)
        out = tmp_path / "run"
        succeed("convert", "--from", "biggan_pytorch", *options, "--out", out)
        state = load_checkpoint(find_checkpoint(out))
        config = config_from_dict(state["config"]).network
        generator, discriminator, average = Generator(config), Discriminator(config), Generator(config)
        for network, entries in zip((generator, discriminator, average), states, strict=True):
            load_network(network, entries, "biggan_pytorch")
        assert_same(dict(state["generator"]), dict(generator.state_dict()))
        assert_same(dict(state["discriminator"]), dict(discriminator.state_dict()))
        assert state["average"] is not None
        found = {name: state["average"][f"module.{name}"] for name in average.state_dict()}
        assert_same(found, dict(average.state_dict()))
        assert (state["iteration"], state["g_optimizer"]["state"]) == (0, {})

    def test_a_tensorflow_checkpoint_holds_both_networks_and_optimizer_slots(self, tmp_path: Path) -> None:
        config = replace(TINY, g_channels=(8, 8, 16, 24))
        generator, discriminator = networks_of(config)
        entries = {}
        for network in (generator, discriminator):
            entries |= prefixed("model/", save_network(network, "tensorflow"))
        slots = {f"{name}/Adam": value for name, value in entries.items()}
        arrays = {name: value.numpy() for name, value in {**entries, **slots}.items()}
        path = tmp_path / "model.npz"
        np.savez(path, **arrays, global_step=np.array(7), beta1_power=np.array(0.0))
        succeed("convert", "--from", "tensorflow", "--weights", path, "--out", tmp_path / "run")
        state = load_checkpoint(find_checkpoint(tmp_path / "run"))
        for name, network in (("generator", generator), ("discriminator", discriminator)):
            for key, value in network.state_dict().items():
                if not key.endswith(("weight_v", "num_batches_tracked")):  # TensorFlow has none
                    assert torch.equal(state[name][key], value), key  # type: ignore[literal-required]

    @pytest.mark.parametrize(
        ("name", "contents", "message"),
        [
            (
                "G.pth",
                object,
                r"is not read \(it holds more than tensors .* save it again where it was written",
            ),
            ("G.pth", 3, "expected tensors by name, got 3"),
            (
                "G.pth",
                {"a": torch.ones(1), "b": "text"},
                r"tensors only, got others in \['b'\]; save the state dict",
            ),
            ("G.npz", b"none", r"is not read .* expected arrays of numpy.savez"),
            ("G.npz", b"PK\3\4 damaged", r"is not read .* expected arrays of numpy.savez"),
            ("G.pth", {}, "expected tensors by name, got a dict of 0"),
            ("G.safetensors", b"none", r"is not read .* expected a file of safetensors"),
        ],
    )
    def test_other_files_are_refused_by_name(
        self, name: str, contents: Any, message: str, tmp_path: Path
    ) -> None:
        path = tmp_path / name
        if isinstance(contents, bytes):
            path.write_bytes(contents)
        else:
            torch.save(contents, path)
        error = refused(*FROM, path, "--out", tmp_path / "run")
        assert str(path) in error
        assert re.search(message, error)
        assert not (tmp_path / "run").exists()


def test_a_file_is_read_as_what_it_is_whatever_it_is_called(tmp_path: Path) -> None:
    arrays = {"a": np.ones(2, np.float32)}
    np.savez(tmp_path / "arrays", **arrays)
    save_file({"a": torch.ones(2)}, tmp_path / "tensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "state")
    for name, given in (("arrays.npz", "G.pth"), ("tensors", "G.PTH"), ("state", "G.npz")):
        path = (tmp_path / name).rename(tmp_path / given)
        assert torch.equal(torch.as_tensor(read_weights(path)["a"]), torch.ones(2))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of BigGAN-PyTorch's networks, and the run made of them."""
    folder = tmp_path_factory.mktemp("converted")
    generator, discriminator = states_of("biggan_pytorch")
    saved(folder / "G.pth", generator)
    saved(folder / "D.pth", discriminator)
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    printed = succeed(
        *(*FROM, folder / "G.pth", "--d-weights", folder / "D.pth"),
        *("--class-names", folder / "classes.txt", "--sn-eps", "1e-8", "--out", folder / "run"),
    )
    (folder / "printed").write_text(printed)
    return folder


class TestCommand:
    def test_what_was_found_and_what_was_assumed_is_printed(self, converted: Path) -> None:
        lines = [line.split(maxsplit=1) for line in (converted / "printed").read_text().splitlines()]
        printed = {line[0]: line[1] for line in lines if len(line) == 2}
        assert printed["resolution"] == "32"
        assert printed["g_channels"] == "(8, 8, 16, 8)"
        assert printed["num_classes"] == "3"
        assert printed["sn_eps"] == "1e-08 (an option)"
        assert printed["sn_eps_mode"] == "clamp (BigGAN-PyTorch)"
        assert printed["bn_eps"] == "1e-05 (the default)"
        assert printed["No"] == "moving average: it is G itself."

    def test_a_converted_run_can_be_sampled_drawn_and_evaluated(
        self, converted: Path, image_folder: Path, tmp_path: Path
    ) -> None:
        source, cpu = ("--source", converted / "run"), ("--device", "cpu")
        grid, maps = tmp_path / "grid.png", tmp_path / "maps.png"
        succeed(
            "sample", *source, *cpu, "--out", grid, "--classes", "bee", "cat", "--count", 4, "--columns", 2
        )
        succeed("attention-maps", *source, *cpu, "--out", maps, "--count", 1)
        assert grid.is_file()
        assert maps.is_file()
        figures = ("--metrics", "fid", "--proxy", "--count", 24, "--cache", tmp_path / "cache")
        options = ("--data", image_folder, "--out", tmp_path / "figures", *figures)
        assert "proxy-fid24" in succeed("evaluate", *source, *cpu, *options)

    def test_a_converted_run_trains_on_with_the_printed_command(
        self, converted: Path, image_folder: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(converted / "run", run)
        printed = (converted / "printed").read_text().splitlines()[-1]
        command = shlex.split(
            printed.replace("DATA", str(image_folder)).replace(str(converted / "run"), str(run))
        )
        small = ("--iterations", 1, "--batch-size", 4, "--output.grid-columns", 2, "--device", "cpu")
        succeed(*command[2:], *small)
        before, after = (load_checkpoint(find_checkpoint(each)) for each in (converted / "run", run))
        assert after["iteration"] == 1
        assert config_from_dict(before["config"]).network == config_from_dict(after["config"]).network
        for name in ("generator", "average"):
            old, new = before[name], after[name]  # type: ignore[literal-required]
            moved = [key for key in old if key.endswith("last_conv.weight")]
            assert 0 < (old[moved[0]] - new[moved[0]]).abs().max() < 1e-3

    def test_writing_back_gives_the_same_entries(self, converted: Path, tmp_path: Path) -> None:
        out = tmp_path / "back"
        printed = succeed("convert", "--to", "biggan_pytorch", "--source", converted / "run", "--out", out)
        assert "G.pth, D.pth, G_ema.pth written to" in printed
        for name, source in (("G", "G"), ("D", "D"), ("G_ema", "G")):
            before, after = (
                torch.load(folder / f"{each}.pth") for folder, each in ((converted, source), (out, name))
            )
            assert before.keys() == after.keys()
            for key, value in before.items():
                if not key.endswith("sv0"):  # the last sigma, for logs
                    torch.testing.assert_close(after[key], value, rtol=1e-6, atol=1e-6)

    def test_settings_that_entries_do_not_hold_are_named(self, trained_run: Path, tmp_path: Path) -> None:
        printed = succeed(
            "convert", "--to", "biggan_pytorch", "--source", trained_run, "--out", tmp_path / "out"
        )
        assert "others there: sn_eps_mode add, last_bn_momentum 0.0001, biased_running_var True\n" in printed
        assert not torch.load(tmp_path / "out" / "G.pth")["linear.weight"].isnan().any()

    def test_settings_are_named_also_where_the_code_base_has_our_default(
        self, converted: Path, tmp_path: Path
    ) -> None:
        run, out = tmp_path / "run", tmp_path / "out"
        succeed(*FROM, converted / "G.pth", "--bn-eps", "0.001", "--sn-eps", "0.002", "--out", run)
        printed = succeed("convert", "--to", "biggan_pytorch", "--source", run, "--out", out)
        assert "others there: sn_eps 0.002, bn_eps 0.001\n" in printed

    def test_runs_that_a_code_base_cannot_express_are_refused(
        self, trained_run: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        message = refused("convert", "--to", "studiogan", "--source", trained_run, "--out", out)
        assert "cannot express this generator: expected condition one_hot or embedding, got table" in message
        assert not out.exists()

    def test_a_code_base_with_one_attention_layer_refuses_two(self) -> None:
        config = replace(TINY, g_attention=(8, 16), upsampling="bilinear")
        with pytest.raises(UserError, match=r"expected attention at one resolution, got \['8', '16'\]"):
            save_network(Generator(config), "mimicry")

    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            (Generator, {"mixer": "residual"}, "expected mixer attention, got residual"),
            (Generator, {"attention_bias": True}, "expected attention_bias False, got True"),
            (Generator, {"upsampling": "nearest"}, "expected upsampling bilinear, got nearest"),
            (Discriminator, {"d_relu_before_blocks": False}, "expected d_relu_before_blocks True, got False"),
            (Discriminator, {"d_hidden_channels": "out"}, "expected d_hidden_channels in, got out"),
        ],
    )
    def test_settings_that_a_code_base_does_not_have_are_refused(
        self, kind: Any, changes: dict[str, Any], message: str
    ) -> None:
        mimicry = replace(TINY, upsampling="bilinear", d_relu_before_blocks=True, d_hidden_channels="in")
        config = replace(mimicry, **changes)
        with pytest.raises(
            UserError, match=f"mimicry cannot express this {kind.__name__.lower()}: {message}"
        ):
            save_network(kind(config), "mimicry")

    def test_without_a_discriminator_a_new_one_is_drawn(self, converted: Path, tmp_path: Path) -> None:
        printed = succeed(*FROM, converted / "G.pth", "--out", tmp_path / "run")
        assert "No weights of D: a new one is drawn." in printed

    def test_weights_that_are_not_finite_are_refused(self, converted: Path, tmp_path: Path) -> None:
        state = torch.load(converted / "G.pth")
        state["linear.bias"][0] = torch.nan
        path = saved(tmp_path / "G.pth", state)
        message = refused(*FROM, path, "--out", tmp_path / "run")
        assert "generator.linear.bias: expected finite values, got 1 of 128 NaN or infinite" in message
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "--from, --to: expected one of them, got none"),
            (["--from", "studiogan", "--to", "studiogan"], "--from, --to: expected one of them, got both"),
            (["--from", "biggan"], "from: expected one of .*biggan_pytorch.*; got 'biggan'"),
            (["--from", "heykeetae"], r"from: these networks .*; sagan_layers.convert.load takes its blocks"),
            (["--to", "torchgan"], "to: expected one of .*; got 'torchgan'"),
            (["--from", "studiogan"], "weights: expected a file with --from, got none"),
            (
                ["--from", "studiogan", "--weights", "G", "--source", "run"],
                "source: expected none with --from",
            ),
            (["--to", "studiogan"], "source: expected a run with --to, got none"),
            (["--to", "studiogan", "--source", "run", "--weights", "G"], "weights: expected none with --to"),
            (["--to", "studiogan", "--source", "run", "--sn-eps", "1"], "--sn-eps: expected none with --to"),
            (["--from", "studiogan", "--weights", "absent.pth"], "absent.pth"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(
        self, options: list[str], message: str, tmp_path: Path
    ) -> None:
        assert re.search(message, refused("convert", *options, "--out", tmp_path / "out"))

    def test_class_names_must_be_as_many_as_classes(self, converted: Path, tmp_path: Path) -> None:
        names = tmp_path / "names.txt"
        names.write_text("ant\nbee\n")
        message = refused(*FROM, converted / "G.pth", "--class-names", names, "--out", tmp_path / "run")
        assert f"--class-names: expected 3 lines, got 2 in {names}" in message

    def test_a_folder_in_use_is_left_alone(self, converted: Path) -> None:
        message = refused(*FROM, converted / "G.pth", "--out", converted)
        assert "out: expected a new or empty folder" in message
