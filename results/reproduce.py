"""Makes the papers' studies again: every training, every evaluation, several seeds.

    python results/reproduce.py vte                          # VTE's Tables 1-3: CIFAR-10, the paper's settings
    python results/reproduce.py vte --dataset stl10          # its Table 4
    python results/reproduce.py stl                          # STL and its SimCLR base on STL-10
    python results/reproduce.py vte --scale small            # two CPU cores, about an hour

A study is made of parts: a training, or an evaluation of what one left. Each runs as the command that a user would
type, kept with its result. Stopped in whatever way, the same command goes on: finished parts are not made again, and a
training goes on where it last saved. All of a study is in its folder under --runs; to go on elsewhere, copy that folder
(of what is unfinished the checkpoints are needed, of the rest results.json alone).

In the end, and whenever it is stopped, results/<study>.json and the tables of RESULTS.md and README.md are written
(results/tables.py), unless they hold more than is at hand.
"""

import fcntl
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from tables import METHODS, STUDIES, read_results, write_pages, write_results
from warp import processor

from common import (
    IMAGE_SUFFIXES,
    Parser,
    UserError,
    choose_device,
    file_path,
    load_checkpoint,
    positive,
    run_command,
    save_atomically,
    seed,
)

ROOT = Path(__file__).resolve().parent.parent
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NOT_FINISHED = 75  # exit code where --minutes ended it: EX_TEMPFAIL of sysexits.h, try again
AT_ONCE_ON_A_GPU = 6  # one of these models leaves most of a large GPU idle
PUBLISHED_STUDIES = {"vte": ("cifar10", "stl10"), "stl": ("stl10", "cifar10")}

# How much is done. predictors: the trainings that predict t; phase_two: those that follow one. full says nothing: the
# scripts' defaults are the papers' values.
SCALES = {
    "full": {"predictors": [], "phase_two": [], "stl": [], "save_every": 20, "seeds": [0, 1, 2], "labels": [],
             "equivariance": [], "stl_labels": []},
    "small": {
        "predictors": ["--limit", "10000", "--epochs", "14", "--batch-size", "64", "--lr", "5e-4"],
        "phase_two": ["--limit", "10000", "--epochs", "8", "--batch-size", "128", "--lr", "5e-4"],
        "stl": ["--limit", "5000", "--epochs", "6", "--batch-size", "128"],
        "save_every": 1, "seeds": [0, 1], "labels": ["--train-sizes", "5000", "500"], "equivariance": [],
        "stl_labels": ["--train-sizes", "5000", "500"],
    },
    "tiny": {
        "predictors": ["--limit", "128", "--epochs", "2", "--batch-size", "64"],
        "phase_two": ["--limit", "128", "--epochs", "1", "--batch-size", "64"],
        "stl": ["--encoder", "nin", "--limit", "64", "--epochs", "1", "--batch-size", "32"],
        "save_every": 1, "seeds": [0, 1], "labels": ["--train-sizes", "100", "20"],
        "equivariance": ["--images", "20", "--per-image", "12", "--pairs", "50"],
        "stl_labels": ["--train-sizes", "100", "20"],
    },
}


@dataclass
class Part:
    """One command. settings: what its result depends on; where: folders, device, and what else may change between
    machines. needs: names of the parts before it. output: the file it writes."""

    name: str
    settings: list
    where: list
    needs: list
    output: Path

    @property
    def trains(self):
        return self.output.suffix == ".ckpt"

    @property
    def command(self):
        return [self.settings[0], *self.where, *self.settings[1:]]


def title_of(dataset):
    """What the tables call the data."""
    if dataset in ("cifar10", "stl10", "digits"):
        return {"cifar10": "CIFAR-10", "stl10": "STL-10", "digits": "scikit-learn's digits"}[dataset]
    folder = Path(dataset) / "train"
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if classes != CIFAR10_CLASSES:
        raise UserError(f"'{dataset}' is no copy of CIFAR-10: {folder} is to have the folders "
                        f"{', '.join(CIFAR10_CLASSES)}")
    suffixes = {path.suffix.lower() for name in classes for path in (folder / name).iterdir()} & IMAGE_SUFFIXES
    return "CIFAR-10, JPEG copy" if suffixes <= {".jpg", ".jpeg"} else "CIFAR-10, copied to files"


