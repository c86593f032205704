"""What `pip install --no-build-isolation .` gives to another project: built from a copy of the tree, used from a folder
that holds nothing of this repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

USE = r"""
import minter_warp  # before torch
import torch

assert minter_warp.build_info()["cuda_architectures"] is None
images, coefficients = torch.rand(4, 3, 16, 16), minter_warp.sample_coefficients(4, 16)

def gradients(function):
    inputs = images.clone().requires_grad_(), coefficients.clone().requires_grad_()
    function(*inputs).square().sum().backward()
    return [tensor.grad for tensor in inputs]

def directly(images, coefficients):
    return torch.ops.minter.warp(images, coefficients, None, None, None, None, None, 128.0, torch.float32)

expected = gradients(minter_warp.projective_warp_reference)
compiled = torch.compile(minter_warp.projective_warp, fullgraph=True, backend="aot_eager")
for function in (minter_warp.projective_warp, directly, compiled):
    for ours, reference in zip(gradients(function), expected, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-3, atol=1e-3 * reference.abs().max().item()), function
torch.library.opcheck(torch.ops.minter.warp, (images.requires_grad_(), coefficients.requires_grad_(), None, None, None,
                                              None, None, 128.0, torch.float32))
print(minter_warp.__file__)
"""

REFERENCE = """
import minter_warp, torch
images, coefficients = torch.rand(4, 3, 16, 16), minter_warp.sample_coefficients(4, 16)
expected = minter_warp.projective_warp_reference(images, coefficients)
assert torch.equal(minter_warp.projective_warp(images, coefficients), expected)
print(minter_warp.build_info(), minter_warp.__file__)
"""

def tree(folder):
    """A copy of what an installation needs. The compiler is this machine's, told not to optimise, to save time."""
    folder.mkdir(exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "minter_warp", folder / "minter_warp", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    compiler = folder / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    return folder


def install(folder, **environment):
    """pip's answer; the packages are then in folder / "installed"."""
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--target", folder / "installed"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *flags, folder]
    environment = {**os.environ, "MINTER_CUDA": "0", "MINTER_SANITIZE": "0", "LD_PRELOAD": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


def use(program, folder, elsewhere):
    return subprocess.run([sys.executable, "-c", program], cwd=elsewhere, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(folder / "installed")})


def test_an_installed_warp_has_gradients_compiles_and_passes_opcheck_elsewhere(tmp_path):
    folder, elsewhere = tree(tmp_path / "tree"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = install(folder, CXX=str(folder / "c++"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name.split("-")[0] for path in (folder / "installed").iterdir()} == {"minter", "minter_warp"}
    used = use(USE, folder, elsewhere)
    assert used.returncode == 0, used.stderr
    assert "Warning" not in used.stderr and used.stdout.startswith(str(folder / "installed"))


def test_without_a_compiler_the_installation_succeeds_and_the_warning_says_why(tmp_path):
    folder = tree(tmp_path)
    done = install(folder, CXX="/bin/false", CC="/bin/false")
    assert done.returncode == 0, done.stdout + done.stderr
    used = use(REFERENCE, folder, tmp_path / "installed")
    assert used.returncode == 0 and used.stdout.startswith(f"None {folder / 'installed'}"), used.stderr
    assert re.search(r"the compiled warp is not built, .*/bin/false", used.stderr), used.stderr


def test_a_library_built_for_another_torch_leaves_the_work_to_the_reference(tmp_path):
    """Such a library asks for symbols that this torch has not."""
    source, package = tmp_path / "other.c", tmp_path / "installed/minter_warp"
    shutil.copytree(ROOT / "minter_warp", package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    source.write_text("int aoti_torch_of_another_version(void);\n"
                      "void *PyInit__C(void) { aoti_torch_of_another_version(); return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", package / "_C.so"], check=True)
    used = use(REFERENCE, tmp_path, tmp_path)
    assert used.returncode == 0 and used.stdout.startswith(f"None {package}"), used.stderr
    assert re.search(r"is not built, .*aoti_torch_of_another_version", used.stderr), used.stderr


@pytest.mark.parametrize("module, stub, sentence", [
    ("setuptools", "__version__ = '65.5.0'", "setuptools 65.5.0 is too old .* `pip install --upgrade setuptools`"),
    ("torch", "raise ImportError('no torch')", "install torch first, .* --no-build-isolation"),
])
def test_what_the_build_lacks_is_said_in_one_sentence(module, stub, sentence, tmp_path):
    (tmp_path / f"{module}.py").write_text(stub)
    done = subprocess.run([sys.executable, ROOT / "setup.py", "--version"], cwd=tmp_path, timeout=100,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and re.fullmatch(f"minter: {sentence}.*\n", done.stderr), done.stderr
