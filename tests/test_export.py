"""Batch-norm folding, and `fastgan export`."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastgan
from fastgan.cli import main
from fastgan.data import load_dataset
from fastgan.export import TOLERANCE, ExportError, export, plain_generator
from fastgan.models import dcgan
from fastgan.nn import ConvBNAct2d, ConvTransposeBNAct2d, fold_batch_norm
from fastgan.sample import load_generator
from fastgan.train import CatGANConfig, DCGANConfig, GANConfig, Trainer


def settled(network, *shape):
    """The network in float64 and eval mode, its batch norms with weights and statistics of their own."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.1, 3, generator=generator)
            if module.affine:
                nn.init.normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return network.double().eval(), torch.randn(*shape, dtype=torch.float64, generator=generator)


def batch_norms(network):
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


# --- folding


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layer, norm, shape", [
    (lambda bias: nn.Conv2d(4, 6, 3, 2, 1, bias=bias), nn.BatchNorm2d, (3, 4, 7, 5)),
    (lambda bias: nn.Conv2d(4, 6, 3, groups=2, padding_mode="reflect", padding=1, bias=bias), nn.BatchNorm2d, (3, 4, 7, 5)),
    (lambda bias: nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=bias), nn.BatchNorm2d, (3, 4, 3, 5)),
    (lambda bias: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=bias), nn.BatchNorm2d, (3, 4, 3, 5)),
    (lambda bias: nn.ConvTranspose1d(4, 6, 3, bias=bias), nn.BatchNorm1d, (3, 4, 5)),
    (lambda bias: nn.Conv3d(4, 6, 2, bias=bias), nn.BatchNorm3d, (3, 4, 3, 3, 3)),
    (lambda bias: nn.Linear(4, 6, bias=bias), nn.BatchNorm1d, (3, 4)),
], ids=["conv", "conv groups", "transposed", "transposed groups", "transposed 1d", "conv 3d", "linear"])  # fmt: skip
def test_folded_layer_equals_layer_and_batch_norm(layer, norm, shape, bias, affine):
    network, input = settled(nn.Sequential(layer(bias), norm(6, eps=1e-3, affine=affine), nn.ReLU()), *shape)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = fold_batch_norm(network)
    assert [type(child) for child in folded] == [type(network[0]), nn.ReLU]
    torch.testing.assert_close(folded(input), network(input), rtol=1e-10, atol=1e-10)
    # The network itself is as it was.
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_folding_a_fused_generator_gives_plain_layers():
    generator, z = settled(dcgan(16, 3, 5, 4)[0], 4, 5)
    expected = generator(z)
    folded = fold_batch_norm(fastgan.fuse(generator))
    assert type(folded.main) is nn.Sequential and not batch_norms(folded) and len(folded.main) == len(generator.main) - 2
    torch.testing.assert_close(folded(z), expected, rtol=1e-10, atol=1e-10)


def test_folding_fastgans_own_modules_gives_torchs():
    network = nn.Sequential(ConvTransposeBNAct2d(4, 6, 4, 2, 1), ConvBNAct2d(6, 3, 3, activation="leaky_relu", negative_slope=0.3))
    network, input = settled(network, 2, 4, 5, 5)
    folded = fold_batch_norm(network)
    assert not any(type(module).__module__.startswith("fastgan") for module in folded.modules()) and not batch_norms(folded)
    torch.testing.assert_close(folded(input), network(input), rtol=1e-10, atol=1e-10)
    alone = fold_batch_norm(network[0])
    torch.testing.assert_close(alone(input), network[0](input), rtol=1e-10, atol=1e-10)


def test_names_of_layers_are_kept_where_they_have_some():
    network = nn.Sequential()
    for name, layer in (("conv", nn.Conv2d(2, 3, 1)), ("norm", nn.BatchNorm2d(3)), ("act", nn.ReLU())):
        network.add_module(name, layer)
    assert list(fold_batch_norm(network)._modules) == ["conv", "act"]


def shared():
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), conv)


def hooked():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    network[0].register_forward_hook(lambda module, inputs, output: output.relu())
    return network


class Residual(ConvBNAct2d):
    def forward(self, input):
        return input + super().forward(input)


def hooked_own():
    layer = ConvBNAct2d(3, 3, 1)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


@pytest.mark.parametrize("build", [
    shared,
    hooked,
    hooked_own,
    lambda: Residual(3, 3, 1),
    lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
    lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)),
], ids=["shared", "hooked", "hooked module of fastgan", "subclass of one", "no running statistics", "behind an activation", "parametrized"])  # fmt: skip
def test_what_cannot_be_folded_stays_and_computes_the_same(build):
    network, input = settled(build(), 2, 3, 4, 4)
    folded = fold_batch_norm(network)
    assert len(batch_norms(folded)) == 1
    torch.testing.assert_close(folded(input), network(input), rtol=1e-10, atol=1e-10)


def test_folding_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="fold_batch_norm: module must be a torch.nn.Module, got dict"):
        fold_batch_norm({})


# --- files


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run of every family, by its name. The steps are long ones: batch norms and averages then matter."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"max_steps": 4, "device": "cpu", "latent_dim": 5, "learning_rate": 0.02}
    small = {"image_size": 8, "base_channels": 2, "batch_size": 8}
    configs = {
        "dcgan": DCGANConfig(**small, **settings),
        "gan": GANConfig(**settings),
        "one digit": GANConfig(digit=3, ema=0, **settings),
        "catgan": CatGANConfig(**small, **settings),
        "catgan mlp": CatGANConfig(architecture="mlp", **small, **settings),
    }
    for name, config in configs.items():
        config.output = str(folder / name)
        trainer = Trainer(config, load_dataset("digits", image_size=config.image_size))
        trainer.objective.evaluate = lambda trainer: {}
        trainer.train()
    return folder