def parts_of(args, scale, folder):
    """All parts of a study in the order in which they are preferred: seed after seed."""
    parts, where = [], ["--dataset", args.dataset, "--data-dir", args.data_dir, "--device", args.device]
    label_flags = scale["stl_labels" if args.family == "stl" else "labels"]
    if args.dataset == "stl10" and not label_flags:
        label_flags = ["--train-sizes", "5000"]
    if args.family == "stl":
        label_flags = ["--classifiers", "knn", "linear", *label_flags]

    def evaluate(name, checkpoint, rows, number):
        for kind, flags in (("labels", label_flags), ("equivariance", ["--equivariance", *scale["equivariance"]])):
            output = checkpoint.parent / f"{name}-{kind}.json"
            settings = ["probe.py", *flags, "--rows", rows, "--seed", str(number)]
            parts.append(Part(f"{number}/{name} {kind}", settings, [str(checkpoint), *where, "--json", str(output)],
                              [f"{number}/{checkpoint.stem}"], output))

    for number in args.seeds:
        checkpoints = folder / f"seed{number}"
        first = None
        for name, (_, script, flags, before) in args.methods.items():
            checkpoint = checkpoints / f"{name}.ckpt"
            of_scale = scale["stl" if args.family == "stl" else "phase_two" if before else "predictors"]
            paths = ["--output", str(checkpoint), "--resume", "--save-every", str(scale["save_every"])]
            paths += ["--pretrained", str(checkpoints / f"{before}.ckpt")] if before else []
            parts.append(Part(f"{number}/{name}", [script, *flags, *of_scale, "--seed", str(number)], [*where, *paths],
                              [f"{number}/{before}"] if before else [], checkpoint))
            first = first or checkpoint
        for name in args.methods:
            evaluate(name, checkpoints / f"{name}.ckpt", "checkpoints", number)
        evaluate("baselines", first, "baselines", number)
    return parts


