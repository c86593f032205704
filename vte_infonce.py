"""VTE with the InfoNCE bound: phase two of VTE (Sinaga, Basaruddin & Krisnadhi, ICPRAM 2022, section 3.4).
https://doi.org/10.5220/0010880400003122

A second encoder sees the original image x. A critic must tell which of the batch's codes z_hat belongs to the code z
that phase one's encoder, now frozen, makes of a transformed image t(x). It maximises the InfoNCE bound of I(z_hat; z):

    minimise  - log softmax over j of score(z_hat_j, z_i), at j = i,
    z ~ phase one on t(x),    z_hat ~ N(mu(x), sigma(x)^2)

    --critic separated      score = g(z_hat_j)^T h(z_i)      (eq. 14, 20)
    --critic concatenated   score = f([z_hat_j; z_i])        (eq. 13, 19)

    python vte_infonce.py --critic separated --pretrained pt.ckpt --dataset cifar10 --output vte_infonce.ckpt

Measured (CIFAR-10 as JPEG, 150 and 110 of 200 epochs, seed 0, an H200): k-NN error with 50,000 labels .400 (separated)
and .434 (concatenated) with mu; the paper .429 and .448; an untrained encoder .588.

Deviations and readings:
- Eq. 19 and 20 lack the minus sign.
- The positive pair is in the denominator. Only then is log N - loss a lower bound on I(z_hat; z), at most log N.
- f takes 1024 inputs and ends in one output. The paper's table prints 512 for both, and 2048 between with NIN, where
  the authors' code has 512.
- Frozen, sampling, log-variance, --from-scratch and --phase-one random: as in vte_ba.py.
Logged: bound, in nats, beside its ceiling log N for a full batch; logvar of z_hat and z_std of z, as in vte_ba.py.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from common import (
    Run,
    build_encoder,
    gather,
    gaussian,
    load_checkpoint,
    load_encoder,
    reparameterize,
    rows_of_this_rank,
    run_command,
    training_parser,
    untrained_phase_one,
)
from minter_warp import sample_coefficients, sample_crops, warp_batch

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # hidden units of pairs held at once: a CPU's caches, 256 MB of a GPU


class ConcatenatedCritic(nn.Module):
    """f([z_hat_j; z_i]) for every pair of z_hat (N, 512) and z (N, 512): scores (N, N), row i for z_i.

    `layers` is f, and forward gives layers(all pairs). Its first layer splits, W [z_hat; z] = W1 z_hat + W2 z, so no
    (N^2, 1024) tensor is made. Each chunk of rows is computed again in the backward pass, so memory holds one chunk and
    N^2 scores. AlexNet's head holds all: batch normalisation needs the statistics of all N^2 pairs."""

    def __init__(self, deep=False, features=512):
        super().__init__()
        self.deep = deep
        if deep:  # the paper's with AlexNet
            self.layers = nn.Sequential(
                nn.Linear(2 * features, 2048), nn.BatchNorm1d(2048), nn.ReLU(),
                nn.Linear(2048, 1024), nn.BatchNorm1d(1024), nn.ReLU(),
                nn.Linear(1024, 1),
            )
        else:  # the paper's with NIN
            self.layers = nn.Sequential(nn.Linear(2 * features, 512), nn.ReLU(), nn.Linear(512, 1))

    def forward(self, z_hat, z):
        first, between, last = self.layers[0], self.layers[1:-1], self.layers[-1]
        a = gather(F.linear(z_hat, first.weight[:, : z_hat.shape[1]]))  # (N, H), of all ranks
        b = F.linear(z, first.weight[:, z_hat.shape[1] :], first.bias)  # (N, H)
        a, b = a.to(last.weight), b.to(last.weight)  # autocast must not round the sums

        def scores(part):  # (rows, H) -> (rows, N)
            hidden = between((a + part[:, None]).flatten(0, 1))
            with torch.autocast(a.device.type, enabled=False):
                return last(hidden.to(last.weight)).view(len(part), len(a))

        if self.deep:
            return scores(b)
        rows = max(1, CHUNK.get(a.device.type, 1 << 20) // a.numel())
        return torch.cat([recompute(scores, part, use_reentrant=False, preserve_rng_state=False)
                          for part in b.split(rows)])


class SeparatedCritic(nn.Module):
    """g(z_hat_j)^T h(z_i) for every pair of z_hat (N, 512) and z (N, 512): scores (N, N), row i for z_i."""

    def __init__(self, deep=False, features=512):
        super().__init__()

        def head():
            if deep:  # the paper's with AlexNet
                return nn.Sequential(
                    nn.Linear(features, 2048), nn.BatchNorm1d(2048), nn.ReLU(),
                    nn.Linear(2048, 1024), nn.BatchNorm1d(1024), nn.ReLU(),
                    nn.Linear(1024, features),
                )
            return nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, features))

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
        self.phase_one.train(mode and self.from_scratch)  # frozen: its running statistics too
        return self

    def forward(self, images, transformed):
        z = reparameterize(*gaussian(self.phase_one(transformed)))  # (N, 512)
        mu, logvar = gaussian(self.encoder(images))
        z_hat = reparameterize(mu, logvar)  # (N, 512)
        return self.critic(z_hat, z).float(), z, logvar


