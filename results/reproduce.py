"""Makes the papers' studies again: every training, every evaluation, several seeds.

    python results/reproduce.py vte                          # VTE's Tables 1-3: CIFAR-10, the paper's settings
    python results/reproduce.py vte --dataset stl10          # its Table 4
    python results/reproduce.py stl                          # STL and its SimCLR base on STL-10
    python results/reproduce.py vte --scale small            # two CPU cores, some 85 minutes

A study is made of parts: a training, or an evaluation of what one left. Each runs as the command that a user would
type, kept with its result. Stopped in whatever way, the same command goes on: finished parts are not made again, and a
training goes on where it last saved. All of a study is in its folder under --runs. To go on elsewhere, copy of that
folder results.json and, for what it lacks, the checkpoints to build on, with their logs; or give --finished what was
written to results/.

In the end, and whenever it is stopped, results/<study>.json and the tables of RESULTS.md and README.md are written
(results/tables.py), unless they hold what is not at hand.
"""

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
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
    load_images,
    positive,
    run_command,
    save_atomically,
    seed,
    visible,
)

ROOT = Path(__file__).resolve().parent.parent
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NOT_FINISHED = 75  # exit code where --minutes ended it: EX_TEMPFAIL of sysexits.h, try again
AT_ONCE_ON_A_GPU = {"vte": 6, "stl": 2}  # one of VTE's small models leaves most of a large GPU idle
PATIENCE = 60  # seconds that a training has to save itself when it is told to end

# How much is done. predictors: the trainings that predict t; phase_two: those that follow one. full says nothing: the
# scripts' defaults are the papers' values.
SCALES = {
    "full": {"predictors": [], "phase_two": [], "stl": [], "save_every": 20, "seeds": [0, 1, 2], "labels": [],
             "equivariance": [], "each_classifier_alone": True,  # SAG takes minutes
             "transformations": ["crop+colour", "crop", "colour", "projective"]},
    "small": {
        "predictors": ["--limit", "10000", "--epochs", "14", "--batch-size", "64", "--lr", "5e-4"],
        "phase_two": ["--limit", "10000", "--epochs", "8", "--batch-size", "128", "--lr", "5e-4"],
        "stl": ["--encoder", "nin", "--limit", "5000", "--epochs", "6", "--batch-size", "128"],
        "save_every": 1, "seeds": [0, 1], "labels": ["--train-sizes", "5000", "500"],
        "equivariance": ["--images", "100", "--pairs", "2000"],
        "transformations": ["crop+colour", "projective"],
        "left_out": ["steerable", "mean_target"],  # or it would take more than 90 minutes
    },
    "tiny": {
        "predictors": ["--limit", "128", "--epochs", "2", "--batch-size", "64"],
        "phase_two": ["--limit", "128", "--epochs", "1", "--batch-size", "64"],
        "stl": ["--encoder", "nin", "--limit", "64", "--epochs", "1", "--batch-size", "32"],
        "save_every": 1, "seeds": [0, 1], "labels": ["--train-sizes", "100", "20"],
        "equivariance": ["--images", "20", "--per-image", "12", "--pairs", "50"], "transformations": ["crop+colour"],
    },
}


@dataclass
class Part:
    """One command. settings: what its result depends on; where: folders, device, and what else may change between
    machines. needs: names of the parts before it. output: the file it writes; said: the one that takes what it says."""

    name: str
    settings: list
    where: list
    needs: list
    output: Path

    @property
    def trains(self):
        return self.output.suffix == ".ckpt"

    @property
    def said(self):
        return self.output.with_suffix(".out" if self.trains else ".log")

    @property
    def command(self):
        return [self.settings[0], *self.where, *self.settings[1:]]


def title_of(dataset):
    """What the tables call the data."""
    if dataset in ("cifar10", "stl10", "digits"):
        return {"cifar10": "CIFAR-10", "stl10": "STL-10", "digits": "scikit-learn's digits"}[dataset]
    folder = Path(dataset) / "train"
    classes = [Path(entry.path) for entry in visible(folder) if entry.is_dir()] if folder.is_dir() else []
    if sorted(path.name for path in classes) != CIFAR10_CLASSES:
        raise UserError(f"'{dataset}' is no copy of CIFAR-10: {folder} is to have the folders "
                        f"{', '.join(CIFAR10_CLASSES)}")
    suffixes = {Path(entry.name).suffix.lower() for path in classes for entry in visible(path)} & IMAGE_SUFFIXES
    return "CIFAR-10, JPEG copy" if suffixes <= {".jpg", ".jpeg"} else "CIFAR-10, copied to files"