def machine():
    """What a result was made with."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
                                check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"processor": processor(), "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(), "commit": commit,
            **{name: version(name) for name in ("torch", "torchvision", "scikit-learn", "numpy")}}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def settle(parts, results):
    """Removes results that cannot be gone on from: those of other settings end the program; where a checkpoint is lost
    that unfinished parts need, it and all that followed from it is to be made again. Returns what was removed."""
    by_name, removed = {part.name: part for part in parts}, []
    for name, record in results["parts"].items():
        if name in by_name and record["settings"] != by_name[name].settings:
            raise UserError(f"part {name} was made with `{shlex.join(record['settings'])}` and is now to be made with "
                            f"`{shlex.join(by_name[name].settings)}`: give another --runs, or the settings of before")
    for part in parts:
        record = results["parts"].get(part.name)
        if record is None:
            continue
        wanted = part.trains and any(part.name in other.needs and other.name not in results["parts"] for other in parts)
        lost = wanted and digest(part.output) != record["checkpoint"]
        if lost or any(name not in results["parts"] for name in part.needs):
            removed.append(part.name)
            del results["parts"][part.name]
    return removed


def finish(part, seconds):
    """The record of a part whose command has ended well."""
    record = {"settings": part.settings, "command": shlex.join(["python", *part.command]), "seconds": round(seconds, 1)}
    if part.trains:  # what is needed from here on; the optimiser's state is twice the model
        checkpoint = load_checkpoint(part.output)
        save_atomically({name: value for name, value in checkpoint.items() if name != "optimizer"}, part.output)
        rows = [json.loads(line) for line in part.output.with_suffix(".jsonl").read_text().splitlines()]
        seconds = sum(row["seconds"] for row in rows)  # of all its attempts
        names = rows[0].keys() - {"epoch", "seconds", "constant_predictor", "rotation_only", "ceiling"}
        return {**record, "seconds": round(seconds, 1), "checkpoint": digest(part.output), "epochs": rows[-1]["epoch"],
                "images": checkpoint["config"]["images"],
                "log": {name: [float(f"{row[name]:.5g}") for row in rows] for name in sorted(names)}}
    constant = ("checkpoint", "dataset", "seed", "mean_per_class", "ranks", "test_images", "per_image", "pairs")
    rows = json.loads(part.output.read_text())
    return {**record, "rows": [{name: round(value, 5) if isinstance(value, float) else value
                                for name, value in row.items() if name not in constant} for row in rows]}


class Study:
    """Runs parts, several at once, each in a process of its own."""

    def __init__(self, args, parts, results, path, lock):
        self.parts, self.results, self.path, self.lock = parts, results, path, lock
        self.jobs, self.deadline = args.jobs, time.monotonic() + 60 * args.minutes if args.minutes else None
        self.running, self.failed, self.stopped = {}, {}, None  # {process: (part, start)}, {name: why}
        self.start, self.before = time.monotonic(), sum(session["seconds"] for session in results["sessions"])
        results["sessions"].append({"machine": machine(), "jobs": args.jobs, "seconds": 0.0})

    def say(self, text):
        done = sum(part.name in self.results["parts"] for part in self.parts)
        minutes = (self.before + time.monotonic() - self.start) / 60
        print(f"[{done}/{len(self.parts)}, {minutes:5.1f} min]  {text}", flush=True)

    def ready(self):
        """The parts that can be begun, the preferred first."""
        taken = {*self.results["parts"], *self.failed, *(part.name for part, _ in self.running.values())}
        return [part for part in self.parts if part.name not in taken
                and all(name in self.results["parts"] for name in part.needs)]

    def begin(self, part):
        part.output.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.jobs))
        with open(part.output.with_suffix(".out" if part.trains else ".log"), "a") as said:
            process = subprocess.Popen([sys.executable, *part.command], cwd=ROOT, stdout=said, stderr=said,
                                       start_new_session=True, pass_fds=(self.lock.fileno(),),  # while it lives, locked
                                       env={"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"})
        self.running[process] = part, time.monotonic()
        self.say(f"begun: {part.name}")

    def end(self, process):
        part, start = self.running.pop(process)
        if process.returncode == 0:
            record = finish(part, time.monotonic() - start)
            self.results["parts"][part.name] = {**record, "session": len(self.results["sessions"]) - 1}
            self.save()
            self.say(f"done:  {part.name}, {record['seconds']:.0f} s")
        elif self.stopped is None:
            said = part.output.with_suffix(".out" if part.trains else ".log")
            self.failed[part.name] = (said.read_text().strip().splitlines() or ["it said nothing"])[-1]
            self.say(f"FAILED: {part.name} (exit code {process.returncode}): {self.failed[part.name]}\n"
                     f"  more in {said}; the command: {shlex.join(['python', *part.command])}")

    def save(self):
        self.results["sessions"][-1]["seconds"] = round(time.monotonic() - self.start, 1)
        write_results(self.results, self.path)

    def run(self):
        def stop(number, frame):
            self.stopped = self.stopped or number

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.stopped is None:
                waiting = self.ready()
                while waiting and len(self.running) < self.jobs:
                    self.begin(waiting.pop(0))
                if not self.running:
                    break
                time.sleep(0.05)
                for process in [process for process in self.running if process.poll() is not None]:
                    self.end(process)
                if self.deadline and time.monotonic() > self.deadline:
                    self.stopped = "time"
            for process in self.running:  # trainings save where they are
                process.terminate()
            for process in list(self.running):
                process.wait()
                self.end(process)
        finally:
            for process in self.running:
                process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
            self.save()


def parse_args():
    parser = Parser(description="Make the papers' studies again, part by part; the same command goes on after a stop.",
                    epilog="example:\n  python results/reproduce.py vte --scale tiny --dataset digits")
    add = parser.add_argument
    add("family", choices=list(METHODS), help="vte: AVT, predictive transformation and VTE; stl: STL and SimCLR")
    add("--scale", choices=list(SCALES), default="full",
        help="full: the papers'; small: two CPU cores, about an hour; tiny: to see it work, minutes")
    add("--dataset", type=file_path, help="cifar10, stl10, digits (with --scale tiny), or a folder that holds CIFAR-10 "
        "as files (default: cifar10; for stl, stl10)")
    add("--data-dir", type=file_path, default="data", help="where data is downloaded to (default: %(default)s)")
    add("--methods", nargs="+", choices=[name for methods in METHODS.values() for name in methods],
        help="some only, and what they build on; the first six are of vte (default: all)")
    add("--seeds", nargs="+", type=seed, metavar="N", help="training seeds (default: 0 1 2, of small and tiny 0 1)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    add("--jobs", type=positive(int), help=f"parts at once (default: {AT_ONCE_ON_A_GPU} on a GPU, 1 on a CPU)")
    add("--minutes", type=positive(float),
        help=f"stop after so long, saved, with exit code {NOT_FINISHED}; the same command goes on")
    add("--runs", type=file_path, default="runs/reproduce", help="checkpoints, logs, results (default: %(default)s)")
    add("--pages", type=file_path, default=str(ROOT), metavar="DIR",
        help="where results/, RESULTS.md and README.md are to be brought up to date (default: here)")
    args = parser.parse_args()
    known = METHODS[args.family]
    unknown = [name for name in args.methods or [] if name not in known]
    if unknown:
        parser.error(f"--methods {unknown[0]} is none of {args.family}, which has {', '.join(known)}")
    chosen = {*(args.methods or known)} | {known[name][3] for name in args.methods or []}  # and what they build on
    args.methods = {name: method for name, method in known.items() if name in chosen}
    if args.dataset is None:
        args.dataset = PUBLISHED_STUDIES[args.family][0] if args.scale == "full" else "cifar10"
    if args.dataset == "digits" and args.scale != "tiny":
        parser.error("--dataset digits is for --scale tiny, to see it work: no paper has numbers on it")
    return args


def locked(folder):
    """A file that is held while this process or one that it started lives, so that no two write to one folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")
    except OSError as error:
        raise UserError(f"cannot write to '{folder}' ({error.strerror}): give another --runs") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UserError(f"this study, or a part of it, is running already in '{folder}': wait for it, or stop it, or "
                        "give another --runs") from error
    return lock


