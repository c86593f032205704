"""Pictures of the data and of training runs, as PNG.

    python study/figures.py curves pt.jsonl vte_ba.jsonl --output curves.png
    python study/figures.py codes stl.ckpt --output codes.png
    python study/figures.py decoded pt.ckpt avt.ckpt --output decoded.png
    python study/figures.py shares equivariance.json --output shares.png
    python study/figures.py errors results/cifar10-small.json --output errors.png
    python study/figures.py overview --output overview.png
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
    build_encoder,
    load_checkpoint,
    load_images,
    load_model,
    positive_int,
    run_command,
    seed_int,
)
from minter_warp import (
    normalization,
    projective_warp,
    sample_coefficients,
    transformation_target,
    warp_batch,
)

COLOURS = {  # one a method in every picture; Okabe and Ito's, told apart by the colour-blind
    "avt": "#E69F00", "pt": "#0072B2", "vte_ba": "#009E73", "vte_infonce1": "#CC79A7", "vte_infonce2": "#56B4E9",
    "stl": "#D55E00", "simclr": "#000000", "augmix": "#A0522D", "steerable": "#7F9F00", "mean_target": "#5D3A9B",
    "random_ba": "#66C2A5", "random_infonce1": "#E7B8D3", "random_infonce2": "#A9DBF5",
    "labels": "#117733", "predicted": "#882255", "inv": "#332288", "equi": "#88CCEE", "without_inv": "#44AA99",
    "without_equi": "#DDCC77", "without_trans": "#AA4499",
    "random encoder": "#777777", "raw pixels": "#777777"}
SHARES = {  # of the variance of f(t(x)), as `equivariance.variance_shares` names them: title and colour in pictures
    "invariant": ("invariant: stays when t changes", "#0072B2"),
    "the same for all images": ("equivariant, the same for all images: follows from t alone", "#F0E442"),
    "image by image": ("equivariant, image by image: follows from f(x) and t", "#E69F00"),
    "unexplained": ("changes with t, unexplained", "#BBBBBB"),
    "noise of sigma": ("noise of σ", "#666666")}
TRANSFORMATIONS = ["projective", "rotation", "scale", "translation", "crop", "colour", "crop+colour", "single"]
MARKERS = {"random encoder": "s", "raw pixels": "X"}


def save(figure, path):
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture '{path}' ({error})") from error


def read_log(path):
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        rows = [{name: float(value) for name, value in row.items()} for row in rows]
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"'{path}' is no log of a training script ({error})") from error
    if not rows:
        raise UserError(f"'{path}' is empty: no epoch has been finished")
    if not all({"epoch", "loss"} <= row.keys() == rows[0].keys() for row in rows):
        raise UserError(f"'{path}' is no log of a training script (each line is to hold epoch, loss and all the rest)")
    return rows


SHOWN = {"explained": "share of z explained", "squared_error": "squared error of t", "bound": "bound, nats",
         "inv": "invariance loss", "loss": "loss"}  # the first of these that a log holds
BESIDE = {"equi": "equivariance loss", "trans": "transformation loss"}
BELOW = {"z_std": "standard deviation of z", "logvar": "σ of the encoder", "code_spread": "code spread",
         "map_variation": "map variation", "hypernetwork_variation": "map variation"}  # as older logs call it
REFERENCES = {"constant_predictor": ("a constant", ":"), "outline_only": ("the outline alone", "-."),
              "rotation_only": ("the rotation alone", "--"), "ceiling": ("ceiling", ":")}


def draw_curves(args):
    """What each log holds against the epoch: the objective with what it is compared with above; below it how far z
    varies and what of it is noise, or for STL what tells whether its codes and its hypernetwork are alive."""
    from tables import METHODS

    figure, axes = plt.subplots(2, len(args.logs), figsize=(3.6 * len(args.logs), 4.8), squeeze=False, sharex="col")
    for (above, below), path in zip(axes.T, args.logs, strict=True):
        rows, method = read_log(path), Path(path).stem
        epochs = [row["epoch"] for row in rows]
        colour = COLOURS.get(method, "#0072B2")
        name = next(name for name in SHOWN if name in rows[0])
        for shown, style in ((name, "-"), *zip(BESIDE, ("--", ":"), strict=True)):
            if shown in rows[0]:
                above.plot(epochs, [row[shown] for row in rows], style, color=colour, marker=".",
                           label={**SHOWN, **BESIDE}[shown])
        for reference, (label, style) in REFERENCES.items():
            if reference in rows[0]:
                above.axhline(rows[0][reference], color="#777777", linestyle=style, label=label)
        if name == "explained":
            above.axhline(0, color="#777777", linestyle=":", label="by the mean of z")
        if name == "squared_error":
            above.set_ylim(0, max(2 * rows[0].get("constant_predictor", 4), 1.05 * max(row[name] for row in rows)))
        above.set_title(METHODS.get(method, method), fontsize=11)
        above.set_ylabel(SHOWN[name] if name != "inv" else "losses")
        above.margins(y=0.6 if name == "inv" else 0.25)  # room for the legend
        above.legend(fontsize=8, framealpha=0.6, loc="upper right" if name == "squared_error" else "best")
        for name in (name for name in BELOW if name in rows[0]):
            style = "-" if name in ("z_std", "code_spread") else "--"
            values = np.array([row[name] for row in rows])
            below.plot(epochs, np.exp(values / 2) if name == "logvar" else values, style, color=colour, marker=".",
                       label=BELOW[name])
        if below.lines:
            below.set_ylim(0, 1.3 * max(line.get_ydata().max() for line in below.lines))
            below.legend(fontsize=8, framealpha=0.6, loc="center right")
        below.set_xlabel("epoch")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    save(figure, args.output)


def matrix_points(codes, weight):
    """Codes (N, 128) and the weight (512, 512, 128) of stl.Hypernetwork -> points (N, 128) float64 that lie as far from
    each other as the matrices W(y_t), (N, 512, 512), which are not made. W is linear in the code, so <W(y), W(y')> =
    y' G y, with G (128, 128) the Gram matrix of the weight, and the points are the codes times G^0.5."""
    flat = weight.detach().flatten(0, 1)
    values, vectors = torch.linalg.eigh((flat.T @ flat).double())
    return codes.double() @ vectors * values.clamp(min=0).sqrt()  # but for a rotation


@torch.no_grad()
def transformation_codes(path, n, data_dir, seed):
    """Codes (n, 128) of pairs of a held-out image and the same under a crop or one adjustment of colour, their
    `matrix_points`, None without a hypernetwork, the kind of each, the number of one of `equivariance.SINGLE`, and
    {strength: values, NaN where it is of another kind}."""
    from equivariance import COLOURS, FAMILIES, SINGLE
    from probe import encode
    from stl import load_stl

    model, checkpoint = load_stl(path)
    if model.transformation_encoder is None or model.code != "learned":
        raise UserError(f"'{path}' has no transformation codes: they are learnt with --code learned, unless --equi and "
                        "--trans are 0")
    config, size = checkpoint["config"], checkpoint["config"]["image_size"]
    images = load_images(config["dataset"], "test", data_dir, size).images
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, len(images), (n,), generator=generator)
    apply, targets, _ = FAMILIES["single"](n, size, generator)
    x, tx = (encode(model.encoder, images, config["mean"], config["std"], torch.device("cpu"), torch.float32,
                    index=index, apply=how)[0] for how in (None, apply))
    codes, kinds = model.encode_transformation(x, tx), targets["kind"].argmax(1)
    across, down = targets["crop position"].unbind(1)
    strengths = {"crop position, across": across, "crop position, down": down,
                 "crop size": targets["crop size"].prod(1).sqrt(), **{name: targets[name][:, 0] for name in COLOURS}}
    strengths = {name: torch.where(kinds == SINGLE.index(name.split()[0]), values, torch.nan).numpy()
                 for name, values in strengths.items()}
    points = model.hypernetwork and matrix_points(codes, model.hypernetwork.weight).numpy()
    return codes.numpy(), points, kinds.numpy(), strengths