def parts_of(args, scale, folder):
    """All parts of a study in the order in which they are preferred: seed after seed."""
    parts, where = [], ["--dataset", args.dataset, "--data-dir", args.data_dir, "--device", args.device]
    stl = args.family == "stl"
    sizes = scale["labels"] or (["--train-sizes", "5000"] if args.dataset == "stl10" else [])
    classifiers = ["knn", "linear"] if stl else ["mlp", "knn", "logistic"]
    evaluations = {"labels": (args.dataset, [*(["--classifiers", *classifiers] if stl else []), *sizes])}
    if scale.get("each_classifier_alone"):
        evaluations = {f"labels {name}": (args.dataset, ["--classifiers", name, *sizes]) for name in classifiers}
    if stl and args.dataset == "stl10":  # as published, beside STL-10 itself
        evaluations["transfer"] = "cifar10", ["--classifiers", "linear", "--train-sizes", "50000"]
    families = ["--transformations", *scale["transformations"]] if stl else []
    evaluations["equivariance"] = args.dataset, ["--equivariance", *families, *scale["equivariance"]]

    def evaluate(name, checkpoint, rows, number):
        for kind, (dataset, flags) in evaluations.items():
            output = checkpoint.parent / f"{name}-{kind.replace(' ', '-')}.json"
            settings = ["probe.py", *flags, "--rows", rows, "--seed", str(number)]
            paths = [str(checkpoint), "--dataset", dataset, *where[2:], "--json", str(output)]
            parts.append(Part(f"{number}/{name} {kind}", settings, paths, [f"{number}/{checkpoint.stem}"], output))

    for number in args.seeds:
        checkpoints = folder / f"seed{number}"
        for name, (_, script, flags, before) in args.methods.items():
            checkpoint = checkpoints / f"{name}.ckpt"
            of_scale = scale["stl" if stl else "phase_two" if before else "predictors"]
            paths = ["--output", str(checkpoint), "--resume", "--save-every", str(scale["save_every"])]
            paths += ["--pretrained", str(checkpoints / f"{before}.ckpt")] if before else []
            parts.append(Part(f"{number}/{name}", [script, *flags, *of_scale, "--seed", str(number)], [*where, *paths],
                              [f"{number}/{before}"] if before else [], checkpoint))
        for name in args.methods:
            evaluate(name, checkpoints / f"{name}.ckpt", "checkpoints", number)
        like = "pt" if "pt" in args.methods else next(iter(args.methods))  # says which encoder, and no more
        evaluate("baselines", checkpoints / f"{like}.ckpt", "baselines", number)
    return parts


def prepare_data(args):
    """Downloads, or decodes, once: many processes that do so at the same time would spoil each other's files."""
    size = 96 if args.family == "stl" and args.dataset == "stl10" else 32
    for split in ("train+unlabeled" if args.family == "stl" else "unlabeled", "train", "test"):
        load_images(args.dataset, split, args.data_dir, size)
    if args.family == "stl" and args.dataset == "stl10":
        load_images("cifar10", "train", args.data_dir)  # for the transfer; both of its splits are one download


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine(device):
    """What a result was made with."""
    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD") + ("-changed" if git("diff", "HEAD", "--", "*.py", "csrc") else "")
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"processor": processor(), "cores": cores(),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "python": platform.python_version(), "commit": commit,
            **{name: version(name) for name in ("torch", "torchvision", "scikit-learn", "numpy")}}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def settle(parts, results):
    """Removes results that cannot be gone on from: those of other settings end the program; where a checkpoint is lost
    that unfinished parts need, it and all that followed from it is to be made again. Returns what was removed."""
    by_name = {part.name: part for part in parts}
    for name, record in results["parts"].items():
        if name in by_name and record["settings"] != by_name[name].settings:
            raise UserError(f"part {name} was made with `{shlex.join(record['settings'])}` and is now to be made with "
                            f"`{shlex.join(by_name[name].settings)}`: give another --runs, or the settings of before")
    removed = []
    while True:
        missing = {part.name for part in parts} - results["parts"].keys()
        needed = {name for part in parts if part.name in missing for name in part.needs}
        lost = [part.name for part in parts if part.name not in missing and (
            missing & set(part.needs)
            or (part.name in needed and digest(part.output) != results["parts"][part.name].get("checkpoint")))]
        if not lost:
            return removed
        removed += lost
        for name in lost:
            del results["parts"][name]


