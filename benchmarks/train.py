"""Where the time of a training step goes, for each script; and what else training and probing cost.

    python benchmarks/train.py step --output results/train-cpu.json        images/s: full step, ceiling, usual pipeline
    python benchmarks/train.py scale --output results/train-scale.json     images/s against the number of images
    python benchmarks/train.py compile --output results/train-compile.json eager, torch.compile; on a GPU also CUDA
                                                                           graphs, and the cost of --deterministic
    python benchmarks/train.py precision --output results/precision.json   losses in float32 and bfloat16
    python benchmarks/train.py probe --output results/probe-times.json     k-NN, and logistic fits side by side
    python benchmarks/train.py memory --output results/train-memory.json   memory over 2,000 steps

step: (full) the script's own training loop; (ceiling) the same loop with every batch's tensors made beforehand, so that
only model, loss and optimiser are left; (usual) the pipeline of AVT's and VTE's authors as one would write it today:
PIL images in a Dataset, cropped, flipped and warped one by one by the workers of a DataLoader, float32, PyTorch's
default layout, Adam or SGD; for STL torchvision's transforms on PIL images. The three run in turn; the median rate of
an epoch is taken, after one to warm up. On a CPU freed memory is kept in all three, as the scripts keep it; with
MINTER_KEEP_MEMORY=0 in none. What bounds the step is counted: the operations of its convolutions and matrix products,
and the bytes that its operators read and write in eager mode, over what this device was measured to do in a large
matrix product and in a copy.

Images are random; no data set is needed.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from common import (
    Parser,
    UserError,
    choose_device,
    choose_precision,
    keep_freed_memory,
    positive_int,
    provenance,
    run_command,
)
from minter_warp import transformation_target

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


@contextlib.contextmanager
def replaced(module, **values):
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextlib.contextmanager
def silent():
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def train(name, images, args, folder, *flags):
    """Runs a script's training on these images; returns its log. Nothing is left of the run before."""
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    script, *own = SCRIPTS[name]
    module = importlib.import_module(script)
    output = Path(folder) / "run.ckpt"
    for old in (output, output.with_suffix(".jsonl")):
        old.unlink(missing_ok=True)
    command = [f"{script}.py", *own, "--dataset", "random", "--batch-size", args.batch_size, "--device", args.device,
               "--image-size", images.shape[-1], "--lr", "1e-4", "--save-every", 1000, "--output", output, *flags]
    command = [str(Path(folder) / "pt.ckpt") if part == "PT" else str(part) for part in command]
    data = common.Images(images, None, [], images.shape[-1])
    with replaced(sys, argv=command), replaced(common, load_images=lambda *_: data), silent():
        module.train(module.parse_args())
    return [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]


def phase_one(images, args, folder):
    """The checkpoint that phase two builds on."""
    train("predictive_transform", images[: args.batch_size], args, folder, "--epochs", 1)
    (Path(folder) / "run.ckpt").rename(Path(folder) / "pt.ckpt")


# ------------------------------------------------------------------------------------------------------------- step


@contextlib.contextmanager
def batches_made_beforehand(name):
    """In this script whatever makes tensors returns those that it first made for a batch of the same size."""
    module, made = importlib.import_module(SCRIPTS[name][0]), {}

    def once(function, size_of):
        def remembered(*arguments):
            key = function.__name__, *size_of(*arguments)
            if key not in made:
                made[key] = function(*arguments)
            return made[key]
        return remembered

    samplers = [sampler for sampler in ("sample_crops", "sample_coefficients", "sample_transformations",
                                        "sample_flips_and_blurs") if hasattr(module, sampler)]
    new = {sampler: once(getattr(module, sampler), lambda n, *_: (n,)) for sampler in samplers}
    if module.__name__ == "stl":
        new["transform"] = once(module.transform, lambda images, index, *_: (len(index),))
    else:
        new["warp_batch"] = once(module.warp_batch,
                                 lambda images, index, crops, coefficients, *_: (len(index), coefficients is None))
        if hasattr(module, "transformation_target"):
            new["transformation_target"] = once(module.transformation_target, lambda values, _: (len(values),))
    with replaced(module, **new):
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


