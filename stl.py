"""STL, self-supervised transformation learning (Yu, Choi, Lee, Hong & Kim, NeurIPS 2024).
https://arxiv.org/abs/2501.08712

Equivariance without transformation labels. Two views of an image, t1(x) and t2(x), have features y1 and y2. A second
network reads off them a code of the transformation from one to the other. A hypernetwork turns the code into a matrix
that must carry y1 to y2. Images come in pairs under the *same* two transformations (an aligned batch), so that a code
can be matched, and used, across images:

    code         y_t(x) = f_T([f(t1(x)), f(t2(x))])                                                    (eq. 5)
    invariance   L_inv = NT-Xent(y1, y2), SimCLR's
    equivariance L_equi = NT-Xent(W(y_t(x')) y1, y2): the code comes from the pair's other image x'    (eq. 7)
    code         L_trans = NT-Xent(y_t(x), y_t(x'))                                                    (eq. 9)
    minimise     inv L_inv + equi L_equi + trans L_trans

    python stl.py --dataset stl10 --output stl.ckpt
    python stl.py --dataset stl10 --equi 0 --trans 0 --batch independent       (SimCLR; aligned: its loss alone)

Published: ResNet-18 on STL-10, linear accuracy 84.83 %, mean of 11 other sets 49.49 % (SimCLR 84.74 and 43.72).
Measured at a small scale (10,000 images of CIFAR-10 as JPEG, 6 epochs, batch 128, seed 0, two CPU cores, torch 2.15;
error of k-NN and linear with 5,000 labels): STL .641 and .552, SimCLR .627 and .536, untrained .724 and .627.

Deviations and readings:
- Both directions, 1 to 2 and 2 to 1, are in one NT-Xent: 4N - 1 candidates for L_equi, 2N - 1 for the others.
- --preset: paper and code differ in trans (0.2, 0.1), in f_T (1024-512-512-128, 1024-128-128), and in the projectors:
  512-512-512-128 and 512-512-128 for features, 128-512-512-128 and 128-128-128 for codes.
- Each view is encoded by itself.
- A pair shares crop, colour jitter and grayscale (--learn says which), and AugMix; flip and blur are each image's own.
- --code labels: f_T reads the parameters of t1 and t2, not features, and there is no L_trans. It is the form of EquiMod
  (Devillers & Lefort, ICLR 2023) and SIE (Garrido et al., ICML 2023), with this hypernetwork in place of theirs.
- --code predicted: no hypernetwork. f_T ends in the parameters of t2 less those of t1: minimise inv L_inv + predict
  |f_T([y1, y2]) - (l2 - l1)|^2, the mean over numbers of variance 1. It is the form of E-SSL (Dangovski et al., ICLR
  2022) and AugSelf (Lee et al., NeurIPS 2021), which has cross-entropies for flip and grayscale.
- The last batch is used, which the code drops. Its odd last image is left to L_inv alone.
- With nin and alexnet f is mu, and there is no sigma.
Logged: code_spread (0: all codes the same) and map_variation, how far W(t) y and W(t') y are apart (0: W ignores t).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    Run,
    UserError,
    build_encoder,
    gather,
    load_checkpoint,
    load_encoder,
    load_model,
    non_negative_float,
    positive_float,
    rows_of_this_rank,
    run_command,
    training_parser,
)
from minter_warp.views import LABELS, sample_views, transform, transformation_labels

PRESETS = {  # where the paper and its released code differ: the weight of L_trans, and hidden and output widths
    "code": {"trans": 0.1, "f_T": (128, 128), "projector": (512, 128), "trans_projector": (128, 128)},
    "paper": {"trans": 0.2, "f_T": (512, 512, 128), "projector": (512, 512, 128), "trans_projector": (512, 512, 128)},
}
LOSSES = {"learned": ("inv", "equi", "trans"), "labels": ("inv", "equi"), "predicted": ("inv", "predict")}  # of --code
LEARN = {"crop": ("crop",), "colour": ("colour",), "crop+colour": ("crop", "colour"), "all": tuple(LABELS)}


def mlp(inputs, *widths):
    """Linear layers without biases, batch normalisation and ReLU between."""
    layers = []
    for i, width in enumerate(widths):
        layers += [nn.BatchNorm1d(inputs), nn.ReLU()] if i else []
        layers += [nn.Linear(inputs, width, bias=False)]
        inputs = width
    return nn.Sequential(*layers)


class Hypernetwork(nn.Module):
    """phi(y_t, y) = W(y_t) y, W linear in the code: codes (N, 128), y (N, 512) -> (N, 512).

    W(y_t) y is also one linear map of the outer product of y and y_t, which is how it is computed: the generated
    matrices of a batch, (N, 512, 512), are never made."""

    def __init__(self, features=512, code=128):
        super().__init__()
        bound = code**-0.5  # as of a Linear(code, features * features)
        self.weight = nn.Parameter(torch.empty(features, features, code).uniform_(-bound, bound))

    def forward(self, codes, y):
        outer = torch.bmm(y[:, :, None], codes[:, None, :]).flatten(1)  # (N, 512 * 128); bmm heeds autocast
        return F.linear(outer, self.weight.flatten(1))

    def matrices(self, codes):
        """W(y_t), (N, 512, 512): the literal form."""
        return torch.einsum("oik,nk->noi", self.weight, codes)


def partner(values):
    """Swaps the two of each pair: rows 0 1 2 3 ... -> 1 0 3 2 ...; the number of rows is even."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


