"""VTE with the InfoNCE bound: phase two of VTE (Sinaga, Basaruddin & Krisnadhi, ICPRAM 2022, section 3.4).
https://doi.org/10.5220/0010880400003122

A second encoder sees the original image x, and a critic must tell which of the batch's codes z_hat belongs to the code
z that phase one's encoder, now frozen, makes of a transformed image t(x). This maximises the InfoNCE bound of
I(z_hat; z):

    minimise  - log softmax over j of score(z_hat_j, z_i), at j = i,
    z ~ phase one on t(x),    z_hat ~ N(mu(x), sigma(x)^2)

    --critic separated      score = g(z_hat_j)^T h(z_i)      (eq. 14, 20)
    --critic concatenated   score = f([z_hat_j; z_i])        (eq. 13, 19)

    python vte_infonce.py --critic separated --pretrained pt.ckpt --dataset cifar10 --output vte_infonce.ckpt

Measured so far at a small scale only (make reproduce-small: 10,000 images of CIFAR-10 as JPEG, 14 + 8 epochs, batches
of 128, lr 5e-4, two seeds, two CPU cores, torch 2.15): error of k-NN and logistic regression with 5,000 labels,
separated .701 and .702 with z sampled, .663 and .570 with mu; concatenated .688 and .616, .681 and .581; an untrained
encoder .882 and .827, .668 and .624. RESULTS.md has the rest.

Read from the paper as follows. Its eq. 19 and 20 lack the minus sign. The positive pair is in the denominator: only
then is log N - loss a lower bound on the mutual information, at most log N; it is logged in nats as "bound" beside its
"ceiling". f ends in one output and takes 1024 inputs (the table prints 512 for both). Frozen, sampling and log-variance
are as in vte_ba.py; z_std is the standard deviation of z over the batch.

--from-scratch trains both encoders together with no phase one, the ablation of the paper's section 3.2.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from common import (
    Run,
    build_encoder,
    file_path,
    gather,
    is_synchronised,
    load_checkpoint,
    load_encoder,
    note_once,
    own_rows,
    pool_moments,
    processes,
    reparameterize,
    run_command,
    sample_coefficients,
    sample_crops,
    training_parser,
    warp_batch,
)

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # hidden units of pairs held at once: a CPU's caches, 256 MB of a GPU


class PairScores(torch.autograd.Function):
    """scores[i, j] = w . relu(a_j + b_i), for a (N, H), b (M, H), w (H,): (M, N), some rows at a time, with no
    (M, N, H) tensor. The backward pass computes each chunk's hidden layer again."""

    @staticmethod
    def forward(ctx, a, b, w, rows):
        ctx.save_for_backward(a, b, w)
        ctx.rows = rows
        scores = [(a + part[:, None]).relu_().flatten(0, 1) @ w for part in b.split(rows)]  # (rows * N,) each
        return torch.cat(scores).view(len(b), len(a))

    @staticmethod
    def backward(ctx, grad):
        a, b, w = ctx.saved_tensors
        grad_a, grad_b, grad_w = torch.zeros_like(a), [], torch.zeros_like(w)
        for part, g in zip(b.split(ctx.rows), grad.split(ctx.rows), strict=True):
            hidden = (a + part[:, None]).relu_()  # (rows, N, H)
            grad_w += g.flatten() @ hidden.flatten(0, 1)
            gate = hidden.sign_().mul_(g[..., None])  # where the unit is on: the gradient of its pair's score
            grad_a += gate.sum(0)
            grad_b.append(gate.sum(1))
        return grad_a * w, torch.cat(grad_b) * w, grad_w, None