class UsualWarps(torch.utils.data.Dataset):
    """(image, transformed image, coefficients); transformed_only: without the first."""

    def __init__(self, images, transformed_only=False):
        from torchvision import transforms

        size, self.transformed_only = images.shape[-1], transformed_only
        self.pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.crop = transforms.Compose([transforms.RandomCrop(size, size // 8), transforms.RandomHorizontalFlip()])
        mean, std = common.STATISTICS["cifar10"]
        self.normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        from PIL import Image

        image = self.crop(Image.fromarray(self.pixels[i]))
        coefficients = coefficients_as_usual(image.width)
        warped = image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR,
                                 fillcolor=(128, 128, 128))
        views = [self.normalise(warped)] if self.transformed_only else [self.normalise(image), self.normalise(warped)]
        return *views, torch.tensor(coefficients, dtype=torch.float32)


class UsualViews(UsualWarps):
    def __init__(self, images):
        from torchvision import transforms

        super().__init__(images)
        size = images.shape[-1]
        self.augment = transforms.Compose([
            transforms.RandomResizedCrop(size, (0.2, 1)), transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(max(3, round(0.1 * size) | 1), (0.1, 2.0))], 0.5),
            self.normalise])

    def __getitem__(self, i):
        from PIL import Image

        image = Image.fromarray(self.pixels[i])
        return self.augment(image), self.augment(image)


def model_of(name, size, features=512):
    """(model, its loss from a batch) as the script builds them."""
    script, *flags = SCRIPTS[name]
    if script == "stl":
        import stl

        encoder = common.build_encoder(flags[-1], size, probabilistic=False)
        weights = {"inv": 1.0, "equi": 1.0, "trans": 0.1}
        model = stl.STL(encoder)
        return model, lambda views1, views2: stl.stl_loss(model(views1, views2), weights)[0]
    module, encoder = importlib.import_module(script), common.NIN(size)
    if script == "predictive_transform":
        model = module.PredictiveTransform(encoder)
    elif script == "avt":
        model = module.AVT(encoder)
    elif script == "vte_ba":
        model = module.VTEBarberAgakov(encoder, common.NIN(size))
    else:
        critic = module.ConcatenatedCritic() if "concatenated" in flags else module.SeparatedCritic()
        model = module.VTEInfoNCE(encoder, common.NIN(size), critic)

    def loss_of(*batch):
        images, transformed, coefficients = batch[0], batch[-2], batch[-1]
        t = transformation_target(coefficients, size)
        if script == "predictive_transform":
            prediction, z, logvar = model(transformed)
            return module.predictive_transform_loss(prediction, t, z, logvar)[0]
        if script == "avt":
            prediction, z, logvar = model(images, transformed)
            return module.avt_loss(prediction, t, z, logvar)[0]
        if script == "vte_ba":
            return module.vte_ba_loss(*model(images, transformed, t))[0]
        return module.vte_infonce_loss(*model(images, transformed))[0]

    return model, loss_of


def make_optimizer(name, model, fused=False):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name.startswith("stl"):
        return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=fused)
    return torch.optim.Adam(parameters, lr=1e-4, fused=fused)


