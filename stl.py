"""STL, self-supervised transformation learning (Yu, Choi, Lee, Hong & Kim, NeurIPS 2024).
https://arxiv.org/abs/2501.08712

Equivariance without transformation labels. Two views of an image, t1(x) and t2(x), have features y1 and y2; a second
network reads off them a code of the transformation that leads from one to the other, and a hypernetwork turns the code
into a matrix that is to carry y1 to y2. Images come in pairs under the *same* two transformations (an aligned batch),
so that a code can be matched, and used, across images:

    code         y_t(x) = f_T([f(t1(x)), f(t2(x))])                                                    (eq. 5)
    invariance   L_inv = NT-Xent(y1, y2), SimCLR's
    equivariance L_equi = NT-Xent(W(y_t(x')) y1, y2): the code comes from the pair's other image x'    (eq. 7)
    code         L_trans = NT-Xent(y_t(x), y_t(x'))                                                    (eq. 9)
    minimise     inv L_inv + equi L_equi + trans L_trans

    python stl.py --dataset stl10 --output stl.ckpt
    python stl.py --dataset stl10 --equi 0 --trans 0 --output inv.ckpt         (SimCLR's loss, all else equal)
    python stl.py --dataset stl10 --equi 0 --trans 0 --batch independent       (SimCLR)

Published: ResNet-18 trained on STL-10, linear classification of STL-10 84.83 %, mean over 11 other data sets 49.49 %
(SimCLR 84.74 and 43.72).

Measured so far at a small scale only (10,000 images of CIFAR-10 as JPEG, 6 epochs, batch 128, seed 0, two CPU cores,
torch 2.15; error of k-NN and linear classification with 5,000 labels): STL .641 and .552, L_inv alone .646 and .564,
--batch independent .627 and .536 with codes that collapse, an untrained encoder .724 and .627. The README has the rest.

Read as follows. All of it goes both ways, 1 to 2 and 2 to 1, and both are in one NT-Xent: of 4N - 1 candidates for
L_equi, of 2N - 1 for the other two. What is compared has passed a projector (512-512-128 for features, 128-128-128 for
codes). Each view is encoded by itself, so batch normalisation sees one view at a time. Paper and released code differ
in trans (0.2 and 0.1) and in f_T (1024-512-512-128 and 1024-128-128): --preset. Shared by a pair are resized crop,
colour jitter and grayscale; flip and blur are each image's own. The blur's kernel, 9 pixels wide at 96, shrinks with
the image. The last batch, which the released code drops, is used, and if odd its last image is left to L_inv alone.
With nin and alexnet, VTE's encoders, f is mu and there is no sigma. Where AugMix stands among the transformations is
not stated: here after grayscale, the last that a pair shares.

Logged to be watched: code_spread (1: codes spread over the sphere, 0: all the same) and hypernetwork_variation (how far
W(t) y and W(t') y are apart: 0 when W ignores t, 1 when they are unrelated).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from common import (
    Run,
    UserError,
    build_encoder,
    check_weights,
    gather,
    load_checkpoint,
    load_encoder,
    non_negative,
    note_once,
    own_rows,
    positive,
    run_command,
    training_parser,
    warp_batch,
)

PRESETS = {  # where the paper and its released code differ: the weight of L_trans, f_T's hidden and output widths
    "code": {"trans": 0.1, "transformation_encoder": (128, 128)},
    "paper": {"trans": 0.2, "transformation_encoder": (512, 512, 128)},
}

# ------------------------------------------------------------------------------------------------- transformations

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def sample_transformations(n, size, generator=None):
    """What a pair shares, drawn as torchvision's RandomResizedCrop(scale=(0.2, 1)), RandomApply(ColorJitter(0.4, 0.4,
    0.4, 0.1), 0.8) and RandomGrayscale(0.2) draw it. size: side in pixels. Returns a dict of tensors on the generator's
    device: box (n, 4) int64, top, left, height, width; factors (n, 4), brightness, contrast, saturation (1: unchanged)
    and hue (turns, 0: unchanged); order (n, 4) int64, in which these are applied; grey (n,) bool."""
    draw = {"generator": generator, "device": generator.device if generator is not None else "cpu"}
    area = size * size * (0.2 + 0.8 * torch.rand(n, 10, **draw))
    aspect = torch.exp((2 * torch.rand(n, 10, **draw) - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width <= size) & (height <= size)
    first = fits.int().argmax(1, keepdim=True)  # the first of ten tries that fits
    width, height = (torch.where(fits.any(1), side.gather(1, first)[:, 0], size) for side in (width, height))
    corner = torch.rand(n, 2, **draw).clamp(max=1 - 1e-6)
    top, left = (corner[:, 0] * (size - height + 1)).floor(), (corner[:, 1] * (size - width + 1)).floor()

    is_hue = torch.arange(4, device=area.device) == HUE
    unchanged = torch.where(is_hue, 0.0, 1.0)
    jitter = (2 * torch.rand(n, 4, **draw) - 1) * torch.where(is_hue, 0.1, 0.4)
    return {
        "box": torch.stack([top, left, height, width], 1).long(),
        "factors": unchanged + torch.where(torch.rand(n, 1, **draw) < 0.8, jitter, 0.0),
        "order": torch.rand(n, 4, **draw).argsort(1),
        "grey": torch.rand(n, **draw) < 0.2,
    }


def unchanged_transformations(n, size):
    """What `sample_transformations` returns, for n images that are left as they are."""
    return {"box": torch.tensor([[0, 0, size, size]]).repeat(n, 1),
            "factors": torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(n, 1),
            "order": torch.arange(4).repeat(n, 1), "grey": torch.zeros(n, dtype=torch.bool)}


def sample_flips_and_blurs(n, generator=None):
    """What each image has of its own: flip (n,) bool with p = 0.5; sigma (n,) of the blur in pixels, U(0.1, 2) with
    p = 0.5 and 0, no blur, otherwise."""
    draw = {"generator": generator, "device": generator.device if generator is not None else "cpu"}
    sigma = 0.1 + 1.9 * torch.rand(n, **draw)
    return {"flip": torch.rand(n, **draw) < 0.5, "sigma": torch.where(torch.rand(n, **draw) < 0.5, sigma, 0.0)}


def align(transformations, n):
    """For ceil(n / 2) pairs -> for n images: images 2i and 2i + 1 share transformation i."""
    return {name: values.repeat_interleave(2, 0)[:n] for name, values in transformations.items()}


def resized_crop(images, index, box, scale=None):
    """(M, 3, S, S) uint8, (N,), (N, 4) -> (N, 3, S, S) float32: each box enlarged to the whole, bilinear. A crop is a
    projective map that sees only its window."""
    size = images.shape[3]
    top, left, height, width = box.float().unbind(1)
    zero = torch.zeros_like(top)
    coefficients = torch.stack([width / size, zero, left, zero, height / size, top, zero, zero], 1)
    return warp_batch(images, index, None, coefficients, scale, window=box)


def grayscale(images):
    """(N, 3, H, W) -> (N, 1, H, W)"""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def adjust_hue(images, turns):
    """images (N, 3, H, W) in [0, 1], turns (N, 1, 1, 1) of the colour circle."""
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    chroma = value - least
    divisor = torch.where(chroma > 0, chroma, 1.0)
    sextant = torch.where(value == red, (green - blue) / divisor,
                          torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor))
    channel = torch.arange(5.0, 0.0, -2.0, device=images.device)[:, None, None]  # 5, 3, 1 for red, green, blue
    distance = (sextant[:, None] + 6 * turns + channel) % 6  # (N, 3, H, W), round the hexagon
    return value[:, None] - chroma[:, None] * torch.minimum(distance, 4 - distance).clamp(0, 1)


def colour_jitter(images, factors, order):
    """images (N, 3, H, W) in [0, 1]; factors, order (N, 4): each image's four adjustments, in its own order."""
    for place in range(4):
        operation = order[:, place, None, None, None]
        factor = factors.gather(1, order[:, place : place + 1])[..., None, None]
        grey = grayscale(images)
        towards = torch.where(operation == CONTRAST, grey.mean((2, 3), keepdim=True), grey)
        towards = torch.where(operation == BRIGHTNESS, 0.0, towards)
        blended = (images * factor + towards * (1 - factor)).clamp(0, 1)
        images = torch.where(operation == HUE, adjust_hue(images, factor), blended)
    return images