def main():
    args = parse_args()
    title, scale = title_of(args.dataset), SCALES[args.scale]
    kind = args.dataset if args.dataset in ("stl10", "digits") else "cifar10"
    name = ("stl-" if args.family == "stl" else "") + kind + ("" if args.scale == "full" else f"-{args.scale}")
    args.seeds = list(dict.fromkeys(args.seeds or scale["seeds"]))
    device = choose_device(args.device)
    args.jobs = args.jobs or (AT_ONCE_ON_A_GPU if device.type == "cuda" else 1)
    folder = Path(args.runs) / name
    with locked(folder) as lock:
        path = folder / "results.json"
        results = {"study": name, "title": title, "scale": args.scale, "sessions": [], "parts": {}}
        if path.exists():
            results = read_results(path)
            if results["title"] != title:
                raise UserError(f"'{path}' holds a study on {results['title']}, not on {title}: give another --runs")
        if name in STUDIES:
            write_pages(Path(args.pages))  # before hours of work, not after: they can be written
        parts = parts_of(args, scale, folder)
        removed = settle(parts, results)
        if removed:
            print(f"to be made again, as their checkpoint is not there any more: {', '.join(removed)}")
        if args.scale == "full" and device.type == "cpu":
            print("there is no GPU: this will take weeks; --scale small is made for a CPU", file=sys.stderr)
        study = Study(args, parts, results, path, lock)
        study.say(f"{name}: {title}, {len(args.seeds)} seeds, {args.jobs} at once, in {folder}")
        study.run()
        if name in STUDIES:
            write_pages(Path(args.pages), results)
    left = [part.name for part in parts if part.name not in results["parts"]]
    if study.failed:
        raise UserError(f"{len(left)} of {len(parts)} parts are missing, {len(study.failed)} of them failed (see "
                        "above); the same command tries them again")
    if left:
        print(f"stopped with {len(left)} of {len(parts)} parts left; the same command goes on")
        sys.exit(NOT_FINISHED if study.stopped == "time" else 128 + study.stopped)


if __name__ == "__main__":
    run_command(main)
