"""The parts of a study (study.mk): its data, the marks of its finished trainings, and what they add up to.

    python study/parts.py collect runs/study/cifar10-small      # what is finished, into results/ and the pages

`prepare` and `finish` are what study.mk calls. A mark of a training, NAME.done, holds all that the tables need of it,
so that no checkpoint has to be kept for them. An evaluation's mark is the JSON that it writes.
"""

import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (
    IMAGE_SUFFIXES,
    Parser,
    UserError,
    image_side,
    load_checkpoint,
    load_images,
    positive_int,
    run_command,
    write_atomically,
)

ROOT = Path(__file__).resolve().parent.parent
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
WHERE = re.compile(r" --(dataset|data-dir|device|output|pretrained|save-every|json) ('[^']*'|\S+)| --resume| \S+\.ckpt")


def title_of(dataset):
    """What the tables call the data. Raises UserError for a folder that is no copy of CIFAR-10."""
    if dataset in ("cifar10", "stl10", "digits"):
        return {"cifar10": "CIFAR-10", "stl10": "STL-10", "digits": "scikit-learn's digits"}[dataset]
    folder = Path(dataset) / "train"
    classes = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    if classes != CIFAR10_CLASSES:
        raise UserError(f"'{dataset}' is no copy of CIFAR-10: {folder} must have the folders "
                        f"{', '.join(CIFAR10_CLASSES)}")
    suffixes = {Path(name).suffix.lower() for name in CIFAR10_CLASSES for name in os.listdir(folder / name)}
    return "CIFAR-10, JPEG copy" if suffixes & IMAGE_SUFFIXES <= {".jpg", ".jpeg"} else "CIFAR-10, copied to files"


def prepare(folder, scale, dataset, data_dir, limit, size=None):
    """Downloads or decodes a study's data, and notes in its folder what the data is called."""
    about = {"study": folder.name, "title": title_of(dataset), "scale": scale}
    path = folder / "study.json"
    if path.exists() and json.loads(path.read_text()) != about:
        raise UserError(f"'{path}' says {path.read_text()}, which is not {about['title']}: give other RUNS")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps(about).encode()))
    stl = folder.name.startswith("stl-")
    size = size or (96 if stl and dataset == "stl10" else 32)
    load_images(dataset, "train+unlabeled" if stl else "unlabeled", data_dir, size, limit)
    for split in ("train", "test"):
        load_images(dataset, split, data_dir, size)
    if stl and dataset == "stl10":
        load_images("cifar10", "train", data_dir)  # for the transfer; both of its splits are one download


def settings_of(command):
    """A command without its files, its device, and what else may differ between machines: ["avt.py", "--lr", ...]."""
    return shlex.split(WHERE.sub("", command))[1:]


def finish(path):
    """Writes the mark of a finished training, PATH.done, beside PATH.ckpt: what the tables need of it."""
    checkpoint = load_checkpoint(path)
    try:
        rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        names = rows[0].keys() - {"epoch", "seconds", "constant_predictor", "outline_only", "rotation_only", "ceiling"}
        log = {name: [float(f"{row[name]:.5g}") for row in rows] for name in sorted(names)}
        record = {"checkpoint": hashlib.sha256(path.read_bytes()).hexdigest()[:16], "epochs": checkpoint["epoch"],
                  "images": checkpoint["config"]["images"], "seconds": round(sum(row["seconds"] for row in rows), 1),
                  "log": log, "made_with": checkpoint["made_with"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"what the training of '{path}' wrote cannot be used ({error})") from error
    write_atomically(path.with_suffix(".done"), lambda file: file.write(json.dumps(record).encode()))


def finished_parts(folder):
    """The marks in a study's folder, trainings first: [(name of the part, path)], the name as 0/pt or 0/pt labels.
    Raises UserError for a method that the tables do not know."""
    from tables import METHODS  # here, as it takes seconds, which prepare and finish need not wait for

    known, parts = [*METHODS, "baselines"], []
    for path in folder.glob("seed*/*"):
        name, _, kind = path.stem.partition("-")
        if path.suffix not in (".done", ".json"):
            continue
        if name not in known:
            raise UserError(f"'{path}': give '{name}' a title in METHODS of study/tables.py")
        seed = path.parent.name.removeprefix("seed")
        order = int(seed), kind != "", known.index(name), kind
        parts.append((order, f"{seed}/{name} {kind.replace('-', ' ')}".strip(), path))
    return [(name, path) for _, name, path in sorted(parts)]


def collect(folder):
    """All that is finished in a study's folder, as results/<study>.json has it. Raises UserError."""
    try:
        results = {**json.loads((folder / "study.json").read_text()), "pieces": [], "parts": {}}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"'{folder}' is not the folder of a study ({error})") from error
    for name, path in finished_parts(folder):
        try:
            record = json.loads(path.read_text())
            record.pop("version", None)
            machine = record.pop("made_with")
            command = machine.pop("command")
            record = {"seconds": machine.pop("seconds", 0.0), **record}
            if "rows" in record:
                record["rows"] = [short(row) for row in record["rows"]]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"'{path}' is not what a finished part writes ({error}): remove it, and make it "
                            "again") from error
        put(results, name, {"machine": machine}, {"settings": settings_of(command), "command": command, **record})
    return results