def gaussian_blur(images, sigma):
    """images (N, 3, S, S), sigma (N,) in pixels, 0 for none. Reflected at the border; 9 pixels wide at S = 96."""
    radius = max(1, round((9 * images.shape[3] / 96 - 1) / 2))
    x = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (x / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(images.dtype)  # (N, 2 radius + 1)
    for axis in (2, 3):
        padded = F.pad(images, (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0), mode="reflect")
        images = sum(padded.narrow(axis, i, images.shape[axis]) * kernel[:, i, None, None, None] for i in range(len(x)))
    return images


class AlignedAugMix(v2.AugMix):
    """torchvision's AugMix with one set of mixing weights for all images of a call; it draws a set for each."""

    def _sample_dirichlet(self, params):
        return super()._sample_dirichlet(params[:1]).expand_as(params)


def augmix(images, together):
    """images (N, 3, H, W) in [0, 1]; every `together` images that follow each other are mixed alike. torchvision's
    operations take whole grey levels and one set of parameters, so this loops over the pairs."""
    levels, mix = (images * 255).round().to(torch.uint8), AlignedAugMix()
    return torch.cat([mix(pair) for pair in levels.split(together)]).float() / 255


def transform(images, index, shared, own, normalize, dtype=torch.float32, augmix_together=None):
    """One view of a batch: images (M, 3, S, S) uint8, index (N,), shared and own as sampled above for N images,
    normalize = (scale, shift) for images in [0, 1], (3,) each. Returns (N, 3, S, S) of dtype."""
    views = resized_crop(images, index, shared["box"], torch.full_like(normalize[0], 1 / 255))
    views = colour_jitter(views, shared["factors"], shared["order"])
    views = torch.where(shared["grey"][:, None, None, None], grayscale(views), views)
    if augmix_together is not None:
        views = augmix(views, augmix_together)
    views = torch.where(own["flip"][:, None, None, None], views.flip(3), views)
    views = gaussian_blur(views, own["sigma"])
    return (views * normalize[0][:, None, None] + normalize[1][:, None, None]).to(dtype)


# ----------------------------------------------------------------------------------------------------------- model


def mlp(inputs, *widths):
    """Linear layers without biases, batch normalisation and ReLU between."""
    layers = []
    for i, width in enumerate(widths):
        layers += [nn.BatchNorm1d(inputs), nn.ReLU(inplace=True)] if i else []
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

    losses: which of inv, equi, trans to build; inv alone is SimCLR's."""

    def __init__(self, encoder, preset="code", losses=("inv", "equi", "trans"), features=512):
        super().__init__()
        widths = PRESETS[preset]["transformation_encoder"]
        self.encoder = encoder
        self.inv_projector = mlp(features, 512, 128) if "inv" in losses else None
        self.transformation_encoder = mlp(2 * features, *widths) if {"equi", "trans"} & set(losses) else None  # f_T
        self.hypernetwork = Hypernetwork(features, widths[-1]) if "equi" in losses else None
        self.equi_projector = mlp(features, 512, 128) if "equi" in losses else None
        self.trans_projector = mlp(widths[-1], 128, 128) if "trans" in losses else None

    def encode_transformation(self, y1, y2):
        """y_t (eq. 5): features of an image before and after, (N, 512) each -> (N, 128)."""
        return self.transformation_encoder(torch.cat([y1, y2], 1))

    def forward(self, view1, view2):
        y1, y2 = self.encoder(view1), self.encoder(view2)  # (N, 512)
        compared = {}
        if self.inv_projector is not None:
            compared["inv"] = self.inv_projector(y1), self.inv_projector(y2)
        even = len(y1) - len(y1) % 2  # an odd last image has no partner
        if self.transformation_encoder is None or even == 0:
            return compared
        y1, y2 = y1[:even], y2[:even]
        forth, back = self.encode_transformation(y1, y2), self.encode_transformation(y2, y1)
        compared["codes"] = torch.cat([forth, back])
        if self.hypernetwork is not None:
            few = min(16, even - 2)  # images that also get the code of another pair, to see whether W heeds it
            to2, to1, wrong = self.hypernetwork(
                torch.cat([partner(forth), partner(back), forth[2 : few + 2].detach()]),
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
    if not checkpoint["method"].startswith("stl") or config.get("preset") not in tuple(PRESETS):
        raise UserError(f"'{path}' is a checkpoint of {checkpoint['method']}; one of stl.py is needed here")
    losses = [name for name in ("inv", "equi", "trans") if config.get(name)]
    model = STL(load_encoder(checkpoint, path), config["preset"], losses)
    check_weights(model, checkpoint["model"], path, f"STL with the losses {', '.join(losses)}")
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


# ------------------------------------------------------------------------------------------------------------ loss


def nt_xent(a, b, temperature=0.2):
    """Normalised, temperature-scaled cross-entropy (SimCLR's): a_i and b_i are to find each other among all other rows
    of both, and of all processes. a, b: (N, D). Mean over the 2N rows."""
    z = F.normalize(torch.cat([a, b]).float(), dim=1)
    own = own_rows(len(z), z.device)
    scores = z @ gather(z).T / temperature
    scores = scores.scatter(1, own[:, None], -torch.inf)  # nobody is compared with itself
    return F.cross_entropy(scores, own.roll(len(a)))  # i finds i + n, i + n finds i


def stl_loss(compared, weights, temperature=0.2):
    """compared: what STL returns. weights: {inv, equi, trans: number}. Returns the loss and metrics, all scalars."""
    losses = {name: nt_xent(*compared[name], temperature) for name, weight in weights.items() if name in compared}
    metrics = dict(losses)
    with torch.no_grad():
        if "codes" in compared:
            metrics["code_spread"] = 1 - F.normalize(compared["codes"].float(), dim=1).mean(0).square().sum()
        if "right_and_wrong" in compared and len(compared["right_and_wrong"][0]):
            right, wrong = (predicted.float() for predicted in compared["right_and_wrong"])
            power = (right.square() + wrong.square()).sum().clamp(min=1e-12)
            metrics["hypernetwork_variation"] = (right - wrong).square().sum() / power
    return sum(weights[name] * loss for name, loss in losses.items()), metrics


def watch(run, epoch, epochs):
    """Names the three ways in which this training is known to fail."""
    means = run.means()
    if means.get("code_spread", 1) < 0.02:
        note_once("the transformation codes have collapsed to a constant (code_spread near 0): raise --trans")
    if means.get("hypernetwork_variation", 1) < 0.01:
        note_once("the hypernetwork ignores the transformation (hypernetwork_variation near 0): raise --equi")
    if means.get("trans", 1) < 0.05 and epoch <= max(1, epochs // 10):
        note_once("the transformation loss is near zero this early: the codes may carry a shortcut; lower --trans")


# ----------------------------------------------------------------------------------------------------------- train


def train(args):
    weights = {name: getattr(args, name) for name in ("inv", "equi", "trans") if getattr(args, name) > 0}
    run = Run("stl" if len(weights) == 3 else "stl_" + "_".join(weights), args, split="train+unlabeled")
    encoder = build_encoder(args.encoder, args.image_size, probabilistic=False)
    model = run.prepare(STL(encoder, args.preset, weights))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    normalize = run.scale * 255, run.shift  # for images in [0, 1]
    together = 2 if args.batch == "aligned" else 1

    def sample_shared(n, size, generator):
        shared = sample_transformations(-(-n // together), size, generator)
        return align(shared, n) if together == 2 else shared

    def sample_own(n, size, generator):
        return sample_flips_and_blurs(n, generator)

    for epoch in run.epochs(model, optimizer, schedule):
        batches = run.batches(sample_shared, sample_own, sample_shared, sample_own, together=together)
        for source, index, shared1, own1, shared2, own2 in batches:
            views = [transform(source, index, shared, own, normalize, run.dtype, together if args.augmix else None)
                     for shared, own in ((shared1, own1), (shared2, own2))]
            with run.autocast():
                compared = model(*views)
            loss, metrics = stl_loss(compared, weights, args.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            run.step(loss, metrics, len(index))
        watch(run, epoch, args.epochs)
    run.finish(f"python probe.py {args.output} --classifiers knn linear")


def parse_args():
    parser = training_parser(
        "STL: self-supervised transformation learning; with --equi 0 --trans 0 --batch independent, SimCLR.",
        "python stl.py --dataset digits --encoder nin --epochs 20 --batch-size 128 --output stl.ckpt",
        output="stl.ckpt", encoders=("resnet18", "nin", "alexnet"), lr=0.03,
        advice={
            "encoder": "default: resnet18, the paper's; nin is twice as fast on a CPU at 32 pixels",
            "image_size": "images are resized to this side; default: 96 for stl10, as in the paper, 32 for all else",
            "batch_size": "default: 256; each image is compared with all others of its batch, so more is better",
            "lr": "SGD's, at the start; it follows a cosine to 0. 0.03 as in the paper, for batches of 256",
        },
    )
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="code", help="where the paper and its released code differ: --trans "
        "0.2 and f_T 1024-512-512-128 (paper), 0.1 and 1024-128-128 (code, the default)")
    add("--inv", type=non_negative, default=1.0, help="weight of the invariance loss, 0 for none (default: 1)")
    add("--equi", type=non_negative, default=1.0, help="weight of the equivariance loss, 0 for none (default: 1)")
    add("--trans", type=non_negative, help="weight of the transformation loss, 0 for none (default: the preset's)")
    add("--batch", choices=["aligned", "independent"], default="aligned",
        help="independent: every image has transformations of its own, the ablation; codes then match by chance only")
    add("--augmix", action="store_true", help="also AugMix, once for each pair of an aligned batch; slow: one by one")
    add("--temperature", type=positive(float), default=0.2, help="of NT-Xent (default: 0.2)")
    add("--weight-decay", type=non_negative, default=5e-4, help="SGD's (default: 5e-4)")
    args = parser.parse_args()
    args.trans = PRESETS[args.preset]["trans"] if args.trans is None else args.trans
    args.encoder = args.encoder or "resnet18"
    args.image_size = args.image_size or (96 if args.dataset == "stl10" else 32)
    args.batch_size = args.batch_size or 256
    args.probabilistic = False
    if args.batch == "aligned" and args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size} is odd: aligned batches are made of pairs")
    if not args.inv + args.equi + args.trans:
        parser.error("--inv, --equi and --trans are all 0: nothing is left to minimise")
    return args


def main():
    train(parse_args())


if __name__ == "__main__":
    run_command(main)