class STL(nn.Module):
    """Two views (N, 3, S, S) of an aligned batch -> a dict of what each loss compares, projected: inv, two of (N, 128);
    equi, two of (2N, 128), features and their predictions; trans, two of (N, 128), the codes of the one and of the
    other image of each pair; and, as they are, codes (2N, 128) and predictions from right and wrong codes for the log.

    losses: which of LOSSES[code] to build; inv alone is SimCLR's. code "labels" and "predicted" also take the labels of
    the two transformations, (N, L) each, those of LEARN[learn]. "predicted" returns predict, two of (2N, L), predicted
    and true differences of labels, in place of equi and trans."""

    def __init__(self, encoder, preset="code", losses=("inv", "equi", "trans"), features=512, code="learned",
                 learn="crop+colour"):
        super().__init__()
        self.code, labels = code, sum(len(LABELS[group][0]) for group in LEARN[learn])
        layers, read = PRESETS[preset], labels if code == "labels" else features
        widths = (*layers["f_T"][:-1], labels) if code == "predicted" else layers["f_T"]
        self.encoder = encoder
        self.inv_projector = mlp(features, *layers["projector"]) if "inv" in losses else None
        self.transformation_encoder = mlp(2 * read, *widths) if set(losses) - {"inv"} else None  # f_T
        self.hypernetwork = Hypernetwork(features, widths[-1]) if "equi" in losses else None
        self.equi_projector = mlp(features, *layers["projector"]) if "equi" in losses else None
        self.trans_projector = mlp(widths[-1], *layers["trans_projector"]) if "trans" in losses else None

    def encode_transformation(self, y1, y2):
        """y_t (eq. 5): features of an image before and after, (N, 512) each -> (N, 128); "labels": of labels (N, L)."""
        return self.transformation_encoder(torch.cat([y1, y2], 1))

    def forward(self, view1, view2, label1=None, label2=None):
        y1, y2 = self.encoder(view1), self.encoder(view2)  # (N, 512)
        compared = {}
        if self.inv_projector is not None:
            compared["inv"] = self.inv_projector(y1), self.inv_projector(y2)
        even = len(y1) - len(y1) % 2  # an odd last image has no partner
        if self.transformation_encoder is None or even == 0:
            return compared
        y1, y2 = y1[:even], y2[:even]
        read1, read2 = (label1[:even], label2[:even]) if self.code == "labels" else (y1, y2)
        forth, back = self.encode_transformation(read1, read2), self.encode_transformation(read2, read1)
        if self.code == "predicted":
            difference = (label2 - label1)[:even] / 2**0.5  # of variance 1
            compared["predict"] = torch.cat([forth, back]), torch.cat([difference, -difference])
            return compared
        of_other = partner if self.code == "learned" else lambda codes: codes  # labels need no other image
        if self.code == "learned":
            compared["codes"] = torch.cat([forth, back])
        if self.hypernetwork is not None:
            few = min(16, even - 2)  # images that also get the code of another pair, to see whether W heeds it
            to2, to1, wrong = self.hypernetwork(
                torch.cat([of_other(forth), of_other(back), forth[2 : few + 2].detach()]),
                torch.cat([y1, y2, y1[:few].detach()]),
            ).split([even, even, few])
            compared["equi"] = (torch.cat([self.equi_projector(y1), self.equi_projector(y2)]),
                                torch.cat([self.equi_projector(to1), self.equi_projector(to2)]))
            compared["right_and_wrong"] = to2[:few], wrong
        if self.trans_projector is not None:
            compared["trans"] = tuple(self.trans_projector(torch.cat([forth[i::2], back[i::2]])) for i in (0, 1))
        return compared


