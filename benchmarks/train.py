"""How fast each script trains, beside what its model alone could do and beside the usual data pipeline.

    python benchmarks/train.py --output results/train-cpu.json

Measured are (full) the script's own training loop; (ceiling) the same with every batch's tensors made beforehand, so
that only model, loss and optimiser are left; (usual) the same with the data pipeline of AVT's and VTE's authors as one
would write it today: PIL images in a Dataset, cropped, flipped and warped one by one by the workers of a DataLoader,
float32, PyTorch's default layout; for STL torchvision's transforms on PIL images. Each runs in a process of its own, in
turn; the rate is that of an epoch, after one to warm up, and the memory the process's largest, without the workers'.

On a CPU freed memory is kept, as the scripts keep it, unless MINTER_KEEP_MEMORY=0. Images are random.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from common import Parser, UserError, choose_device, choose_precision, positive_int, provenance, run_command

SCRIPTS = {
    "predictive_transform": ["predictive_transform"],
    "avt": ["avt"],
    "vte_ba": ["vte_ba", "--pretrained", "PT"],
    "vte_infonce separated": ["vte_infonce", "--pretrained", "PT"],
    "vte_infonce concatenated": ["vte_infonce", "--critic", "concatenated", "--pretrained", "PT"],
    "stl nin": ["stl", "--encoder", "nin"],
    "stl resnet18": ["stl", "--encoder", "resnet18"],
}


def random_images(n, size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def train(name, n, args, folder, *flags):
    """Runs a script's training on n random images; returns its log. Nothing is left of the run before."""
    script, *own = SCRIPTS[name]
    module, output = importlib.import_module(script), Path(folder) / "run.ckpt"
    for old in (output, output.with_suffix(".jsonl")):
        old.unlink(missing_ok=True)
    command = [f"{script}.py", *own, "--dataset", "random", "--batch-size", args.batch_size, "--device", args.device,
               "--image-size", args.image_size, "--lr", "1e-4", "--save-every", 1000, "--output", output, *flags]
    command = [str(Path(folder) / "pt.ckpt") if part == "PT" else str(part) for part in command]
    data = common.Images(random_images(n, args.image_size), None, [], args.image_size)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), \
            patch.multiple(sys, argv=command), patch.multiple(common, load_images=lambda *_: data), \
            patch.object(module, "reference_errors", dict, create=True):
        module.train(module.parse_args())
    return [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]


def in_a_process(function, *arguments):
    """function(*arguments), in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])  # what takes seconds to import
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def phase_one(args, folder):
    """The checkpoint that phase two builds on."""
    train("predictive_transform", args.batch_size, args, folder, "--epochs", 1)
    (Path(folder) / "run.ckpt").rename(Path(folder) / "pt.ckpt")


@contextlib.contextmanager
def batches_made_beforehand(name, args):
    """Whatever makes a batch's tensors in this script returns those that it made for the first batch."""
    module, whole, batches, made, calls = importlib.import_module(SCRIPTS[name][0]), common.Run.batches, [], {}, []

    def same_batches(run, *samplers, **options):
        batches.extend([] if batches else whole(run, *samplers, **options))
        for batch in batches:
            calls.clear()
            yield batch

    def once(function):
        def remembered(*arguments):
            calls.append(function)
            if len(calls) not in made:
                made[len(calls)] = function(*arguments)
            return made[len(calls)]
        return remembered

    makers = [maker for maker in ("warp_batch", "transform", "transformation_target") if hasattr(module, maker)]
    with patch.multiple(common.Run, batches=same_batches), \
            patch.multiple(module, **{maker: once(getattr(module, maker)) for maker in makers}):
        yield


