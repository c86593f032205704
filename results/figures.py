"""Pictures of the data and of training runs, as PNG.

    python results/figures.py transformations --dataset digits --output transformations.png
    python results/figures.py curves pt.jsonl vte_ba.jsonl --output curves.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, UserError, load_images, positive, projective_warp, run_command, sample_coefficients, seed


def save(figure, path):
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture '{path}' ({error})") from error


def draw_transformations(args):
    """Images above, each under a random projective transformation below (VTE Figure 5)."""
    images, _, _ = load_images(args.dataset, "train", args.data_dir, args.image_size)
    images = images[: args.columns]
    coefficients = sample_coefficients(len(images), args.image_size, torch.Generator().manual_seed(args.seed))
    figure, axes = plt.subplots(2, len(images), figsize=(len(images), 2.1), squeeze=False)
    for row, pictures in zip(axes, (images, projective_warp(images, coefficients)), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.axis("off")
    figure.tight_layout(pad=0.2)
    save(figure, args.output)


def read_log(path):
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        [(row["epoch"], row["loss"], row["logvar"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is no log of a training script ({error})") from error
    if not rows:
        raise UserError(f"'{path}' is empty: no epoch has been finished")
    return rows


def draw_curves(args):
    """What each log holds against the epoch: the objective with its yardsticks above, the mean log-variance below."""
    figure, axes = plt.subplots(2, len(args.logs), figsize=(4.2 * len(args.logs), 4.6), squeeze=False, sharex="col")
    for (above, below), path in zip(axes.T, args.logs, strict=True):
        rows = read_log(path)
        epochs = [row["epoch"] for row in rows]
        name = next(name for name in ("squared_error", "explained", "bound", "loss") if name in rows[0])
        above.plot(epochs, [row[name] for row in rows], marker=".", label=name.replace("_", " "))
        for yardstick, style in (("constant_predictor", ":"), ("rotation_only", "--"), ("ceiling", ":")):
            if yardstick in rows[0]:
                above.axhline(rows[0][yardstick], color="grey", linestyle=style, label=yardstick.replace("_", " "))
        if name == "squared_error":
            above.set_ylim(0, 1.5 * rows[0].get("constant_predictor", 4))
        above.set_title(Path(path).stem)
        above.legend(fontsize=8)
        below.plot(epochs, [row["logvar"] for row in rows], marker=".", color="tab:orange", label="mean log-variance")
        below.legend(fontsize=8)
        below.set_xlabel("epoch")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    save(figure, args.output)


def parse_args():
    parser = Parser(description="Pictures of the data and of training runs.",
                    epilog="example:\n  python results/figures.py curves pt.jsonl vte_ba.jsonl --output curves.png")
    pictures = parser.add_subparsers(required=True, metavar="PICTURE")
    transformations = pictures.add_parser("transformations", help="images, and the same transformed")
    transformations.add_argument("--dataset", default="digits", help="digits, cifar10, stl10 or a folder")
    transformations.add_argument("--data-dir", default="data", help="where cifar10 and stl10 are downloaded to")
    transformations.add_argument("--image-size", type=positive(int), default=32, help="side in pixels")
    transformations.add_argument("--columns", type=positive(int), default=10, help="how many images")
    transformations.add_argument("--seed", type=seed, default=0, help="of the transformations")
    transformations.add_argument("--output", default="transformations.png", help="default: %(default)s")
    transformations.set_defaults(draw=draw_transformations)
    curves = pictures.add_parser("curves", help="training curves of one or more logs, side by side")
    curves.add_argument("logs", nargs="+", metavar="LOG", help="the .jsonl beside a checkpoint")
    curves.add_argument("--output", default="curves.png", help="default: %(default)s")
    curves.set_defaults(draw=draw_curves)
    return parser.parse_args()


def main():
    args = parse_args()
    args.draw(args)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
