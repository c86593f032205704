"""AVT, autoencoding variational transformations, as VTE's baseline (Sinaga, Basaruddin & Krisnadhi, ICPRAM 2022).
https://doi.org/10.5220/0010880400003122; the method: Qi et al., ICCV 2019, https://arxiv.org/abs/1903.10863

One encoder sees the original image x and the transformed image t(x), and what t did must be told from both codes: it
maximises the Barber-Agakov bound of I(t; z | z_hat), the second term of eq. 4, which with a unit-variance decoder is

    minimise  1/2 || t - D([z; z_hat]) ||^2,    z ~ N(mu(t(x)), sigma(t(x))^2),    z_hat ~ N(mu(x), sigma(x)^2),

where t are the 8 normalised coefficients of a random projective map (common.transformation_target).

    python avt.py --dataset cifar10 --output avt.ckpt

Measured so far at a small scale only (make reproduce-small: 10,000 images of CIFAR-10 as JPEG, 14 epochs in batches of
64, lr 5e-4, two seeds, two CPU cores, torch 2.15): squared error .42; error of k-NN and logistic regression with 5,000
labels .763 and .686 with z sampled, .756 and .581 with mu; an untrained encoder .882 and .827, .668 and .624.
RESULTS.md has the rest.

This is the AVT that VTE's tables report: VTE's encoder, heads, optimiser and transformations, so that its rows differ
in the objective alone. What lies below 0.577 of the logged squared error was learned beyond the rotation; z_std is the
standard deviation of z over the batch.

AVT as published in 2019 is another model and not in this script: behind a flag it would be longer than the method
itself. By its paper and the code its authors released, it differs in
  - the encoder: two blocks of Network-in-Network whose feature map of 192 channels is the mean, and a 1x1 convolution
    with batch normalisation of that map the log-variance: its latent code is convolutional;
  - the noise: 0.001 sigma epsilon is added to the mean, a factor that VTE does not mention and is not used here;
  - the decoder: two more blocks and global average pooling for each image, then one linear map of both to t and one to
    a log-variance of t (divided by 1000); the loss is logvar + (t - mu)^2 / (exp(logvar) + 0.0001), summed;
  - the optimiser: SGD, Nesterov momentum 0.9, weight decay 5e-4, batch 512, 4,500 epochs; the learning rate is 0.001
    to epoch 50, then 0.005, a fifth of what it was from each of 3240, 3480, 3640 and 3800, linearly falling from 4000;
  - the evaluation: a convolutional classifier on the frozen map of the second block, 7.75 % error on CIFAR-10.
"""

import torch
from torch import nn

from common import (
    CONSTANT_PREDICTOR_ERROR,
    ROTATION_PREDICTOR_ERROR,
    Run,
    build_encoder,
    reparameterize,
    run_command,
    sample_coefficients,
    sample_crops,
    training_parser,
    transformation_target,
    warp_batch,
)


class AVT(nn.Module):
    """Images and transformed images, (N, 3, S, S) each -> predicted t (N, 8), z and its log-variance, (N, 512) each."""

    def __init__(self, encoder, features=512):
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Sequential(
            nn.Linear(2 * features, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True),
            nn.Linear(2048, 1024), nn.BatchNorm1d(1024), nn.ReLU(inplace=True),
            nn.Linear(1024, 8),
        )

    def forward(self, images, transformed):
        z_hat = reparameterize(*self.encoder(images))  # (N, 512)
        mu, logvar = self.encoder(transformed)
        z = reparameterize(mu, logvar)  # (N, 512)
        return self.decoder(torch.cat([z, z_hat], 1)).float(), z, logvar


def avt_loss(prediction, t, z, logvar):
    """1/2 || t - D([z; z_hat]) ||^2, mean over the batch (VTE eq. 16, given z_hat too). prediction, t: (N, 8);
    z, logvar: (N, 512). Returns the loss and metrics, all scalars."""
    squared_error = (t - prediction).square().sum(1).mean()
    metrics = {"squared_error": squared_error, "logvar": logvar.mean(), "z_std": z.std(0).mean()}
    return 0.5 * squared_error, metrics


def train(args):
    yardsticks = {"constant_predictor": CONSTANT_PREDICTOR_ERROR, "rotation_only": ROTATION_PREDICTOR_ERROR}
    run = Run("avt", args, yardsticks=yardsticks)
    model = run.prepare(AVT(build_encoder(args.encoder, args.image_size)))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)  # no weight decay, no schedule

    for _ in run.epochs(model, optimizer):
        for source, index, crops, coefficients in run.batches(sample_crops, sample_coefficients):
            t = transformation_target(coefficients, run.size)
            images = warp_batch(source, index, crops, None, run.scale, run.shift, run.dtype)
            transformed = warp_batch(source, index, crops, coefficients, run.scale, run.shift, run.dtype)
            with run.autocast():
                prediction, z, logvar = model(images, transformed)
            loss, metrics = avt_loss(prediction, t, z, logvar)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            run.step(loss, metrics, len(index))
    run.finish(f"python probe.py {args.output}")


def parse_args():
    parser = training_parser(
        "AVT (VTE's baseline): predict the transformation from the codes of the original and the transformed image.",
        "python avt.py --dataset digits --epochs 20 --lr 5e-4 --output avt.ckpt",
        output="avt.ckpt",
    )
    return parser.parse_args()


def main():
    train(parse_args())


if __name__ == "__main__":
    run_command(main)
