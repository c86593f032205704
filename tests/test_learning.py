"""Small real runs, fixed seed: each method on real digits under real transformations, with a small encoder so that they
last seconds. Its loss falls, and five nearest neighbours on sampled codes err much less than with the untrained
encoder, by margins that an untrained encoder or a loss of the wrong sign fails."""

import copy

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from avt import AVT, avt_loss
from common import image_statistics, load_images, reparameterize
from minter_warp import (
    normalization,
    reference_errors,
    sample_coefficients,
    sample_crops,
    transformation_target,
    warp_batch,
)
from predictive_transform import PredictiveTransform, predictive_transform_loss
from vte_ba import VTEBarberAgakov, vte_ba_loss
from vte_infonce import ConcatenatedCritic, SeparatedCritic, VTEInfoNCE, vte_infonce_loss

SIZE, BATCH, WINDOW = 16, 64, 10
CONSTANT_PREDICTOR_ERROR = reference_errors(SIZE)["constant_predictor"]


class SmallEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
                                   nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten())
        self.mu, self.logvar = nn.Linear(64 * 16, 512), nn.Linear(64 * 16, 512)

    def forward(self, images):
        hidden = self.trunk(images)
        return self.mu(hidden), self.logvar(hidden)


@pytest.fixture(scope="module")
def digits():
    images, labels, *_ = load_images("digits", "train", image_size=SIZE)
    test_images, test_labels, *_ = load_images("digits", "test", image_size=SIZE)
    scale_and_shift = normalization(*image_statistics("digits", images))
    return images, labels, test_images, test_labels, scale_and_shift


@torch.no_grad()
def knn_error(encoder, digits):
    """Of sampled codes of untransformed images, batch normalisation calibrated on them as for an untrained encoder."""
    images, labels, test_images, test_labels, (scale, shift) = digits
    encoder = copy.deepcopy(encoder).train()
    for module in encoder.modules():
        module.momentum = None
    encoder(warp_batch(images, torch.arange(len(images)), scale=scale, shift=shift))
    encoder.eval()
    torch.manual_seed(0)
    train, test = (reparameterize(*encoder(warp_batch(i, torch.arange(len(i)), scale=scale, shift=shift)))
                   for i in (images, test_images))
    return 1 - KNeighborsClassifier(5).fit(train.numpy(), labels.numpy()).score(test.numpy(), test_labels.numpy())


def train(model, loss_of, digits, steps=80):
    """With little noise to begin with, and one cycle of the learning rate, so that a short run is enough. Returns the
    mean loss of the first and of the last steps, and the k-NN error before and after."""
    images, _, _, _, (scale, shift) = digits
    generator = torch.Generator().manual_seed(0)
    before = knn_error(model.encoder, digits)
    nn.init.constant_(model.encoder.logvar.bias, -8.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, cycle_momentum=False)
    losses = []
    torch.manual_seed(0)
    for _ in range(steps):
        index = torch.randint(0, len(images), (BATCH,), generator=generator)
        crops, coefficients = sample_crops(BATCH, SIZE, generator), sample_coefficients(BATCH, SIZE, generator)
        original = warp_batch(images, index, crops, None, scale, shift)
        transformed = warp_batch(images, index, crops, coefficients, scale, shift)
        loss = loss_of(model, original, transformed, transformation_target(coefficients, SIZE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return (sum(losses[:WINDOW]) / WINDOW, sum(losses[-WINDOW:]) / WINDOW, before, knn_error(model.encoder, digits))


def loss_of(model, original, transformed, t):
    if isinstance(model, PredictiveTransform):
        prediction, z, logvar = model(transformed)
        return predictive_transform_loss(prediction, t, z, logvar)[0]
    if isinstance(model, AVT):
        prediction, z, logvar = model(original, transformed)
        return avt_loss(prediction, t, z, logvar)[0]
    if isinstance(model, VTEInfoNCE):
        return vte_infonce_loss(*model(original, transformed))[0]
    return vte_ba_loss(*model(original, transformed, t))[0]


@pytest.fixture(scope="module")
def phase_one(digits):
    """What follows predicts its codes."""
    torch.manual_seed(0)
    model = PredictiveTransform(SmallEncoder())
    return model, train(model, loss_of, digits, steps=260)


def test_predictive_transform_learns(phase_one, digits):
    """Its probe is the transformation itself, of images it has not seen: better than the best constant."""
    model, (first, last, _, _) = phase_one
    assert 0 < last < 0.8 * first
    _, _, test_images, _, (scale, shift) = digits
    n, generator = 4 * len(test_images), torch.Generator().manual_seed(1)
    coefficients = sample_coefficients(n, SIZE, generator)
    transformed = warp_batch(test_images, torch.arange(n) % len(test_images), None, coefficients, scale, shift)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        prediction, z, logvar = model(transformed)
    metrics = predictive_transform_loss(prediction, transformation_target(coefficients, SIZE), z, logvar)[1]
    assert metrics["squared_error"] < 0.95 * CONSTANT_PREDICTOR_ERROR


def test_avt_learns(digits):
    torch.manual_seed(0)
    first, last, before, after = train(AVT(SmallEncoder()), loss_of, digits)
    assert 0 < last < 0.5 * first and last < 0.6 * CONSTANT_PREDICTOR_ERROR / 2 and after < before - 0.25


@pytest.mark.parametrize("make, falls_to", [
    (lambda encoder, frozen: VTEBarberAgakov(encoder, frozen), 0.92),  # the rest is what no one can tell without t,
    (lambda encoder, frozen: VTEBarberAgakov(encoder, frozen, steerable=True), 0.8),  # as this one can
    (lambda encoder, frozen: VTEInfoNCE(encoder, frozen, SeparatedCritic()), 0.6),
    (lambda encoder, frozen: VTEInfoNCE(encoder, frozen, ConcatenatedCritic()), 0.85),
], ids=["ba", "steerable", "separated", "concatenated"])
def test_phase_two_learns(make, falls_to, phase_one, digits):
    torch.manual_seed(1)
    model = make(SmallEncoder(), copy.deepcopy(phase_one[0].encoder))
    first, last, before, after = train(model, loss_of, digits)
    assert 0 < last < falls_to * first and after < before - 0.3
