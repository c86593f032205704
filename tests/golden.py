"""The losses of the first twenty steps of every script and variation, on scikit-learn's digits:

    python tests/golden.py > tests/golden.json

In float64, so that six digits are the same on every processor; only the warp stays float32, whose bits are the same on
all of them. What is recorded is to change with the science alone.
"""

import contextlib
import io
import json
import os
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FEW = "--dataset digits --limit 80 --batch-size 8 --epochs 2 --save-every 2 --device cpu --precision fp32".split()
SMALL, PT = ["--image-size", "8"], ["--pretrained", "pt.ckpt"]
# Less for AlexNet's 32 pixels. In batches of 4 SimCLR's and the preset's batch normalisation would magnify the last
# bit, which is the processor's own, to the fifth digit.
WIDE, WIDEST = ["--limit", "40", "--batch-size", "4"], ["--limit", "20", "--batch-size", "2"]
ALEX = ["--pretrained", "pt_alexnet.ckpt", *WIDEST]
RUNS = {
    "pt": ["predictive_transform.py", *SMALL],
    "pt_alexnet": ["predictive_transform.py", "--encoder", "alexnet", *WIDEST],
    "pt_fast": ["predictive_transform.py", *SMALL, "--recipe", "fast"],
    "avt": ["avt.py", *SMALL],
    "vte_ba": ["vte_ba.py", *PT],
    "vte_ba_steerable": ["vte_ba.py", *PT, "--steerable"],
    "vte_ba_mean_target": ["vte_ba.py", *PT, "--mean-target"],
    "vte_ba_from_scratch": ["vte_ba.py", *SMALL, "--from-scratch"],
    "separated": ["vte_infonce.py", *PT],
    "separated_from_scratch": ["vte_infonce.py", *SMALL, "--from-scratch"],
    "concatenated": ["vte_infonce.py", *PT, "--critic", "concatenated"],
    "concatenated_alexnet": ["vte_infonce.py", *ALEX, "--critic", "concatenated"],
    "stl": ["stl.py", *SMALL, *WIDE, "--encoder", "nin"],
    "stl_paper_independent": ["stl.py", *SMALL, "--encoder", "nin", "--preset", "paper", "--batch", "independent"],
    "simclr": ["stl.py", *SMALL, "--equi", "0", "--trans", "0"],
    "simclr_augmix": ["stl.py", *SMALL, "--encoder", "nin", "--equi", "0", "--trans", "0", "--augmix"],
}


@contextlib.contextmanager
def changed_to(folder):
    """contextlib.chdir, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def in_float64():
    """Everything that asks for float32 gets float64, but for the warp."""
    import common
    import minter_warp.views

    warp_batch, step, losses = minter_warp.warp_batch, common.Run.step, []

    def warp(images, index, crops=None, coefficients=None, scale=None, shift=None, dtype=None, **options):
        scale, shift = (None if values is None else values.to(torch.float32) for values in (scale, shift))
        return warp_batch(images, index, crops, coefficients, scale, shift, torch.float32, **options).double()

    def recorded(self, loss, *rest):
        losses.append(loss.item())
        return step(self, loss, *rest)

    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    minter_warp.warp_batch = minter_warp.views.warp_batch = warp  # before the scripts take it from there
    common.choose_precision, common.Run.step = lambda *_: torch.float64, recorded
    return losses


def main():
    sys.path.insert(0, str(ROOT))
    import common

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # autocast takes no float64, and says so
    losses, found = in_float64(), {}
    save = common.save_checkpoint
    common.save_checkpoint = lambda path, *rest: save(path, *rest) if path.stem.startswith("pt") else None
    with tempfile.TemporaryDirectory() as folder, changed_to(folder):
        for name, (script, *flags) in RUNS.items():
            losses.clear()
            sys.argv = [script, *FEW, *flags, "--output", f"{name}.ckpt"]
            with contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            found[name] = [float(f"{loss:.6g}") for loss in losses]
    print("{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(values)}" for name, values in found.items()) + "\n}")


if __name__ == "__main__":
    main()
