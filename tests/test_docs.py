"""The documentation: its programs run as they stand there, and the messages it quotes are those the software prints."""

import doctest
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import fastgan
from fastgan import _extension
from fastgan.data import ImageDataset
from fastgan.train import DCGANConfig, Trainer, TrainingError

DOCS = Path(__file__).resolve().parent.parent / "docs"
TESTED_TORCH = "2.13.0+cpu"  # of the messages in the pages


@pytest.mark.parametrize("page", ["../README.md", "index.md", "fuse.md", "migration.md", "trainer.md", "troubleshooting.md"])
def test_programs_of_the_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = Sybil([PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS)]).parse(DOCS / page)
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()


# ---- messages quoted in troubleshooting.md -------------------------------------------------------------------------


def is_quoted(message):
    page = (DOCS / "troubleshooting.md").read_text()
    return message.replace(torch.__version__, TESTED_TORCH) in page


def load_extension_module(monkeypatch, build_config):
    """fastgan._extension anew, as it would find things with this _build_config (None: there is none)."""
    monkeypatch.setitem(sys.modules, "fastgan._build_config", build_config)
    if build_config is None:
        monkeypatch.delattr(fastgan, "_build_config", raising=False)
    else:
        monkeypatch.setattr(fastgan, "_build_config", build_config, raising=False)
    spec = importlib.util.spec_from_file_location("fastgan_extension_anew", _extension.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_quotes_the_import_error_of_another_torch(monkeypatch):
    config = SimpleNamespace(VERSION="0.1.0", TORCH_VERSION="2.10.7+cpu")
    with pytest.raises(ImportError) as error:
        load_extension_module(monkeypatch, config)
    assert is_quoted(f"ImportError: {error.value}")


def test_page_quotes_the_warning_and_the_error_of_the_slow_path(monkeypatch):
    unbuilt = load_extension_module(monkeypatch, None)
    reason = unbuilt.why_no_kernels("cpu")
    with pytest.warns(RuntimeWarning) as warnings:
        unbuilt.leave_fast_path("conv2d_act", reason)
    assert is_quoted(f"RuntimeWarning: {warnings[0].message}")
    monkeypatch.setenv("FASTGAN_STRICT", "1")
    with pytest.raises(RuntimeError) as error:
        unbuilt.leave_fast_path("conv2d_act", reason)
    assert is_quoted(f"RuntimeError: {error.value}")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_page_quotes_the_warning_of_a_build_without_cuda(monkeypatch):
    with pytest.warns(RuntimeWarning) as warnings:
        _extension.leave_fast_path("conv2d_act", _extension.why_no_kernels("cuda") + " (once)")
    assert is_quoted(f"RuntimeWarning: {str(warnings[0].message).partition(';')[0]}; ...")


def test_page_quotes_the_warning_of_a_gpu_without_kernels(setup_script):
    architectures = setup_script.cuda_architectures(setup_script.CUDA_ARCHITECTURES)
    with pytest.warns(RuntimeWarning) as warnings:
        _extension.leave_fast_path("conv2d_act", _extension._why_not_on("Tesla T4", (7, 5), architectures))
    assert is_quoted(f"RuntimeWarning: {warnings[0].message}")


def test_page_quotes_what_setup_py_says(setup_script, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as error:
        setup_script.find_compiler()
    assert is_quoted(str(error.value))
    cuda_torch = ("2.11.0+cu130", "13.0")
    for arguments in (
        ("2.13.0+cpu", None, None, None, ("8.0",)),
        (*cuda_torch, None, None, ("8.0",)),
        (*cuda_torch, Path("/opt/cuda-12"), "12.4", ("8.0",)),
    ):
        with pytest.raises(SystemExit) as error:
            setup_script.decide_cuda("1", *arguments)
        assert is_quoted(str(error.value))


def test_page_quotes_the_end_of_a_run_that_diverges(tmp_path):
    images = torch.randint(0, 256, (64, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    output = tmp_path / "run"
    config = DCGANConfig(output=str(output), learning_rate=1e25, base_channels=8, device="cpu")
    with pytest.raises(TrainingError) as error:
        Trainer(config, ImageDataset("test", images, None)).train()
    assert is_quoted(f"error: {error.value}".replace(str(output), "runs/dcgan"))