def draw_codes(args):
    """t-SNE of the transformation codes of held-out pairs, by cosine, and of the matrices W(t) that the hypernetwork
    makes of them, by distance, coloured by the kind of transformation, and by how strong it is (STL Figures 1 and
    4)."""
    from sklearn.manifold import TSNE

    from equivariance import SINGLE

    codes, points, kinds, strengths = transformation_codes(args.checkpoint, args.pairs, args.data_dir, args.seed)
    halves = [("codes of t", codes, "cosine"), ("matrices W(t)", points, "euclidean")][: 1 if points is None else 2]
    figure = plt.figure(figsize=(6.2 * len(halves), 11.5), layout="constrained")
    for half, (title, values, metric) in zip(figure.subfigures(1, len(halves), squeeze=False)[0], halves, strict=True):
        at = TSNE(perplexity=min(30, len(codes) // 4), init="pca", random_state=args.seed,
                  metric=metric).fit_transform(values)
        half.suptitle(title, fontsize=14)
        axes = half.subplots(4, 2)
        first, *others = axes.flat
        for number, kind in enumerate(SINGLE):
            first.scatter(*at[kinds == number].T, s=5, label=kind)
        first.set_title("kind of transformation")
        for axis, (name, strength) in zip(others, strengths.items(), strict=True):
            of_kind = np.isfinite(strength)
            axis.scatter(*at[~of_kind].T, s=1, color="lightgrey")
            shown = axis.scatter(*at[of_kind].T, s=6, c=strength[of_kind], cmap="coolwarm")
            half.colorbar(shown, ax=axis, shrink=0.8)
            axis.set_title(name)
        for axis in axes.flat:
            axis.set_xticks([]), axis.set_yticks([])
    figure.legend(*first.get_legend_handles_labels(), markerscale=3, loc="outside lower center", ncols=len(SINGLE))
    save(figure, args.output)


def seen_region(t, size):
    """The corners, top left first and clockwise, of what t(x) shows of x, in x: (N, 8) of `transformation_target` ->
    (N, 4, 2) float64, (x, y) in pixels. size: side in pixels."""
    half, unit = size / 2, size / 32
    offset = torch.tensor([0, 0, half, 0, 0, half, 0, 0], dtype=torch.float64)
    divisor = torch.tensor([1, 1, 20 * unit, 1, 1, 20 * unit, 0.015 / unit, 0.015 / unit], dtype=torch.float64)
    matrix = torch.cat([t.double() * divisor + offset, torch.ones(len(t), 1)], 1).view(-1, 3, 3)  # output to input
    corners = torch.tensor([[0, 0, 1], [size, 0, 1], [size, size, 1], [0, size, 1]], dtype=torch.float64)
    at = matrix @ corners.T  # (N, 3, 4)
    return (at[:, :2] / at[:, 2:]).mT


@torch.no_grad()
def decode_transformations(path, images, coefficients):
    """The method of a checkpoint, and t (N, 8) as its decoder tells it from mu of images (N, 3, S, S) uint8 under these
    coefficients (and, AVT, of the images themselves)."""
    from avt import AVT
    from predictive_transform import PredictiveTransform

    checkpoint = load_checkpoint(path)
    config, models = checkpoint["config"], {"predictive_transform": PredictiveTransform, "avt": AVT}
    if checkpoint["method"] not in models:
        raise UserError(f"'{path}' is a checkpoint of {checkpoint['method']}, which decodes no transformation; one of "
                        "predictive_transform.py or avt.py is needed here")
    encoder = build_encoder(config["encoder"], config["image_size"])
    model = load_model(models[checkpoint["method"]](encoder), checkpoint, path)
    index, normal = torch.arange(len(images)), normalization(config["mean"], config["std"])
    codes = [model.encoder(warp_batch(images, index, None, which, *normal))[0] for which in (coefficients, None)]
    return checkpoint["method"], model.decoder(torch.cat(codes, 1) if checkpoint["method"] == "avt" else codes[0])


OUTLINES = {"true": "#0072B2", "decoded": "#D55E00"}


def draw_decoded(args):
    """Transformed held-out images above; below the originals, with the outline of what the transformed image shows of
    them, the true one and the one that each checkpoint decodes. The thick side is the top of the transformed image."""
    config = load_checkpoint(args.checkpoints[0])["config"]
    size = config["image_size"]
    for path in args.checkpoints[1:]:
        if load_checkpoint(path)["config"]["image_size"] != size:
            raise UserError("the checkpoints differ in image_size: draw them one by one", exit_code=2)
    images = load_images(args.dataset or config["dataset"], "test", args.data_dir, size).images
    generator = torch.Generator().manual_seed(args.seed)
    images = images[torch.randperm(len(images), generator=generator)[: args.columns]]
    coefficients = sample_coefficients(len(images), size, generator)
    truth, moved = transformation_target(coefficients, size), projective_warp(images, coefficients)
    figure, axes = plt.subplots(1 + len(args.checkpoints), len(images), squeeze=False,
                                figsize=(1.6 * len(images) + 0.4, 1.75 * (1 + len(args.checkpoints))))
    for axis, picture in zip(axes[0], moved, strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy(), extent=(0, size, size, 0))
    axes[0, 0].set_ylabel("t(x)", fontsize=10)
    for row, path in zip(axes[1:], args.checkpoints, strict=True):
        method, decoded = decode_transformations(path, images, coefficients)
        errors = (decoded - truth).square().sum(1)
        row[0].set_ylabel({"avt": "x, decoded\nby AVT"}.get(method, "x, decoded by\npredictive transf."), fontsize=10)
        for axis, picture, *outlines, error in zip(row, images, seen_region(truth, size), seen_region(decoded, size),
                                                   errors, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), extent=(0, size, size, 0))
            for outline, colour in zip(outlines, OUTLINES.values(), strict=True):
                axis.plot(*outline[[0, 1, 2, 3, 0]].T, color=colour, linewidth=1.2)
                axis.plot(*outline[:2].T, color=colour, linewidth=4)
            axis.set_title(f"error {error:.2f}", fontsize=9, pad=2)
    for row, margin in zip(axes, [0, *[0.35 * size] * len(args.checkpoints)], strict=True):
        for axis in row:
            axis.set(xlim=(-margin, size + margin), ylim=(size + margin, -margin), xticks=[], yticks=[])
    lines = [plt.Line2D([], [], color=colour, linewidth=2, label=f"{name} outline of t(x) in x, its top thick")
             for name, colour in OUTLINES.items()]
    figure.tight_layout(pad=0.3, h_pad=1.5, rect=(0, 0.5 / figure.get_figheight() / 1.5, 1, 1))
    figure.legend(handles=lines, loc="lower center", ncols=2, fontsize=10, frameon=False)
    save(figure, args.output)