def load_stl(path):
    """The model of a checkpoint, in eval mode on the CPU, and the checkpoint. Raises UserError."""
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    code, learn = config.get("code", "learned"), config.get("learn", "crop+colour")  # older checkpoints have neither
    known = config.get("preset") in tuple(PRESETS) and code in tuple(LOSSES) and learn in tuple(LEARN)
    if not checkpoint["method"].startswith("stl") or not known:
        raise UserError(f"'{path}' is a checkpoint of {checkpoint['method']}; one of stl.py is needed here")
    losses = [name for name in LOSSES[code] if config.get(name)]
    model = STL(load_encoder(checkpoint, path), config["preset"], losses, code=code, learn=learn)
    return load_model(model, checkpoint, path), checkpoint


def nt_xent(a, b, temperature=0.2):
    """Normalised, temperature-scaled cross-entropy (SimCLR's): a_i and b_i are to find each other among all other rows
    of both, and of all ranks. a, b: (N, D). Mean over the 2N rows."""
    z = F.normalize(torch.cat([a, b]).float(), dim=1)
    own = rows_of_this_rank(len(z), z.device)
    scores = z @ gather(z).T / temperature
    scores = scores.scatter(1, own[:, None], -torch.inf)  # nobody is compared with itself
    return F.cross_entropy(scores, own.roll(len(a)))  # i finds i + n, i + n finds i


def stl_loss(compared, weights, temperature=0.2):
    """compared: what STL returns. weights: {name of a loss: number}. Returns the loss and metrics, all scalars."""
    losses = {name: nt_xent(*compared[name], temperature) for name in weights if name in compared and name != "predict"}
    if "predict" in compared:
        losses["predict"] = F.mse_loss(*(values.float() for values in compared["predict"]))
    metrics = dict(losses)
    with torch.no_grad():
        if "codes" in compared:
            metrics["code_spread"] = 1 - F.normalize(compared["codes"].float(), dim=1).mean(0).square().sum()
        if "right_and_wrong" in compared and len(compared["right_and_wrong"][0]):
            right, wrong = (predicted.float() for predicted in compared["right_and_wrong"])
            power = (right.square() + wrong.square()).sum().clamp(min=1e-12)
            metrics["map_variation"] = (right - wrong).square().sum() / power
    return sum(weights[name] * loss for name, loss in losses.items()), metrics


def watch(means, early):
    """Warns of the three ways in which this training is known to fail."""
    if means.get("code_spread", 1) < 0.02:
        warnings.warn("the transformation codes have collapsed to a constant (code_spread near 0): raise --trans",
                      stacklevel=2)
    if means.get("map_variation", 1) < 0.01:
        warnings.warn("the hypernetwork ignores the transformation (map_variation near 0): raise --equi", stacklevel=2)
    if means.get("trans", 1) < 0.05 and early:
        warnings.warn("the transformation loss is near zero this early: the codes may carry a shortcut; lower --trans",
                      stacklevel=2)


