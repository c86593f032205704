"""Builds the compiled warp (csrc/) as `minter_warp._C`: for the CPU always, for CUDA where nvcc and a CUDA torch are.

    pip install --no-build-isolation .        (without isolation: the build must see the torch it is for)

Where it does not compile, the installation succeeds without it, and the PyTorch reference does the work.
Environment: MINTER_CUDA=0 leaves CUDA out; CUDA_HOME names the toolkit; TORCH_CUDA_ARCH_LIST the architectures
(default: that of the GPUs in this machine, or without one every architecture from Turing to Blackwell the compiler
knows); MAX_JOBS the number of compilers at once; MINTER_SANITIZE=1 builds for the CPU only, with AddressSanitizer and
UndefinedBehaviorSanitizer (`make sanitize`), and fails where that does not compile.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # which cannot read pyproject.toml's licence, and says so at length
    sys.exit(f"minter: setuptools {setuptools.__version__} is too old to build this; run "
             "`pip install --upgrade setuptools` (77 or newer) first")
NAME_ONLY = sys.argv[-1] == "egg_info" or "dist_info" in sys.argv  # what pip asks first: spare it torch's seconds
try:
    if not NAME_ONLY:
        import torch
    elif importlib.util.find_spec("torch") is None:  # before pip fetches all that minter needs
        raise ImportError("No module named 'torch'")
except ImportError as error:
    sys.exit(f"minter: install torch first, and give pip --no-build-isolation; the warp is built for it ({error})")

SANITIZE = os.environ.get("MINTER_SANITIZE") == "1"


def nvcc(home, flag):
    return subprocess.run([home / "bin" / "nvcc", flag], capture_output=True, text=True).stdout


def choose_cuda():
    """(the CUDA toolkit's folder, None), or (None, why CUDA is left out). A folder counts when it holds both nvcc and
    libcudart: the nvcc on the PATH may be a wrapper script that lives elsewhere."""
    if SANITIZE or os.environ.get("MINTER_CUDA") == "0":
        return None, "MINTER_SANITIZE=1" if SANITIZE else "MINTER_CUDA=0"
    if torch.version.cuda is None:
        return None, "this torch is built without CUDA"
    named, on_path = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc")
    candidates = [named] if named else []
    candidates += [Path(on_path).resolve().parent.parent] if on_path else []
    candidates += ["/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"), reverse=True), "/opt/cuda"]
    for home in map(Path, candidates):
        if (home / "bin" / "nvcc").exists() and any(home.glob("lib*/libcudart.so*")):
            version = re.search(r"release (\d+)\.\d+", nvcc(home, "--version"))
            if version and version[1] == torch.version.cuda.split(".")[0]:
                return home, None
            return None, f"{home} has CUDA {version[1] if version else '?'}, torch is built for {torch.version.cuda}"
    return None, "no folder with both bin/nvcc and libcudart found; CUDA_HOME can name one"


def architectures(home):
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    known = re.findall(r"compute_(\d+)", nvcc(home, "--list-gpu-arch"))
    wanted = [number for number in ("75", "80", "86", "89", "90", "100", "120") if number in known]
    return ";".join(f"{number[:-1]}.{number[-1]}" for number in wanted) + "+PTX"


def compiled_warp():
    """What setuptools builds it with."""
    sources = ["csrc/module.cpp", "csrc/operators.cpp", "csrc/warp_cpu.cpp"]
    # TORCH_TARGET_VERSION: the oldest torch this build runs with, 2.10, in the stable interface's notation.
    flags = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", f'-DMINTER_TORCH="{torch.__version__}"']
    home, why_not = choose_cuda()
    if home is None:
        print(f"minter: building the warp for the CPU only ({why_not})", file=sys.stderr)
    else:
        os.environ["CUDA_HOME"] = str(home)  # before cpp_extension is imported: it looks once, at import
        listed = os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures(home)
        flags += ["-DUSE_CUDA", f'-DMINTER_CUDA="{listed}"']
        sources += ["csrc/warp_cuda.cu"]
        print(f"minter: building the warp for the CPU and CUDA {listed} with {home}/bin/nvcc", file=sys.stderr)
    # Coordinates are rounded as PIL's are (csrc/warp.h). Nobody looks at floating-point exceptions: the compiler may
    # turn a condition into a selection, and so vectorise, without any change of the results.
    exact = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
    sanitizers = []
    if SANITIZE:  # a report ends the process; Python asks for -fwrapv, which would hide overflows
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g",
                      "-fno-omit-frame-pointer", "-fno-wrapv"]

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def run(self):
            """Where the library cannot be built, puts a module in its place whose import says why."""
            folder = Path("minter_warp" if self.inplace else f"{self.build_lib}/minter_warp")
            self.build_temp = "build/sanitize" if SANITIZE else "build/objects"  # kept: only what changed is compiled
            try:
                super().run()
            except Exception as error:
                if SANITIZE:
                    raise
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                why += "; `pip install -v` shows the compiler's words"
                print(f"minter: the compiled warp is NOT built, PyTorch's reference does its work: {why}",
                      file=sys.stderr)
                for stale in folder.glob("_C.*"):
                    stale.unlink()
                (folder / "_C.py").write_text(f"raise ImportError({why!r})\n")

    extension = (CppExtension if home is None else CUDAExtension)(
        "minter_warp._C", sources, extra_link_args=sanitizers,
        extra_compile_args={"cxx": [*flags, *exact, *sanitizers], "nvcc": [*flags, "--threads=2", "-lineinfo"]})
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setuptools.setup(**({} if NAME_ONLY else compiled_warp()))