def coefficients_as_usual(size):
    """AVT's transformation, drawn and solved by NumPy for one image."""
    scale, turns = np.random.uniform(0.8, 1.2), np.random.randint(4)
    corners = np.array([[0, 0], [size, 0], [size, size], [0, size]], float)
    moved = np.roll((corners - size / 2) * scale + size / 2, -turns, axis=0) + np.random.randint(-4, 5, (4, 2))
    rows = []
    for (x, y), (u, v) in zip(moved, corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    return np.linalg.solve(np.array(rows), corners.reshape(8))


class Usual(torch.utils.data.Dataset):
    """([views], coefficients) of an image: the image and the same transformed, without the first for phase one; for STL
    two augmented views, and the coefficients are none."""

    def __init__(self, script, images):
        from torchvision import transforms

        size, self.script = images.shape[-1], script
        self.pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        flip = transforms.RandomHorizontalFlip()
        self.crop = transforms.Compose([transforms.RandomCrop(size, size // 8), flip])
        self.normalise = transforms.Compose([transforms.ToTensor(),
                                             transforms.Normalize(*common.STATISTICS["cifar10"])])
        self.augment = transforms.Compose([
            transforms.RandomResizedCrop(size, (0.2, 1)), flip,
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(max(3, round(0.1 * size) | 1), (0.1, 2.0))], 0.5),
            self.normalise])

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        from PIL import Image

        image = Image.fromarray(self.pixels[i])
        if self.script == "stl":
            return [self.augment(image), self.augment(image)], torch.zeros(0)
        image, coefficients = self.crop(image), coefficients_as_usual(image.width)
        warped = image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR,
                                 fillcolor=(128, 128, 128))
        images = [warped] if self.script == "predictive_transform" else [image, warped]
        return [self.normalise(image) for image in images], torch.tensor(coefficients, dtype=torch.float32)


@contextlib.contextmanager
def usual_pipeline(name, args):
    """In this script the batches come from a DataLoader, whose workers live on from epoch to epoch."""
    script = SCRIPTS[name][0]
    dataset = Usual(script, random_images(args.steps * args.batch_size, args.image_size))
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, shuffle=True, persistent_workers=True,
                                         num_workers=args.workers or os.cpu_count(), pin_memory=args.device == "cuda")

    def batches(run, *_, **__):
        for views, coefficients in loader:
            views = [view.to(run.device, non_blocking=True) for view in views]
            drawn = views if script == "stl" else [views, coefficients.to(run.device)]
            yield run.images, torch.arange(len(coefficients)), *drawn

    if script == "stl":
        made = {"transform": lambda images, index, view, *_: view}
    else:
        made = {"warp_batch": lambda images, index, views, coefficients, *_: views[0 if coefficients is None else -1]}
    with patch.multiple(common.Run, batches=batches, prepare=lambda run, model: model.to(run.device)), \
            patch.multiple(importlib.import_module(script), **made):
        yield


WAYS = {"full": lambda name, args: contextlib.nullcontext(), "ceiling": batches_made_beforehand,
        "usual": usual_pipeline}


def one_training(way, name, args, folder):
    """(images/s, MiB of memory at most)."""
    precision = ("--precision", "fp32") if way == "usual" else ()
    with WAYS[way](name, args):
        log = train(name, args.steps * args.batch_size, args, folder, "--epochs", 2, *precision)
    return log[1]["images_per_second"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_steps(args, keep):
    result = {"dtype": str(choose_precision("auto", torch.device(args.device))), "rows": []}
    print(f"{result['dtype']}\n{'':26}{'images/s':>10}{'of ceiling':>12}{'x usual':>9}{'MiB':>7}")
    with tempfile.TemporaryDirectory() as folder:
        if any("PT" in SCRIPTS[name] for name in args.scripts):
            in_a_process(phase_one, args, folder)
        for name in args.scripts:
            ways = list(WAYS) if args.usual else ["full", "ceiling"]
            runs = [{way: in_a_process(one_training, way, name, args, folder) for way in ways}
                    for _ in range(args.repeats)]
            rate = {way: statistics.median(run[way][0] for run in runs) for way in ways}
            row = {"script": name, "images_per_second": rate,
                   "rates": {way: [run[way][0] for run in runs] for way in ways},
                   "mebibytes": {way: max(run[way][1] for run in runs) for way in ways},
                   "of_ceiling": rate["full"] / rate["ceiling"],
                   "times_usual": rate["full"] / rate["usual"] if args.usual else None}
            result["rows"].append(row)
            keep(result)
            usual = f"{row['times_usual']:9.2f}" if args.usual else f"{'':9}"
            print(f"{name:26}{rate['full']:10,.0f}{row['of_ceiling']:12.1%}{usual}{row['mebibytes']['full']:7,.0f}",
                  flush=True)


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), metavar="NAME", help=", ".join(SCRIPTS))
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=positive_int, default=256)
    add("--image-size", type=common.image_side, default=32)
    add("--steps", type=positive_int, default=4, help="of an epoch; some hundred on a GPU")
    add("--repeats", type=positive_int, default=3, help="runs of each")
    add("--workers", type=positive_int, help="of the usual pipeline's DataLoader (default: as many as cores)")
    add("--usual", action=argparse.BooleanOptionalAction, default=True, help="also time the usual pipeline")
    add("--output", help="JSON file for the figures")
    args = parser.parse_args()
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise UserError(f"cannot write '{args.output}': there is no such folder", exit_code=2)
    record = {**provenance(choose_device(args.device)), "device": args.device, "cores": os.cpu_count(),
              "memory_kept": common.keep_freed_memory(), "load_average_before": os.getloadavg()[0]}

    def keep(result):
        """After each row: what has been measured is there, whatever ends the rest."""
        if args.output:
            Path(args.output).write_text(json.dumps({**record, **result}, indent=1) + "\n")

    measure_steps(args, keep)


if __name__ == "__main__":
    run_command(main)
