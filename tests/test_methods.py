"""Each method's loss against its equation, and who is trained by it."""

import copy

import pytest
import torch

import predictive_transform
import vte_ba
from common import AlexNet
from predictive_transform import PredictiveTransform, predictive_transform_loss
from vte_ba import VTEBarberAgakov, vte_ba_loss


def tiny_batch(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.randn(n, 3, 32, 32, generator=generator)


def test_predictive_transform_loss_is_equation_16():
    """-log N(t; prediction, I) with its constant (8 / 2) log 2 pi taken off, averaged over the batch."""
    generator = torch.Generator().manual_seed(0)
    prediction, t = torch.randn(16, 8, generator=generator).double(), torch.randn(16, 8, generator=generator).double()
    loss, metrics = predictive_transform_loss(prediction, t, torch.full((16, 512), -0.25).double())
    normal = torch.distributions.MultivariateNormal(prediction, torch.eye(8, dtype=torch.float64))
    expected = -normal.log_prob(t).mean() - 4 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert metrics["squared_error"].item() == pytest.approx(2 * expected.item(), abs=1e-12)
    assert metrics["logvar"].item() == -0.25


def test_vte_ba_loss_is_equation_18():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(16, 512, generator=generator, dtype=torch.float64)
    z = torch.randn(16, 512, generator=generator, dtype=torch.float64)
    loss, metrics = vte_ba_loss(prediction, z, torch.zeros(16, 512))
    normal = torch.distributions.Normal(prediction, 1.0)
    expected = -normal.log_prob(z).sum(1).mean() - 256 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert vte_ba_loss(z, z, z)[1]["explained"] == 1  # a perfect prediction explains all of z's variance,
    mean = z.mean(0).expand_as(z)
    assert vte_ba_loss(mean, z, z)[1]["explained"].abs() < 1e-12  # its mean none of it
    assert metrics["explained"] < 0


def test_heads_have_the_papers_shapes():
    def widths(head):
        return [(m.in_features, m.out_features) for m in head if isinstance(m, torch.nn.Linear)]

    def norms(head):
        return sum(isinstance(m, torch.nn.BatchNorm1d) for m in head)

    decoder = PredictiveTransform(AlexNet()).decoder
    assert widths(decoder) == [(512, 2048), (2048, 1024), (1024, 8)] and norms(decoder) == 2
    shallow = VTEBarberAgakov(AlexNet(), AlexNet()).decoder
    assert widths(shallow) == [(512, 2048), (2048, 512)] and norms(shallow) == 0
    deep = VTEBarberAgakov(AlexNet(), AlexNet(), deep_decoder=True).decoder
    assert widths(deep) == [(512, 2048), (2048, 1024), (1024, 512)] and norms(deep) == 2


def test_z_is_sampled_in_training_and_in_evaluation():
    model = PredictiveTransform(AlexNet()).eval()
    images, _ = tiny_batch()
    with torch.no_grad():
        assert not torch.equal(model(images)[0], model(images)[0])


def frozen_state(model):
    return {name: value.clone() for name, value in model.phase_one.state_dict().items()}


def test_phase_one_stays_bit_identical_and_in_eval_mode():
    from common import NIN

    torch.manual_seed(0)
    model = VTEBarberAgakov(NIN(), NIN())
    container = torch.nn.ModuleList([model])  # a parent module that is switched to train() switches its children
    before = frozen_state(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for step in range(3):
        container.train()
        assert not any(module.training for module in model.phase_one.modules())
        assert model.encoder.training and model.decoder.training
        prediction, z, logvar = model(*tiny_batch(seed=step))
        assert not z.requires_grad
        optimizer.zero_grad()
        vte_ba_loss(prediction, z, logvar)[0].backward()
        optimizer.step()
    after = model.phase_one.state_dict()
    assert any(name.endswith("running_mean") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert container.eval() and not model.encoder.training


def test_gradients_reach_exactly_the_parameters_that_train():
    torch.manual_seed(0)
    images, transformed = tiny_batch()
    model = VTEBarberAgakov(AlexNet(), AlexNet())
    vte_ba_loss(*model(images, transformed))[0].backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert reached != name.startswith("phase_one."), name
    model = PredictiveTransform(AlexNet())
    prediction, logvar = model(transformed)
    predictive_transform_loss(prediction, torch.randn(8, 8), logvar)[0].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_z_comes_from_the_transformed_image_and_z_hat_from_the_original():
    torch.manual_seed(0)
    model = VTEBarberAgakov(AlexNet(), AlexNet()).eval()
    for encoder in (model.encoder, model.phase_one):  # no noise: both codes are their means
        torch.nn.init.zeros_(encoder.logvar.weight)
        torch.nn.init.constant_(encoder.logvar.bias, -100.0)
    images, transformed = tiny_batch()
    prediction, z, _ = model(images, transformed)
    assert torch.allclose(z, model.phase_one(transformed)[0])
    assert torch.allclose(prediction, model.decoder(model.encoder(images)[0]))


def test_each_method_learns_when_lifted_out_of_its_script():
    """The model and the loss in a loop that is not the script's, on one fixed batch: the loss must fall well below what
    a wrongly signed or untrained one gives."""
    torch.manual_seed(0)
    images, transformed = tiny_batch(16)
    t = torch.randn(16, 8)
    model = PredictiveTransform(AlexNet())
    pairs = [(model, lambda m: predictive_transform_loss(m(transformed)[0], t, torch.zeros(1))[0])]
    phase_one = copy.deepcopy(model.encoder)
    torch.nn.init.normal_(phase_one.mu.weight)  # codes that differ from image to image
    pairs.append((VTEBarberAgakov(AlexNet(), phase_one), lambda m: vte_ba_loss(*m(images, transformed))[0]))
    for model, loss_of in pairs:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-4)
        losses = []
        for _ in range(60):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), type(model).__name__


@pytest.mark.parametrize("script", [predictive_transform, vte_ba])
def test_importing_a_script_has_no_side_effects_and_needs_common_alone(script):
    import ast

    tree = ast.parse(open(script.__file__).read())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"torch", "common"}
    assert script.__doc__ and "python " in script.__doc__ and "eq. " in script.__doc__