def vte_infonce_loss(scores, z, logvar):
    """- log softmax of each row at its diagonal element, mean over the batch (VTE eq. 19, 20). scores: (N, N), row i
    for z_i; z, logvar: (N, 512). Each of K ranks has its own rows, over the z_hat of all: (N, K N). Returns the loss
    and metrics, all scalars, in nats."""
    loss = F.cross_entropy(scores, rows_of_this_rank(len(scores), scores.device))
    metrics = {"bound": math.log(scores.shape[1]) - loss, "logvar": logvar.mean(), "z_std": z.std(0).mean()}
    return loss, metrics


def train(args):
    checkpoint = None if args.pretrained is None else load_checkpoint(args.pretrained, "predictive_transform")
    name = f"vte_infonce_{args.critic}" + ("_from_scratch" if args.from_scratch else "")
    run = Run(name + "_random_phase_one" * (args.phase_one == "random"), args, pretrained=checkpoint)
    run.constants["ceiling"] = math.log(args.batch_size)  # of the bound
    encoder = build_encoder(args.encoder, args.image_size)
    if args.from_scratch:
        phase_one = build_encoder(args.encoder, args.image_size)
    elif args.phase_one == "random":
        phase_one = untrained_phase_one(run)
    else:
        phase_one = load_encoder(checkpoint, args.pretrained, probabilistic=True)
    deep = args.encoder == "alexnet"
    critic = ConcatenatedCritic(deep) if args.critic == "concatenated" else SeparatedCritic(deep)
    model = run.prepare(VTEInfoNCE(encoder, phase_one, critic, args.from_scratch))
    optimizer = run.optimizer(model)  # Adam, no weight decay

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
        if run.means()["bound"] > 0.99 * run.constants["ceiling"]:
            warnings.warn(f"the bound has reached its ceiling, log N = {run.constants['ceiling']:.2f} nats: batches of "
                          f"{args.batch_size} cannot measure more; a larger --batch-size can", stacklevel=1)
    run.finish("probe.py", *filter(None, [args.pretrained]), args.output, same=("data_dir",))


def parse_args():
    parser = training_parser(
        "VTE with the InfoNCE bound (phase two): tell which code belongs to phase one's code of the transformed image.",
        "python vte_infonce.py --pretrained pt.ckpt --dataset digits --epochs 20 --lr 5e-4 --output vte_infonce.ckpt",
        output="vte_infonce.ckpt",
    )
    add = parser.add_argument_group("phase two").add_argument
    add("--critic", choices=["separated", "concatenated"], default="separated",
        help="separated: one product of two heads, fast; concatenated: an MLP on every pair")
    add("--pretrained", metavar="CKPT",
        help="checkpoint of predictive_transform.py; data set, encoder and sizes are taken from it")
    add("--phase-one", choices=["trained", "random"], default="trained",
        help="random, a control of ours: an encoder that was never trained, without noise, in place of --pretrained")
    add("--from-scratch", action="store_true", help="the ablation: no phase one, both encoders train together")
    args = parser.parse_args()
    without = args.from_scratch or args.phase_one == "random"
    if args.pretrained is None and not without:
        parser.error("--pretrained is needed, the checkpoint of phase one: first run `python predictive_transform.py "
                     f"--dataset {args.dataset or 'cifar10'} --output pt.ckpt`")
    if args.pretrained and without:
        parser.error("--from-scratch and --phase-one random have no trained phase one: leave out --pretrained")
    if args.from_scratch and args.phase_one == "random":
        parser.error("--from-scratch trains phase one along: leave out --phase-one")
    return args


def main():
    train(parse_args())


if __name__ == "__main__":
    run_command(main)