def finish(part, seconds):
    """The record of a part whose command has ended well."""
    record = {"settings": part.settings, "command": shlex.join(["python", *part.command]),
              "seconds": round(seconds, 1)}
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
        self.start, self.before = time.monotonic(), sum(piece["seconds"] for piece in results["pieces"])
        results["pieces"].append({"machine": machine(args.device), "jobs": args.jobs, "seconds": 0.0})

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
        threads = str(max(1, cores() // self.jobs))
        script, *flags = part.command
        with open(part.said, "a") as said:
            process = subprocess.Popen([sys.executable, str(ROOT / script), *flags], stdout=said, stderr=said,
                                       start_new_session=True, pass_fds=(self.lock.fileno(),),  # while it lives, locked
                                       env={"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"})
        self.running[process] = part, time.monotonic()
        self.say(f"begun: {part.name}")

    def end(self, process):
        part, start = self.running.pop(process)
        why = None
        if process.returncode == 0:
            try:
                record = finish(part, time.monotonic() - start)
                self.results["parts"][part.name] = {**record, "piece": len(self.results["pieces"]) - 1}
                self.save()
            except (UserError, OSError, ValueError, LookupError) as error:  # a full disk, a file that was removed
                self.results["parts"].pop(part.name, None)
                why = f"what it wrote cannot be used ({error})"
        elif process.returncode < 0 and self.stopped is None:
            why = f"ended by signal {-process.returncode}"
        elif self.stopped is None:
            why = (part.said.read_text().strip().splitlines() or ["it said nothing"])[-1]
        if part.name in self.results["parts"]:
            self.say(f"done:  {part.name}, {record['seconds']:.0f} s")
        if why:
            self.failed[part.name] = why
            self.say(f"FAILED: {part.name}: {why}\n  more in {part.said}; the command: "
                     f"{shlex.join(['python', *part.command])}")

    def save(self):
        self.results["pieces"][-1]["seconds"] = round(time.monotonic() - self.start, 1)
        write_results(self.results, self.path)

    def run(self):
        def stop(number, frame):
            self.stopped = self.stopped or number

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
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
        finally:
            self.stopped = self.stopped or ("error" if self.running else None)
            for process in self.running:  # trainings save where they are
                process.terminate()
            for process in list(self.running):
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                self.end(process)
            for number, handler in before.items():
                signal.signal(number, handler)
            try:
                self.save()
            except OSError as error:
                raise UserError(f"cannot write '{self.path}' ({error.strerror}): make room; the same command goes "
                                "on") from error


def parse_args():
    parser = Parser(description="Make the papers' studies again, part by part; the same command goes on after a stop.",
                    epilog="example:\n  python results/reproduce.py vte --scale tiny --dataset digits")
    add = parser.add_argument
    add("family", choices=list(METHODS), help="vte: AVT, predictive transformation and VTE; stl: STL and SimCLR")
    add("--scale", choices=list(SCALES), default="full",
        help="full: the papers'; small: two CPU cores, some 85 minutes; tiny: to see it work, minutes")
    add("--dataset", type=file_path, help="cifar10, stl10, digits (with --scale tiny), or a folder that holds CIFAR-10 "
        "as files (default: cifar10; for stl, stl10)")
    add("--data-dir", type=file_path, default="data", help="where data is downloaded to (default: %(default)s)")
    add("--methods", nargs="+", choices=[name for methods in METHODS.values() for name in methods],
        help="some only, and what they build on; the first seven are of vte (default: all, but for small without "
             "steerable and mean_target)")
    add("--seeds", nargs="+", type=seed, metavar="N", help="training seeds (default: 0 1 2, of small and tiny 0 1)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    add("--jobs", type=positive(int), help="parts at once (default: 1 on a CPU; on a GPU "
        + ", ".join(f"{number} of {family}" for family, number in AT_ONCE_ON_A_GPU.items()) + ")")
    add("--minutes", type=positive(float),
        help=f"stop after so long, saved, with exit code {NOT_FINISHED}; the same command goes on")
    add("--runs", type=file_path, default="runs/reproduce", help="checkpoints, logs, results (default: %(default)s)")
    add("--finished", type=file_path, metavar="JSON",
        help="results of the same study made elsewhere: what it has and --runs lacks counts as made")
    add("--pages", type=file_path, default=str(ROOT), metavar="DIR",
        help="where results/, RESULTS.md and README.md are to be brought up to date (default: here)")
    args = parser.parse_args()
    known = METHODS[args.family]
    unknown = [name for name in args.methods or [] if name not in known]
    if unknown:
        parser.error(f"--methods {unknown[0]} is none of {args.family}, which has {', '.join(known)}")
    methods = args.methods or [name for name in known if name not in SCALES[args.scale].get("left_out", ())]
    chosen = {*methods} | {known[name][3] for name in methods}  # and what they build on
    args.methods = {name: method for name, method in known.items() if name in chosen}
    if args.dataset is None:
        args.dataset = "stl10" if args.family == "stl" and args.scale == "full" else "cifar10"
    if args.dataset == "digits" and args.scale != "tiny":
        parser.error("--dataset digits is for --scale tiny, to see it work: no paper has numbers on it")
    return args


def locked(folder):
    """A file that is held while this process or one that it started lives, so that no two write to one folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")
    except OSError as error:
        raise UserError(f"cannot write to '{folder}' ({error.strerror}): give another --runs") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        by = lock.read(20).strip()
        lock.close()
        raise UserError(f"this study, begun by process {by}, is running already in '{folder}', or a part of it still "
                        "is: wait for it, or end it, or give another --runs") from error
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def results_so_far(args, name, title, path):
    """What `path` holds, or nothing yet, and what --finished holds beyond that."""
    results = {"study": name, "title": title, "scale": args.scale, "pieces": [], "parts": {}}
    for source in (path, Path(args.finished) if args.finished else None):
        if source is None or (source == path and not path.exists()):
            continue
        found = read_results(source)
        if (found["study"], found["title"]) != (name, title):
            raise UserError(f"'{source}' holds a study named {found['study']} on {found['title']}, not {name} on "
                            f"{title}" + (": give another --runs" if source == path else ""))
        beyond = {part: record for part, record in found["parts"].items() if part not in results["parts"]}
        first = len(results["pieces"])
        if beyond or source == path:
            results["pieces"] += found["pieces"]
            results["parts"] |= {part: {**record, "piece": record["piece"] + first}
                                 for part, record in beyond.items()}
    return results


def main():
    args = parse_args()
    title, scale = title_of(args.dataset), SCALES[args.scale]
    kind = args.dataset if args.dataset in ("stl10", "digits") else "cifar10"
    name = ("stl-" if args.family == "stl" else "") + kind + ("" if args.scale == "full" else f"-{args.scale}")
    args.seeds = list(dict.fromkeys(args.seeds or scale["seeds"]))
    device = choose_device(args.device)
    args.jobs = args.jobs or (AT_ONCE_ON_A_GPU[args.family] if device.type == "cuda" else 1)
    folder = Path(args.runs) / name
    with locked(folder) as lock:
        path = folder / "results.json"
        parts = parts_of(args, scale, folder)
        args.device = device
        results = results_so_far(args, name, title, path)
        if name in STUDIES:
            write_pages(Path(args.pages))  # before hours of work, not after: they can be written
        removed = settle(parts, results)
        if removed:
            if path.exists():
                shutil.copy(path, folder / "results.json.before")
            print(f"to be made again, as checkpoints that are needed are not there: {', '.join(removed)}")
        left = [part for part in parts if part.name not in results["parts"]]
        if left:
            if args.scale == "full" and device.type == "cpu":
                print("there is no GPU: this will take weeks; --scale small is made for a CPU", file=sys.stderr)
            prepare_data(args)
        study = Study(args, parts, results, path, lock)
        study.say(f"{name}: {title}, {len(args.seeds)} seeds, {args.jobs} at once, in {folder}")
        study.run()
        if name in STUDIES:
            write_pages(Path(args.pages), results, not any(part.name not in results["parts"] for part in parts))
    left = [part.name for part in parts if part.name not in results["parts"]]
    if study.failed:
        raise UserError(f"{len(left)} of {len(parts)} parts are missing, {len(study.failed)} of them failed (see "
                        "above); the same command tries them again")
    if left:
        print(f"stopped with {len(left)} of {len(parts)} parts left; the same command goes on")
        sys.exit(NOT_FINISHED if study.stopped == "time" else 128 + study.stopped)


if __name__ == "__main__":
    run_command(main)
