"""Registers, spills and occupancy of the CUDA kernels, from the compiler; needs nvcc, no GPU.

    python benchmarks/resources.py --architecture 9.0 --output results/warp-cuda-resources.json

Occupancy: threads that the registers leave room for on a multiprocessor, as a share of the most it can hold. A kernel
that copies images into shared memory takes that too: 5 KiB for 32 x 32 uint8 pixels, which does not limit it.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import Parser, UserError, file_path, run_command  # noqa: E402
from setup import cuda_version, find_cuda_home  # noqa: E402

REGISTERS = 65536
THREADS_OF_BLOCK = {"small_kernel": 128, "image_kernel": 128, "float64_kernel": 256, "backward_kernel": 256}
MOST_THREADS = {"7.5": 1024, "8.0": 2048, "8.6": 1536, "8.9": 1536, "9.0": 2048, "10.0": 2048, "12.0": 1536}
KERNEL = re.compile(r"(small_kernel|image_kernel|float64_kernel|backward_kernel)(?:<(.*?)>)?\(")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--architecture", default="9.0", choices=MOST_THREADS)
    parser.add_argument("--output", type=file_path, help="JSON file for the figures")
    args = parser.parse_args()
    from torch.utils.cpp_extension import include_paths  # warns where there is no GPU

    home, why = find_cuda_home()
    if home is None:
        raise UserError(why)
    command = [home / "bin" / "nvcc", "-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA",
               *(f"-I{path}" for path in include_paths()), f"-arch=sm_{args.architecture.replace('.', '')}",
               "-Xptxas", "-v", "-c", ROOT / "csrc" / "warp_cuda.cu", "-o", "/dev/null"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    report = subprocess.run(["c++filt"], input=report.replace("'", " "), capture_output=True, text=True).stdout
    rows = []
    for part in report.split("Compiling entry function")[1:]:
        name, arguments = KERNEL.search(part).groups()
        kernel = f"{name}<{arguments}>" if arguments else name
        kernel = kernel.replace("c10::", "").replace("unsigned char", "uint8")
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        stored, loaded = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
        threads, most = THREADS_OF_BLOCK[name], MOST_THREADS[args.architecture]
        blocks = REGISTERS // (-(-registers // 8) * 8 * threads)
        rows.append({"kernel": kernel, "registers": registers, "spill_bytes_stored": stored,
                     "spill_bytes_loaded": loaded, "occupancy": min(blocks * threads, most) / most})
    rows.sort(key=lambda row: row["kernel"])
    for row in rows:
        print("{kernel:55} {registers:4} registers, spilled {spill_bytes_stored:3} bytes, occupancy {occupancy:.2f}"
              .format(**row))
    if args.output:
        result = {"architecture": args.architecture, "nvcc": cuda_version(home), "kernels": rows}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