class ConcatenatedCritic(nn.Module):
    """f([z_hat_j; z_i]) for every pair of z_hat (N, 512) and z (N, 512): scores (N, N), row i for z_i.

    `layers` is f itself, to be read and tested as such; forward gives layers(all pairs) without making the pairs. The
    first layer splits, W [z_hat; z] = W1 z_hat + W2 z, and the rest runs over chunks of rows that the backward pass
    computes again, so memory grows with N^2 scores and one chunk. Batch normalisation (AlexNet's head) sees all N^2
    pairs with exact statistics: those of a sum over all pairs are the sums of its parts' statistics (first layer),
    those of the second are pooled over the chunks in a pass of their own."""

    def __init__(self, deep=False, features=512):
        super().__init__()
        if deep:  # the paper's with AlexNet
            self.layers = nn.Sequential(
                nn.Linear(2 * features, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True),
                nn.Linear(2048, 1024), nn.BatchNorm1d(1024), nn.ReLU(inplace=True),
                nn.Linear(1024, 1),
            )
        else:  # the paper's with NIN
            self.layers = nn.Sequential(nn.Linear(2 * features, 512), nn.ReLU(inplace=True), nn.Linear(512, 1))
        self.deep = deep

    def forward(self, z_hat, z):
        first, last = self.layers[0], self.layers[-1]
        a = gather(F.linear(z_hat, first.weight[:, : z_hat.shape[1]]))  # (N, H), of all processes
        b = F.linear(z, first.weight[:, z_hat.shape[1] :], first.bias)  # (N, H)
        rows = max(1, CHUNK.get(a.device.type, 1 << 20) // a.numel())
        real = last.weight.dtype  # the pairs' sums are not rounded to what autocast computes the products in
        a, b, pairs = a.to(real), b.to(real), len(a) * len(b)
        if not self.deep:
            with torch.autocast(a.device.type, enabled=False):
                return PairScores.apply(a, b, last.weight[0], rows) + last.bias

        _, norm1, _, second, norm2, _, _ = self.layers
        sums = a.mean(0) + b.mean(0), a.var(0, unbiased=False) + b.var(0, unbiased=False)
        scale, shift = batch_norm_affine(norm1, lambda: sums, pairs)
        a, b = a * scale, b * scale + shift

        def hidden(part):  # second pre-activation of the pairs of some z_i with all z_hat_j: (rows * N, 1024)
            return second((a + part[:, None]).relu().flatten(0, 1)).to(real)

        def moments(part):
            units = hidden(part)
            return torch.stack([units.mean(0), units.var(0, unbiased=False)])

        def pooled():
            shares = [len(part) / len(b) for part in parts]
            chunks = [recompute(moments, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
            mean = sum(share * chunk[0] for share, chunk in zip(shares, chunks, strict=True))
            variance = sum(share * (chunk[1] + (chunk[0] - mean).square())
                           for share, chunk in zip(shares, chunks, strict=True))
            return mean, variance

        parts = b.split(rows)
        scale2, shift2 = batch_norm_affine(norm2, pooled, pairs)

        def scores(part):
            units = (hidden(part) * scale2 + shift2).relu()
            with torch.autocast(a.device.type, enabled=False):
                return last(units).view(len(part), len(a))

        return torch.cat([recompute(scores, p, use_reentrant=False, preserve_rng_state=False) for p in parts])


def batch_norm_affine(norm, statistics, count):
    """(scale, shift) by which `norm` acts on its input: in training from `statistics()`, the mean and biased variance
    of the input's `count` rows, which also update the running statistics; else from the running statistics."""
    if norm.training:
        mean, variance = statistics()
        if is_synchronised(norm):
            mean, variance, count = *pool_moments(mean, variance), count * processes()[1]
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
            norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var), norm.momentum)
            norm.num_batches_tracked += 1
    else:
        mean, variance = norm.running_mean, norm.running_var
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale, norm.bias - mean * scale


class SeparatedCritic(nn.Module):
    """g(z_hat_j)^T h(z_i) for every pair of z_hat (N, 512) and z (N, 512): scores (N, N), row i for z_i."""

    def __init__(self, deep=False, features=512):
        super().__init__()

        def head():
            if deep:  # the paper's with AlexNet
                return nn.Sequential(
                    nn.Linear(features, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True),
                    nn.Linear(2048, 1024), nn.BatchNorm1d(1024), nn.ReLU(inplace=True),
                    nn.Linear(1024, features),
                )
            return nn.Sequential(nn.Linear(features, 2048), nn.ReLU(inplace=True), nn.Linear(2048, features))

        self.g, self.h = head(), head()

    def forward(self, z_hat, z):
        real = self.h[0].weight.dtype
        h, g = self.h(z).to(real), gather(self.g(z_hat).to(real))
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would round scores in the hundreds to units
            return h @ g.T


class VTEInfoNCE(nn.Module):
    """Images and transformed images, (N, 3, S, S) each -> scores (N, N), z and log-variance of z_hat, (N, 512) each.

    phase_one: the encoder of transformed images; frozen unless from_scratch. critic: a module (z_hat, z) -> scores."""

    def __init__(self, encoder, phase_one, critic, from_scratch=False):
        super().__init__()
        self.encoder = encoder
        self.phase_one = phase_one.requires_grad_(from_scratch)
        self.from_scratch = from_scratch
        self.critic = critic
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.phase_one.train(mode and self.from_scratch)  # frozen, its running statistics too, whatever the rest does
        return self

    def forward(self, images, transformed):
        z = reparameterize(*self.phase_one(transformed))  # (N, 512)
        mu, logvar = self.encoder(images)
        z_hat = reparameterize(mu, logvar)  # (N, 512)
        return self.critic(z_hat, z).float(), z, logvar


def vte_infonce_loss(scores, z, logvar):
    """- log softmax of each row at its diagonal element, mean over the batch (VTE eq. 19, 20). scores: (N, N), row i
    for z_i; z, logvar: (N, 512). Of several processes each has its own rows, over the z_hat of all: (N, K N), the
    diagonal where `gather` puts its own. Returns the loss and metrics, all scalars, in nats."""
    loss = F.cross_entropy(scores, own_rows(len(scores), scores.device))
    ceiling = torch.full_like(loss, math.log(scores.shape[1]))
    metrics = {"bound": ceiling - loss, "ceiling": ceiling, "logvar": logvar.mean(), "z_std": z.std(0).mean()}
    return loss, metrics


def train(args):
    checkpoint = None if args.from_scratch else load_checkpoint(args.pretrained, "predictive_transform")
    name = f"vte_infonce_{args.critic}" + ("_from_scratch" if args.from_scratch else "")
    run = Run(name, args, pretrained=checkpoint)
    encoder = build_encoder(args.encoder, args.image_size)
    if args.from_scratch:
        phase_one = build_encoder(args.encoder, args.image_size)
    else:
        phase_one = load_encoder(checkpoint, args.pretrained, probabilistic=True)
    deep = args.encoder == "alexnet"
    critic = ConcatenatedCritic(deep) if args.critic == "concatenated" else SeparatedCritic(deep)
    model = run.prepare(VTEInfoNCE(encoder, phase_one, critic, args.from_scratch))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.lr, fused=True)  # no weight decay, no schedule

    for _ in run.epochs(model, optimizer):
        for source, index, crops, coefficients in run.batches(sample_crops, sample_coefficients):
            images = warp_batch(source, index, crops, None, run.scale, run.shift, run.dtype)
            transformed = warp_batch(source, index, crops, coefficients, run.scale, run.shift, run.dtype)
            with run.autocast():
                scores, z, logvar = model(images, transformed)
            loss, metrics = vte_infonce_loss(scores, z, logvar)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            run.step(loss, metrics, len(index))
        means = run.means()
        if means["bound"] > 0.99 * means["ceiling"]:
            note_once(f"the bound has reached its ceiling, log N = {means['ceiling']:.2f} nats: batches of "
                      f"{args.batch_size} cannot measure more; a larger --batch-size can")
    run.finish(" ".join(["python probe.py", *filter(None, [args.pretrained]), args.output]))


def parse_args():
    parser = training_parser(
        "VTE with the InfoNCE bound (phase two): tell which code belongs to phase one's code of the transformed image.",
        "python vte_infonce.py --pretrained pt.ckpt --dataset digits --epochs 20 --lr 5e-4 --output vte_infonce.ckpt",
        output="vte_infonce.ckpt",
    )
    add = parser.add_argument
    add("--critic", choices=["separated", "concatenated"], default="separated",
        help="separated: one product of two heads, fast; concatenated: an MLP on every pair (default: %(default)s)")
    add("--pretrained", type=file_path, metavar="CKPT",
        help="checkpoint of predictive_transform.py; data set, encoder and sizes are taken from it")
    add("--from-scratch", action="store_true", help="the ablation: no phase one, both encoders train together")
    args = parser.parse_args()
    if args.pretrained is None and not args.from_scratch:
        parser.error("--pretrained is needed, the checkpoint of phase one: first run `python predictive_transform.py "
                     f"--dataset {args.dataset or 'cifar10'} --output pt.ckpt`")
    if args.pretrained and args.from_scratch:
        parser.error("--from-scratch has no phase one: leave out --pretrained")
    return args


def main():
    train(parse_args())


if __name__ == "__main__":
    run_command(main)