def draw_shares(args):
    """The shares of the variance of f(t(x)), a bar for each method in the JSON of equivariance.py. A part below 0, by a
    map worse than none, goes to the left. Of z sampled the noise of sigma stands apart."""
    from tables import METHODS

    from probe import read_rows

    bars, notes = {}, set()
    try:
        for row in [row for path in args.rows for row in read_rows(path)]:
            if (row["measure"] == "share" and row["transformations"] == args.transformations
                    and row["features"] in (None, args.features)):
                name = row["checkpoint"] or row["method"]
                if "/" not in name:  # there are not two of that name
                    name = METHODS.get(Path(name).stem, name).replace("*", "")
                bars.setdefault(name, {})[row["part"]] = [row["value"], row["low"], row["high"]]
                notes.add(f"{row['test_images']} test images of {Path(row['dataset']).name}, border {row['border']}")
        for parts in bars.values():
            if noise := parts.get("noise of sigma"):  # a known number: what is left has the interval of both
                parts["unexplained"] = [value - noise[0] for value in parts["unexplained"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{', '.join(args.rows)}: no files that equivariance.py --json wrote ({error})") from error
    if not bars:
        raise UserError(f"{', '.join(args.rows)}: no shares under {args.transformations} transformations")
    figure, axis = plt.subplots(figsize=(7.6, 1.9 + 0.34 * len(bars)), layout="constrained")
    shown = {name: style for name, style in SHARES.items() if any(name in parts for parts in bars.values())}
    for place, parts in enumerate(bars.values()):
        right = left = 0
        for number, (name, (_, colour)) in enumerate((name, style) for name, style in shown.items() if name in parts):
            value, low, high = parts[name]
            axis.barh(place, value, 0.72, right if value >= 0 else left, color=colour, edgecolor="white", linewidth=0.5)
            right, left = right + max(value, 0), left + min(value, 0)
            end = right if value >= 0 else left
            axis.errorbar(end, place + 0.12 * (number % 3 - 1), xerr=[[max(0, value - low)], [max(0, high - value)]],
                          color="black", capsize=2, linewidth=1)
    axis.set_yticks(range(len(bars)), bars)
    axis.invert_yaxis()
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params("y", length=0)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("share of the variance of f(t(x)); marks: 95 % interval of the part that ends there", fontsize=9)
    axis.set_title(f"{args.transformations.capitalize()} transformations ({'; '.join(sorted(notes))})", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=title) for title, colour in shown.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save(figure, args.output)


def draw_errors(args):
    """Error against the number of labels, of all methods of a study: one panel for each classifier and kind of
    features, bars of one standard deviation over seeds, the paper's numbers dashed."""
    import tables

    results = tables.read_results(Path(args.results))
    errors, published = tables.measurements(results)[0], tables.published_for(results)
    if not errors:
        raise UserError(f"'{args.results}' holds no errors on labels yet")
    shown = {key[0] for key in errors} | {method for known in published.values() for method in known}
    titles = tables.METHODS | tables.stopped_early(results)
    methods = {method: title for method, title in titles.items() if method in shown}
    classifiers = list(dict.fromkeys(classifier for _, _, classifier, _ in errors))
    measured = {key[1] for key in errors if key[0] != "raw pixels"}
    kinds = [kind for kind in tables.KINDS if kind in measured]
    figure, axes = plt.subplots(len(kinds), len(classifiers), figsize=(4 * len(classifiers), 0.8 + 3.2 * len(kinds)),
                                squeeze=False, sharex=True, sharey=True, layout="constrained")
    labels = sorted({key[3] for key in errors}
                    | {size for known in published.values() for row in known.values() for size in row})
    for line, kind in zip(axes, kinds, strict=True):
        for axis, classifier in zip(line, classifiers, strict=True):
            for method, title in methods.items():
                of_pixels = method == "raw pixels"
                points = {size: values for (name, features, by, size), values in sorted(errors.items(), key=str)
                          if name == method and by == classifier and (features == kind or of_pixels)}
                sizes = sorted(points)
                values = [list(points[size].of_seed.values()) for size in sizes]
                deviations = [np.std(value, ddof=1) if len(value) > 1 else 0 for value in values]
                axis.errorbar(sizes, [np.mean(value) for value in values], deviations,
                              color=COLOURS[method], marker="x" if of_pixels else ".", capsize=2,
                              label=title.replace("*", ""))
                known = published.get(classifier, {}) if kind == tables.compared_features(results) else {}
                theirs = known.get(method, {})
                axis.plot(sorted(theirs), [theirs[size] for size in sorted(theirs)], "--", color=COLOURS[method],
                          marker=".", markersize=4, alpha=0.7)
            axis.set(xscale="log", title=f"{tables.TITLES[classifier]}{', ' if kind else ''}{tables.KINDS[kind]}")
            axis.set_xticks(labels, [f"{size:,}" for size in labels])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if kind == kinds[-1]:
                axis.set_xlabel("training labels")
    axes[0, 0].plot([], [], "k--", label="the paper's")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.supylabel("error")
    save(figure, args.output)


def draw_overview(args):
    """Equivariance against the error on labels, a point a method, with the standard deviation over training seeds."""
    import tables

    studies = {name: tables.read_results(path) for name in tables.STUDIES
               if (path := args.pages / "results" / f"{name}.json").exists()}
    rows, _, titles = tables.overview(studies)
    rows = {method: row for method, row in rows.items() if row["equivariant"]}
    if not rows:
        raise UserError(f"'{args.pages / 'results'}' holds no full study on CIFAR-10 yet")
    figure, axis = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    for method, row in rows.items():
        spread = [np.std(list(row[name].of_seed.values()), ddof=1) if len(row[name].of_seed) > 1 else 0
                  for name in ("k-NN", "equivariant")]
        across, up = (deviation or None for deviation in spread)  # of one seed no bar, whose caps would hide the point
        axis.errorbar(row["k-NN"].mean(), row["equivariant"].mean(), up, across, color=COLOURS[method], capsize=2,
                      marker=MARKERS.get(method, "o"), markersize=8, linestyle="none",
                      label=titles[method].replace("*", ""))
    axis.set_ylim(0, 0.05 + max(row["equivariant"].mean() for row in rows.values()))
    axis.set(xlabel=f"k-NN error with {tables.LABELS:,} labels (better to the left)",
             ylabel="equivariant share of the variance")
    axis.set_title("Equivariance and labels: CIFAR-10")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    save(figure, args.output)


def parse_args():
    parser = Parser(description="Pictures of the data and of training runs.",
                    epilog="example:\n  python study/figures.py curves pt.jsonl vte_ba.jsonl --output curves.png")
    pictures = parser.add_subparsers(required=True, metavar="PICTURE")

    def picture(name, draw, help):
        """A subcommand; returns its add_argument."""
        subcommand = pictures.add_parser(name, help=help)
        subcommand.set_defaults(draw=draw)
        subcommand.add_argument("--output", default=f"{name}.png")
        return subcommand.add_argument

    def drawn_from_data(add, of):
        add("--data-dir", default="data", help="for what is downloaded, and for decoded folders")
        add("--seed", type=seed_int, default=0, help=f"of {of}")

    add = picture("curves", draw_curves, "training curves of one or more logs, side by side")
    add("logs", nargs="+", metavar="LOG", help="the .jsonl beside a checkpoint")
    add = picture("codes", draw_codes, "t-SNE of STL's transformation codes and matrices, by kind and by strength")
    add("checkpoint", metavar="CKPT", help="of stl.py; its own data set's test images are used")
    add("--pairs", type=positive_int, default=2000, help="of an image and the same transformed")
    drawn_from_data(add, "images, transformations and t-SNE")
    add = picture("decoded", draw_decoded, "transformations as PT and AVT decode them, drawn over images")
    add("checkpoints", nargs="+", metavar="CKPT", help="of predictive_transform.py or avt.py")
    add("--dataset", help="other data than the first checkpoint's, whose test images are used")
    add("--columns", type=positive_int, default=7, help="how many images")
    drawn_from_data(add, "images and transformations")
    add = picture("shares", draw_shares, "what of the features is invariant, equivariant, unexplained")
    add("rows", nargs="+", metavar="JSON", help="what equivariance.py --json wrote")
    add("--transformations", choices=TRANSFORMATIONS, default="projective", help="which of those it holds")
    add("--features", choices=["mu", "sample"], default="mu", help="of encoders that have a sigma")
    add = picture("errors", draw_errors, "error against the number of labels, ours and the paper's")
    add("results", metavar="JSON", help="results/<study>.json, or the results.json of its folder")
    add = picture("overview", draw_overview, "equivariance against error on labels, of all methods on CIFAR-10")
    add("--pages", type=Path, default=Path(__file__).resolve().parent.parent, metavar="DIR", help="with results/")
    return parser.parse_args()


def main():
    args = parse_args()
    args.draw(args)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