def train(args):
    weights = {name: getattr(args, name) for name in LOSSES[args.code] if getattr(args, name) > 0}
    parts = ["stl", *([] if args.code == "learned" else [args.code]),
             *([] if len(weights) == len(LOSSES[args.code]) else weights)]
    run = Run("_".join(parts), args, split="train+unlabeled")
    encoder = build_encoder(args.encoder, args.image_size, probabilistic=False)
    model = run.prepare(STL(encoder, args.preset, weights, code=args.code, learn=args.learn))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    normalize = run.scale * 255, run.shift  # for images in [0, 1]
    together, learnt = 2 if args.batch == "aligned" else 1, LEARN[args.learn]

    def sample(n, size, generator):
        return sample_views(n, size, generator, (*learnt, "augmix") if together == 2 else (), args.augmix)

    for epoch in run.epochs(model, optimizer, schedule):
        for source, index, *drawn in run.batches(sample, sample, together=together):
            views = [transform(source, index, parameters, normalize, run.dtype) for parameters in drawn]
            labels = [transformation_labels(parameters, run.size, learnt) for parameters in drawn
                      if args.code != "learned"]
            with run.autocast():
                compared = model(*views, *labels)
            loss, metrics = stl_loss(compared, weights, args.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            run.step(loss, metrics, len(index))
        watch(run.means(), early=epoch <= max(1, args.epochs // 10))
    run.finish("probe.py", args.output, "--classifiers", "knn", "linear", same=("data_dir",))


def parse_args():
    parser = training_parser(
        "STL: self-supervised transformation learning; with --equi 0 --trans 0 --batch independent, SimCLR.",
        "python stl.py --dataset digits --encoder nin --epochs 20 --batch-size 128 --output stl.ckpt",
        output="stl.ckpt", lr=0.03,
        lr_advice="SGD's, at the start; it follows a cosine to 0. 0.03 as in the paper, for batches of 256",
    )
    add = parser.add_argument_group("STL").add_argument
    add("--preset", choices=["code", "paper"], default="code", help="where the paper and its released code differ: "
        "--trans 0.2, f_T 1024-512-512-128, projectors of three layers (paper); 0.1, 1024-128-128, two layers (code)")
    add("--code", choices=list(LOSSES), default="learned", help="what tells the hypernetwork the transformation: a "
        "code learnt from features, or labels, its parameters (the form of EquiMod and SIE); predicted: no "
        "hypernetwork, f_T predicts the labels (the form of E-SSL and AugSelf)")
    add("--learn", choices=list(LEARN), default="crop+colour", help="the transformations that a pair shares, which its "
        "code or labels can tell (STL's Table 8). The others are drawn for each image: they augment, but nothing "
        "that the code is used for can tell them. colour: jitter and grayscale; all: flip and blur too. AugMix is "
        "always shared, and has no label")
    add("--inv", type=non_negative_float, help="weight of the invariance loss, 0 for none (default: 1)")
    add("--equi", type=non_negative_float, help="weight of the equivariance loss, 0 for none (default: 1)")
    add("--trans", type=non_negative_float, help="weight of the code's loss, 0 for none (default: the preset's)")
    add("--predict", type=non_negative_float, help="weight of the squared error of predicted labels (default: 0.5)")
    add("--batch", choices=["aligned", "independent"], default="aligned", help="independent: every image has "
        "transformations of its own: an ablation where codes are learnt, which then match by chance only")
    add("--augmix", action="store_true", help="also AugMix, once for each pair of an aligned batch")
    add("--temperature", type=positive_float, default=0.2, help="of NT-Xent")
    add("--weight-decay", type=non_negative_float, default=5e-4, help="SGD's")
    args = parser.parse_args()
    defaults = {"inv": 1.0, "equi": 1.0, "trans": PRESETS[args.preset]["trans"], "predict": 0.5}
    for name, default in defaults.items():
        used, weight = name in LOSSES[args.code], getattr(args, name)
        if weight and not used:
            parser.error(f"--{name} {weight:g} has no part in --code {args.code}: leave it out")
        setattr(args, name, weight if weight is not None else default if used else 0.0)
    args.encoder = args.encoder or "resnet18"
    args.image_size = args.image_size or (96 if args.dataset == "stl10" else 32)
    args.batch_size = args.batch_size or 256
    args.probabilistic = False
    if args.batch == "aligned" and args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size} is odd: aligned batches are made of pairs")
    if not args.inv + args.equi + args.trans + args.predict:
        parser.error(f"--{' and --'.join(LOSSES[args.code])} are all 0: nothing is left to minimise")
    return args


def main():
    train(parse_args())


if __name__ == "__main__":
    run_command(main)