def put(results, name, piece, record):
    """Adds a part, made on the machine of this piece. Each machine stands in the results once."""
    if piece not in results["pieces"]:
        results["pieces"].append(piece)
    results["parts"][name] = {**record, "piece": results["pieces"].index(piece)}


def short(row):
    """A row of an evaluation without what is the same in all of its rows."""
    same = ("checkpoint", "dataset", "seed", "mean_per_class", "ranks", "test_images", "per_image", "pairs", "label")
    return {name: round(value, 5) if isinstance(value, float) else value
            for name, value in row.items() if name not in same}


def take_in(results, path, add):
    """Writes the results of a study to `path`, unless these lack something that it holds. add: keep that beside them.
    Raises UserError."""
    from tables import read_results, write_results

    there = read_results(path) if path.exists() else {**results, "pieces": [], "parts": {}}
    beyond = {name: record for name, record in there["parts"].items() if name not in results["parts"]}
    same_data = there["title"] == results["title"]
    if not same_data or (beyond and not add):
        advice = "--add keeps these beside what is new" if same_data else "move it away to have the new in its place"
        print(f"'{path}' is left as it is: it holds {len(there['parts'])} parts on {there['title']}, "
              f"{len(beyond)} of them not among the {len(results['parts'])} on {results['title']}; {advice}")
        return
    for name, record in beyond.items():
        put(results, name, {"machine": there["pieces"][record["piece"]]["machine"]}, record)
    write_results(results, path)


def parse_args():
    parser = Parser(description="The parts of a study: prepare its data, mark a finished training, collect results.",
                    epilog="example:\n  python study/parts.py collect runs/study/cifar10-small")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("collect", help="put what is finished into results/ and the pages").add_argument
    add("folder", type=Path, help="the study's")
    add("--add", action="store_true", help="keep what results/ has beyond the folder, such as other seeds")
    add("--pages", type=Path, default=ROOT, metavar="DIR", help="where results/, RESULTS.md and README.md are")
    add = actions.add_parser("prepare", help="download or decode a study's data").add_argument
    add("folder", type=Path, help="the study's")
    add("--scale", required=True)
    add("--dataset", required=True)
    add("--data-dir", default="data")
    add("--limit", type=positive_int)
    add("--image-size", type=image_side)
    add = actions.add_parser("finish", help="write the mark of a finished training").add_argument
    add("checkpoint", type=Path)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.action == "prepare":
        prepare(args.folder, args.scale, args.dataset, args.data_dir, args.limit, args.image_size)
    elif args.action == "finish":
        finish(args.checkpoint)
    else:
        from tables import STUDIES, study_section, write_pages, write_results

        results = collect(args.folder)
        write_results(results, args.folder / "results.json")
        write_atomically(args.folder / "results.md", lambda file: file.write(study_section(results).encode()))
        print(f"{len(results['parts'])} parts are finished; their tables: {args.folder / 'results.md'}")
        if results["study"] in STUDIES and results["parts"]:
            take_in(results, args.pages / "results" / f"{results['study']}.json", args.add)
            write_pages(args.pages)


if __name__ == "__main__":
    run_command(main)
