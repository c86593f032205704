"""Predictive transformation: phase one of VTE (Sinaga, Basaruddin & Krisnadhi, ICPRAM 2022, section 3.2).
https://doi.org/10.5220/0010880400003122

The encoder sees only the transformed image t(x) and must keep what t did. It maximises the Barber-Agakov bound of
I(t; z), which with a unit-variance decoder is (eq. 6, 16)

    minimise  1/2 || t - D(z) ||^2,    z ~ N(mu(t(x)), sigma(t(x))^2),

where t are the 8 normalised coefficients of a random projective map (minter_warp.transformation_target).

    python predictive_transform.py --dataset cifar10 --output pt.ckpt

Measured (CIFAR-10 as JPEG, 200 epochs, seed 0, 3 minutes of an H200): squared error 1.56; k-NN error with 50,000 labels
.461. An untrained encoder has .588 with mu, the paper .527.

Deviations and readings:
- The transformation is AVT's, which the paper says it uses: four corners that move independently.
- The decoder ends in 8 outputs. The paper's Table 5 prints 512, which cannot be compared with t. The third layer and
  batch normalisation are those of the authors' code; Table 5 has 512-2048-512.
- The authors' code normalises STL-10 with CIFAR-10's statistics; here it has its own.
- What the paper calls log sigma is a log-variance. No KL term holds it: the mean is logged as "logvar".
Logged beside it: z_std, the standard deviation of z over the batch. To compare with: the squared errors of a constant,
of the outline without its top, and of the rotation alone (minter_warp.reference_errors).
"""

from torch import nn

from common import Run, build_encoder, gaussian, reparameterize, run_command, training_parser
from minter_warp import reference_errors, sample_coefficients, sample_crops, transformation_target, warp_batch


class PredictiveTransform(nn.Module):
    """Transformed images (N, 3, S, S) -> predicted t (N, 8), z and its log-variance, (N, 512) each."""

    def __init__(self, encoder, features=512):
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Sequential(
            nn.Linear(features, 2048), nn.BatchNorm1d(2048), nn.ReLU(),
            nn.Linear(2048, 1024), nn.BatchNorm1d(1024), nn.ReLU(),
            nn.Linear(1024, 8),
        )

    def forward(self, transformed):
        mu, logvar = gaussian(self.encoder(transformed))
        z = reparameterize(mu, logvar)  # (N, 512)
        return self.decoder(z).float(), z, logvar


def predictive_transform_loss(prediction, t, z, logvar):
    """1/2 || t - D(z) ||^2, mean over the batch (VTE eq. 16 without its constant). prediction, t: (N, 8);
    z, logvar: (N, 512). Returns the loss and metrics, all scalars."""
    squared_error = (t - prediction).square().sum(1).mean()
    metrics = {"squared_error": squared_error, "logvar": logvar.mean(), "z_std": z.std(0).mean()}
    return 0.5 * squared_error, metrics


def train(args):
    run = Run("predictive_transform", args, constants=reference_errors())
    model = run.prepare(PredictiveTransform(build_encoder(args.encoder, args.image_size)))
    optimizer = run.optimizer(model)  # Adam, no weight decay

    for _ in run.epochs(model, optimizer):
        for source, index, crops, coefficients in run.batches(sample_crops, sample_coefficients):
            t = transformation_target(coefficients, run.size)
            transformed = warp_batch(source, index, crops, coefficients, run.scale, run.shift, run.dtype)
            with run.autocast():
                prediction, z, logvar = model(transformed)
            loss, metrics = predictive_transform_loss(prediction, t, z, logvar)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            run.step(loss, metrics, len(index))
    same = ("data_dir", "recipe", "epochs", "batch_size", "lr", "limit", "seed")
    run.finish("vte_ba.py", "--pretrained", args.output, same=same)


def parse_args():
    parser = training_parser(
        "Predictive transformation (VTE, phase one): predict the transformation from the transformed image alone.",
        "python predictive_transform.py --dataset digits --epochs 20 --lr 5e-4 --output pt.ckpt",
        output="pt.ckpt",
    )
    return parser.parse_args()


def main():
    train(parse_args())


if __name__ == "__main__":
    run_command(main)
