"""Pictures of the data and of training runs, as PNG.

    python results/figures.py transformations --dataset digits --output transformations.png
    python results/figures.py curves pt.jsonl vte_ba.jsonl --output curves.png
    python results/figures.py codes stl.ckpt --output codes.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (
    Parser,
    UserError,
    load_images,
    normalization,
    positive,
    projective_warp,
    run_command,
    sample_coefficients,
    seed,
)


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
        [(row["epoch"], row["loss"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is no log of a training script ({error})") from error
    if not rows:
        raise UserError(f"'{path}' is empty: no epoch has been finished")
    return rows


def draw_curves(args):
    """What each log holds against the epoch: the objective with its yardsticks above; below it the mean log-variance,
    or for STL what tells whether its codes and its hypernetwork are alive."""
    figure, axes = plt.subplots(2, len(args.logs), figsize=(4.2 * len(args.logs), 4.6), squeeze=False, sharex="col")
    for (above, below), path in zip(axes.T, args.logs, strict=True):
        rows = read_log(path)
        epochs = [row["epoch"] for row in rows]
        name = next(name for name in ("squared_error", "explained", "bound", "inv", "loss") if name in rows[0])
        for shown in (name, *(other for other in ("equi", "trans") if other in rows[0])):
            above.plot(epochs, [row[shown] for row in rows], marker=".", label=shown.replace("_", " "))
        for yardstick, style in (("constant_predictor", ":"), ("rotation_only", "--"), ("ceiling", ":")):
            if yardstick in rows[0]:
                above.axhline(rows[0][yardstick], color="grey", linestyle=style, label=yardstick.replace("_", " "))
        if name == "squared_error":
            above.set_ylim(0, 1.5 * rows[0].get("constant_predictor", 4))
        above.set_title(Path(path).stem)
        above.legend(fontsize=8)
        names = {"logvar": "mean log-variance", "code_spread": "code spread",
                 "hypernetwork_variation": "hypernetwork variation"}
        for name in (name for name in names if name in rows[0]):
            colour = "tab:orange" if name == "logvar" else None
            below.plot(epochs, [row[name] for row in rows], marker=".", color=colour, label=names[name])
        if below.lines:
            below.legend(fontsize=8)
        below.set_xlabel("epoch")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    save(figure, args.output)


CODE_KINDS = ["crop", "brightness", "contrast", "saturation", "hue"]  # each alone


def single_transformations(kind, n, size, generator):
    """n transformations of one kind with all else left as it is: what stl.transform takes, and {strength: values}."""
    import stl

    drawn = stl.sample_transformations(n, size, generator)
    shared = {**stl.unchanged_transformations(n, size), "order": drawn["order"]}
    if kind == "crop":
        shared["box"] = box = drawn["box"]
        top, left, height, width = box.float().unbind(1)
        return shared, {"crop position, across": left + width / 2 - size / 2,
                        "crop position, down": top + height / 2 - size / 2, "crop size": (height * width).sqrt()}
    column = CODE_KINDS.index(kind) - 1
    spread = 0.1 if kind == "hue" else 0.4
    value = spread * (2 * torch.rand(n, generator=generator) - 1)
    shared["factors"][:, column] += value
    return shared, {kind: value}


def transformation_codes(path, n, data_dir, seed):
    """Codes (5 n, 128) of pairs of a held-out image and the same transformed, the kind of each (0 to 4), and {strength:
    values, NaN where it is of another kind}."""
    import stl

    model, checkpoint = stl.load_stl(path)
    if model.transformation_encoder is None:
        raise UserError(f"'{path}' has no transformation codes: it was trained with --equi 0 --trans 0")
    config, size = checkpoint["config"], checkpoint["config"]["image_size"]
    images, _, _ = load_images(config["dataset"], "test", data_dir, size)
    generator = torch.Generator().manual_seed(seed)
    scale, shift = normalization(config["mean"], config["std"])
    codes, kinds, strengths = [], [], {}
    for number, kind in enumerate(CODE_KINDS):
        index = torch.randint(0, len(images), (n,), generator=generator)
        shared, values = single_transformations(kind, n, size, generator)
        plain = stl.unchanged_transformations(n, size)
        own = {"flip": torch.zeros(n, dtype=torch.bool), "sigma": torch.zeros(n)}
        with torch.no_grad():
            normal = 255 * scale, shift
            before, after = (stl.transform(images, index, which, own, normal) for which in (plain, shared))
            for x, t in zip(before.split(250), after.split(250), strict=True):
                codes.append(model.encode_transformation(model.encoder(x), model.encoder(t)))
        kinds += [number] * n
        for name, value in values.items():
            strengths[name] = torch.full((len(CODE_KINDS) * n,), torch.nan)
            strengths[name][number * n : (number + 1) * n] = value
    return torch.cat(codes).numpy(), np.array(kinds), {name: value.numpy() for name, value in strengths.items()}


def draw_codes(args):
    """t-SNE of the transformation codes of held-out pairs, coloured by the kind of transformation, and by how strong it
    is (STL Figures 1 and 4)."""
    from sklearn.manifold import TSNE

    codes, kinds, strengths = transformation_codes(args.checkpoint, args.pairs, args.data_dir, args.seed)
    perplexity = min(30, len(codes) // 4)
    at = TSNE(perplexity=perplexity, init="pca", random_state=args.seed, metric="cosine").fit_transform(codes)
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.2))
    first, *others = axes.flat
    for number, kind in enumerate(CODE_KINDS):
        first.scatter(*at[kinds == number].T, s=5, label=kind)
    first.legend(fontsize=8, markerscale=2, loc="best")
    first.set_title("kind of transformation", fontsize=10)
    for axis, (name, values) in zip(others, strengths.items(), strict=True):
        of_kind = np.isfinite(values)
        axis.scatter(*at[~of_kind].T, s=1, color="lightgrey")
        shown = axis.scatter(*at[of_kind].T, s=6, c=values[of_kind], cmap="coolwarm")
        figure.colorbar(shown, ax=axis, shrink=0.8)
        axis.set_title(name, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([]), axis.set_yticks([])
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
    codes = pictures.add_parser("codes", help="t-SNE of STL's transformation codes, by kind and by strength")
    codes.add_argument("checkpoint", metavar="CKPT", help="of stl.py; its own data set's test images are used")
    codes.add_argument("--pairs", type=positive(int), default=400, help="of each kind of transformation")
    codes.add_argument("--data-dir", default="data", help="where cifar10 and stl10 are downloaded to")
    codes.add_argument("--seed", type=seed, default=0, help="of images, transformations and t-SNE")
    codes.add_argument("--output", default="codes.png", help="default: %(default)s")
    codes.set_defaults(draw=draw_codes)
    return parser.parse_args()


def main():
    args = parse_args()
    args.draw(args)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