def usual_rate(name, images, args):
    """Images/s of an epoch of the usual pipeline; its workers live on from the epoch before."""
    dataset = UsualViews(images) if name.startswith("stl") else UsualWarps(images, name == "predictive_transform")
    workers = args.workers or os.cpu_count()
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, shuffle=True, num_workers=workers, drop_last=True,
                                         pin_memory=args.device == "cuda", persistent_workers=True)
    model, loss_of = model_of(name, images.shape[-1])
    model.to(args.device)
    optimizer = make_optimizer(name, model)
    for _ in range(2):
        start, seen = time.perf_counter(), 0
        for batch in loader:
            loss = loss_of(*(part.to(args.device, non_blocking=True) for part in batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(batch[0])
        loss.item()
        rate = seen / (time.perf_counter() - start)
    return rate


class BytesMoved(TorchDispatchMode):
    """Counts the bytes of the inputs and outputs of every operator that computes, but for the optimiser's writes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if not function.is_view and not any(part in function.__name__ for part in ("empty", "view")):
            tensors = tree_leaves((arguments, options, output))
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors
                              if isinstance(tensor, torch.Tensor))
        return output


def counted(name, size, args, dtype):
    """Floating-point operations and bytes of one image's share of a step."""
    model, loss_of = model_of(name, size)
    model.to(args.device, memory_format=torch.channels_last)
    optimizer, n = make_optimizer(name, model, fused=True), args.batch_size
    images, others = (torch.randn(n, 3, size, size, device=args.device, dtype=dtype) for _ in range(2))
    t = torch.randn(n, 8, device=args.device)
    batch = (images, others) if name.startswith("stl") else (images, others, t)

    def step():
        with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
            loss = loss_of(*batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as operations:
        step()
    with BytesMoved() as moved:
        step()
    return operations.get_total_flops() / n, moved.bytes / n


def capabilities(device, dtype):
    """(operations a second of a large matrix product in dtype, bytes a second of a copy)."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)

    def seconds(run):
        times = []
        for _ in range(8):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    return 2 * side**3 / seconds(lambda: a @ b), 2 * source.nbytes / seconds(lambda: target.copy_(source))


def measure_steps(args):
    dtype = choose_precision("auto", torch.device(args.device))
    operations, bandwidth = capabilities(args.device, dtype)
    device = {"dtype": str(dtype), "operations_per_second": operations, "bytes_per_second": bandwidth}
    print(f"{operations / 1e9:,.0f} GFLOP/s in {dtype}, {bandwidth / 1e9:,.0f} GB/s of copies\n"
          f"{'':26}{'images/s':>10}{'of ceiling':>12}{'x usual':>9}{'ms/step':>9}{'arithmetic':>12}{'bytes':>7}")
    images, rows = random_images(args.steps * args.batch_size, args.image_size), []
    with tempfile.TemporaryDirectory() as folder:
        phase_one(images, args, folder)
        for name in args.scripts or SCRIPTS:
            rates = {"full": [], "ceiling": [], "usual": []}
            for _ in range(args.repeats):
                rates["full"].append(train(name, images, args, folder, "--epochs", 2)[1]["images_per_second"])
                with batches_made_beforehand(name):
                    rates["ceiling"].append(train(name, images, args, folder, "--epochs", 2)[1]["images_per_second"])
                if args.usual:
                    rates["usual"].append(usual_rate(name, images, args))
            rate = {kind: statistics.median(values) for kind, values in rates.items() if values}
            flops, moved = counted(name, args.image_size, args, dtype)
            row = {"script": name, "images_per_second": rate, "rates": rates,
                   "of_ceiling": rate["full"] / rate["ceiling"],
                   "times_usual": rate["full"] / rate["usual"] if args.usual else None,
                   "milliseconds_per_step": 1e3 * args.batch_size / rate["full"], "gflop_per_image": flops / 1e9,
                   "megabytes_per_image": moved / 1e6, "share_of_arithmetic": rate["full"] * flops / operations,
                   "share_of_bandwidth": rate["full"] * moved / bandwidth}
            rows.append(row)
            usual = f"{row['times_usual']:9.2f}" if args.usual else f"{'':9}"
            print(f"{name:26}{rate['full']:10,.0f}{row['of_ceiling']:12.1%}{usual}{row['milliseconds_per_step']:9.1f}"
                  f"{row['share_of_arithmetic']:12.0%}{row['share_of_bandwidth']:7.0%}", flush=True)
            args.keep({**device, "rows": rows})
    return {**device, "rows": rows}


# ------------------------------------------------------------------------------------------------------------ others


def measure_scale(args):
    """The same steps out of ever more images."""
    rows = []
    for n in args.images:
        images = random_images(n, args.image_size)
        with tempfile.TemporaryDirectory() as folder, batches_limited_to(args.steps):
            log = train("predictive_transform", images, args, folder, "--epochs", 2)
        rate = log[1]["images_per_second"]
        rows.append({"images": n, "images_per_second": rate, "microseconds_per_image": 1e6 / rate})
        print(f"{n:10,} images{rate:10,.0f} images/s", flush=True)
        args.keep({"rows": rows})
    return {"rows": rows}


@contextlib.contextmanager
def batches_limited_to(steps):
    """Epochs of so many steps, whatever the number of images."""
    whole = common.Run.batches

    def first(self, *samplers, **options):
        for i, batch in enumerate(whole(self, *samplers, **options)):
            if i == steps:
                return
            if i == 0:  # what is drawn for the whole epoch belongs to all of its steps
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                self._start = time.perf_counter()
            yield batch

    with replaced(common.Run, batches=first):
        yield


def measure_compile(args):
    modes = {"off": [], "inductor": ["--compile", "inductor"]}
    if args.device == "cuda":
        modes |= {"cudagraphs": ["--compile", "cudagraphs"], "deterministic": ["--deterministic"]}
    images, rows = random_images(args.steps * args.batch_size, args.image_size), []
    with tempfile.TemporaryDirectory() as folder:
        phase_one(images, args, folder)
        for name in args.scripts or SCRIPTS:
            logs = {mode: train(name, images, args, folder, "--epochs", 1 + args.repeats, *flags)
                    for mode, flags in modes.items()}
            rate = {mode: statistics.median(row["images_per_second"] for row in log[1:]) for mode, log in logs.items()}
            rows.append({"script": name, "images_per_second": rate, "losses": {m: log[-1]["loss"] for m, log in
                                                                              logs.items()},
                         "first_epoch_seconds": {mode: log[0]["seconds"] for mode, log in logs.items()}})
            print(f"{name:26}" + "".join(f"{mode:>12}{value:8,.0f}" for mode, value in rate.items()), flush=True)
            args.keep({"rows": rows})
    return {"rows": rows}


def measure_precision(args):
    """Phase one on scikit-learn's digits; the loss of the last epoch, some seeds in each precision."""
    digits, rows = common.load_images("digits", "train", image_size=args.image_size).images, []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.repeats):
            for precision in ("fp32", "bf16"):
                log = train("predictive_transform", digits, args, folder, "--epochs", args.epochs, "--seed", seed,
                            "--precision", precision, "--lr", "2e-4")
                rows.append({"precision": precision, "seed": seed, "losses": [row["loss"] for row in log],
                             "images_per_second": statistics.median(row["images_per_second"] for row in log)})
                print(f"{precision} seed {seed}: {rows[-1]['losses'][-1]:.4f} {rows[-1]['images_per_second']:6.0f} "
                      "images/s", flush=True)
    last = {precision: [row["losses"][-1] for row in rows if row["precision"] == precision]
            for precision in ("fp32", "bf16")}
    summary = {p: {"mean": statistics.mean(values), "std": statistics.stdev(values)} for p, values in last.items()}
    print(summary)
    return {"last_epoch": summary, "rows": rows}


def measure_memory(args):
    """Resident memory each hundred steps of a small run."""
    images, held, done = random_images(2000, 8), [], itertools.count(1)
    step = common.Run.step

    def watched(self, *arguments):
        step(self, *arguments)
        if next(done) % 100 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            held.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    args.batch_size = 2
    with tempfile.TemporaryDirectory() as folder, replaced(common.Run, step=watched):
        train("avt", images, args, folder, "--epochs", 3)
    growth = held[-1] - held[4]
    print(f"{len(held) * 100:,} steps: {held[0]:.0f} MiB after 100, {held[4]:.0f} after 500, {held[-1]:.0f} at the end")
    return {"mebibytes_each_100_steps": held, "growth_after_500_steps": growth}


def measure_probe(args):
    """k-NN of 10,000 test on 50,000 training features of 512 dimensions, and four logistic fits on 5,000."""
    import probe

    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50000, 512, generator=generator), torch.randn(10000, 512, generator=generator)
    labels = torch.randint(0, 10, (50000,), generator=generator)
    whole = probe.Representation(None, "random", None, (train, None), (test, None))
    few = probe.Representation(None, "random", None, (train[:5000], None), (test, None))
    device, times, index = torch.device(args.device), {}, torch.arange(50000)
    settings = probe.Settings(1, 0, torch.device("cpu"), torch.float32)

    def timed(name, run):
        start = time.perf_counter()
        result = run()
        times[name] = time.perf_counter() - start
        print(f"{name:45}{times[name]:8.2f} s", flush=True)
        return result

    probe.vote_of_nearest(train[:10].to(device), labels[:10].to(device), test[:10].to(device), 5)  # warm-up
    ours = timed("k-NN, chunks in torch", lambda: probe.vote_of_nearest(
        train.to(device), labels.to(device), test.to(device), 5).cpu().numpy())
    theirs = timed("k-NN, scikit-learn", lambda: probe.knn_predictions(whole, index, labels, settings)[0])
    fits = [probe.logistic_predictions(few, index[:5000], labels[:5000], settings._replace(seed=seed))
            for seed in range(4)]
    warnings.simplefilter("ignore")  # 100 iterations are not enough to converge, as in the paper
    timed("four logistic fits, one after the other", lambda: [fit() for fit in fits])
    timed("four logistic fits, side by side", lambda: list(probe.run_ahead(iter(fits), os.cpu_count())))
    return {"seconds": times, "share_of_equal_predictions": float((ours == theirs).mean())}


KINDS = {"step": measure_steps, "scale": measure_scale, "compile": measure_compile, "precision": measure_precision,
         "memory": measure_memory, "probe": measure_probe}


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("what", choices=KINDS)
    add("--scripts", nargs="+", choices=SCRIPTS, metavar="NAME", help=f"default: all of {', '.join(SCRIPTS)}")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=positive_int, default=256)
    add("--image-size", type=common.image_side, default=32)
    add("--steps", type=positive_int, default=4, help="of an epoch; some hundred on a GPU")
    add("--repeats", type=positive_int, default=3, help="runs of each, or seeds")
    add("--epochs", type=positive_int, default=8, help="precision: of each run")
    add("--images", type=positive_int, nargs="+", default=[10_000, 50_000, 500_000], help="scale: how many")
    add("--workers", type=positive_int, help="of the usual pipeline's DataLoader (default: as many as cores)")
    add("--usual", action=argparse.BooleanOptionalAction, default=True, help="step: also time the usual pipeline")
    add("--output", help="JSON file for the figures")
    args = parser.parse_args()
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise UserError(f"cannot write '{args.output}': there is no such folder", exit_code=2)
    record = {**provenance(choose_device(args.device)), "device": args.device, "cores": os.cpu_count(),
              "memory_kept": keep_freed_memory(),
              "load_average_before": os.getloadavg()[0]}

    def keep(result):
        """After each row, too: what has been measured is there, whatever ends the rest."""
        if args.output:
            Path(args.output).write_text(json.dumps({**record, **result}, indent=1) + "\n")

    args.keep = keep
    keep(KINDS[args.what](args))


if __name__ == "__main__":
    run_command(main)
