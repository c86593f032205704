"""Builds the compiled warp (csrc/) as the module `minter_warp`: CPU always, CUDA where nvcc and a CUDA torch are.

    pip install --no-build-isolation .        (without isolation: the build must see the torch it is for)

Environment: MINTER_CUDA=0 leaves CUDA out; CUDA_HOME names the toolkit; TORCH_CUDA_ARCH_LIST the architectures
(default: that of the GPUs in this machine, or without one every architecture from Turing to Blackwell the compiler
knows); MAX_JOBS the number of compilers at once; MINTER_SANITIZE=1 builds for the CPU only, with AddressSanitizer and
UndefinedBehaviorSanitizer (`make sanitize`).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def find_cuda_home():
    """The CUDA toolkit's folder, or None and why. A folder counts when it holds both nvcc and libcudart: the nvcc on
    the PATH may be a wrapper script that lives elsewhere."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [named] if named else []
    candidates += [Path(on_path).resolve().parent.parent] if on_path else []
    candidates += ["/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"), reverse=True), "/opt/cuda"]
    for home in map(Path, candidates):
        if (home / "bin" / "nvcc").exists() and any(home.glob("lib*/libcudart.so*")):
            return home, None
    return None, "no folder with both bin/nvcc and libcudart found; CUDA_HOME can name one"


def cuda_version(home):
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def choose_cuda():
    """(toolkit folder, None), or (None, why CUDA is left out)."""
    import torch

    if os.environ.get("MINTER_SANITIZE") == "1":
        return None, "MINTER_SANITIZE=1"
    if os.environ.get("MINTER_CUDA") == "0":
        return None, "MINTER_CUDA=0"
    if torch.version.cuda is None:
        return None, "this torch is built without CUDA"
    home, why = find_cuda_home()
    if home is None:
        return None, why
    version = cuda_version(home)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return None, f"nvcc is {version} and torch is built for CUDA {torch.version.cuda}: their major versions differ"
    return home, None


def architectures(home):
    import torch

    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    listed = subprocess.run([home / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {int(number) for number in re.findall(r"compute_(\d+)", listed.stdout)}
    wanted = [number for number in (75, 80, 86, 89, 90, 100, 120) if number in known]
    return ";".join(f"{number // 10}.{number % 10}" for number in wanted) + "+PTX"


def extension():
    import torch

    home, why_not = choose_cuda()
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # before cpp_extension is imported: it looks once, at import
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(home)
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = ["csrc/module.cpp", "csrc/operators.cpp", "csrc/warp_cpu.cpp", "csrc/memory.cpp"]
    # The oldest torch this build runs with, in the stable interface's notation: 2.11, or 2.10 where that is built with
    # (csrc/memory.cpp is of no use then).
    oldest = "0x020a000000000000" if torch.__version__.startswith("2.10.") else "0x020b000000000000"
    compile_args = ["-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION={oldest}"]
    compile_args += [f'-DMINTER_TORCH="{torch.__version__}"']
    # Coordinates are rounded as PIL's are (csrc/warp.h); nobody looks at floating-point exceptions, which lets the
    # compiler turn a condition into a selection, and so vectorise, without any change of the results.
    exact = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
    if home is None:
        print(f"minter: building the warp for the CPU only ({why_not})", file=sys.stderr)
        sanitize = []
        if os.environ.get("MINTER_SANITIZE") == "1":  # a report ends the process
            sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g",
                        "-fno-omit-frame-pointer", "-fno-wrapv"]  # Python asks for -fwrapv, which would hide overflows
        return CppExtension("minter_warp", sources, extra_link_args=sanitize,
                            extra_compile_args={"cxx": compile_args + exact + sanitize})
    listed = os.environ["TORCH_CUDA_ARCH_LIST"]
    print(f"minter: building the warp for the CPU and CUDA {listed} with {home}/bin/nvcc", file=sys.stderr)
    compile_args += ["-DUSE_CUDA", f'-DMINTER_CUDA="{listed}"']
    return CUDAExtension(
        "minter_warp",
        [*sources, "csrc/warp_cuda.cu"],
        extra_compile_args={"cxx": compile_args + exact, "nvcc": [*compile_args, "--threads=2", "-lineinfo"]},
    )


def main():
    from setuptools import setup

    built = extension()
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=[built], cmdclass={"build_ext": BuildExtension}, py_modules=[])


if __name__ == "__main__":
    main()