@pytest.mark.parametrize("family", ["dcgan", "gan", "one digit", "catgan", "catgan mlp"])
def test_plain_generator_has_torchs_layers_no_batch_norm_and_the_same_images(runs, family):
    config, generator = load_generator(runs / family)
    z = config.latent(6, torch.Generator().manual_seed(0))
    plain = plain_generator(generator, 7 if family == "gan" else None)
    assert not batch_norms(plain) and not plain.training
    assert not any(type(module).__module__.startswith("fastgan") for module in plain.modules())
    expected = generator(z.repeat(10, 1))[42:48] if family == "gan" else generator(z)
    torch.testing.assert_close(plain(z), expected, rtol=1e-4, atol=1e-5)


# Exported programs of one family: ONNX files are made of the same programs.
@pytest.mark.parametrize("family, format", [
    ("dcgan", "torch"),
    *((family, format) for family in ("dcgan", "gan", "catgan mlp") for format in ("safetensors", "onnx")),
])  # fmt: skip
def test_export_of_every_format_agrees_with_the_generator(runs, tmp_path, family, format, capsys):
    arguments = ["--digit", "3"] if family == "gan" else []
    out = tmp_path / "generator"
    assert main(["export", "--checkpoint", str(runs / family), "--format", format, "--out", str(out), *arguments]) == 0
    printed = capsys.readouterr()
    assert float(printed.out.split()[-1]) < TOLERANCE / 10 and printed.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["generator"]


def test_onnx_file_takes_any_batch_and_says_what_it_is(runs, tmp_path):
    import onnx
    import onnxruntime

    path = tmp_path / "generator.onnx"
    export(runs / "dcgan", "onnx", path)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("ConvTranspose") == 2 and "BatchNormalization" not in operators
    session = onnxruntime.InferenceSession(path)
    for count in (1, 7):
        assert session.run(None, {"z": torch.zeros(count, 5).numpy()})[0].shape == (count, 1, 8, 8)
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["latent_dim"] == "5" and json.loads(properties["image_shape"]) == [1, 8, 8]


WITHOUT_FASTGAN = """
import sys
sys.modules["fastgan"] = None  # importing it, now or while a file is read, raises
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

folder = sys.argv[1]
z = torch.load(f"{folder}/z.pt")
network = nn.Sequential(
    nn.Unflatten(1, (5, 1, 1)),
    nn.ConvTranspose2d(5, 2, 4), nn.ReLU(),
    nn.ConvTranspose2d(2, 1, 4, 2, 1, bias=False), nn.Tanh(),
)
network.load_state_dict(load_file(f"{folder}/g.safetensors"), strict=True)
program = torch.export.load(f"{folder}/g.pt2").module()
with safe_open(f"{folder}/g.safetensors", "pt") as file:
    metadata = file.metadata()
described = [line.split("(")[0] for line in metadata["layers"].splitlines()]
assert described == ["Unflatten", "ConvTranspose2d", "ReLU", "ConvTranspose2d", "Tanh"], described
torch.save({"safetensors": network(z).detach(), "torch": program(z)}, f"{folder}/images.pt")
assert not any(name.startswith("fastgan.") for name in sys.modules)
"""


def test_weights_and_program_are_used_where_fastgan_cannot_be_imported(runs, tmp_path):
    config, generator = load_generator(runs / "dcgan")
    z = config.latent(3, torch.Generator().manual_seed(1))
    torch.save(z, tmp_path / "z.pt")
    export(runs / "dcgan", "safetensors", tmp_path / "g.safetensors")
    export(runs / "dcgan", "torch", tmp_path / "g.pt2")
    run = subprocess.run([sys.executable, "-c", WITHOUT_FASTGAN, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for name, images in torch.load(tmp_path / "images.pt").items():
        torch.testing.assert_close(images, generator(z).detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_a_file_that_disagrees_is_not_written(runs, tmp_path, monkeypatch, capsys):
    def forgetful(network):
        """What folding would do without the running means."""
        folded = fold_batch_norm(network)
        folded[1].bias.data.zero_()
        return folded

    monkeypatch.setattr("fastgan.export.fold_batch_norm", forgetful)
    out = tmp_path / "generator.onnx"
    out.write_text("older")
    assert main(["export", "--checkpoint", str(runs / "dcgan"), "--format", "onnx", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "was not written: its images differ from the generator's by" in error and error.count("\n") == 1
    assert out.read_text() == "older" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("format, module", [("onnx", "onnxruntime"), ("safetensors", "safetensors")])
def test_a_missing_library_is_named_with_the_extra(runs, tmp_path, monkeypatch, format, module, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    assert main(["export", "--checkpoint", str(runs / "dcgan"), "--format", format, "--out", str(tmp_path / "g")]) == 1
    error = capsys.readouterr().err
    assert f"which is not installed: pip install 'fastgan[{format}]'" in error and module in error
    assert list(tmp_path.iterdir()) == []


def test_networks_side_by_side_want_a_choice(runs, tmp_path):
    with pytest.raises(ExportError, match="10 networks side by side, one a digit: choose one by --digit 0 to 9"):
        export(runs / "gan", "torch", tmp_path / "g.pt2")


@pytest.mark.parametrize("run", ["dcgan", "one digit"])
def test_a_choice_where_there_is_none_is_refused(runs, tmp_path, run):
    with pytest.raises(ExportError, match="--digit 5: the checkpoint holds one network; leave it out"):
        export(runs / run, "torch", tmp_path / "g.pt2", digit=5)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_named(runs, tmp_path):
    with pytest.raises(ExportError, match="no such folder: .*nowhere"):
        export(runs / "dcgan", "torch", tmp_path / "nowhere" / "g.pt2")
