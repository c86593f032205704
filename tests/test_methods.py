"""Each method's loss against its equation, and who is trained by it."""

import copy

import pytest
import torch

import avt
import predictive_transform
import stl
import vte_ba
import vte_infonce
from avt import AVT, avt_loss
from common import NIN, AlexNet, MuonAdam
from predictive_transform import PredictiveTransform, predictive_transform_loss
from vte_ba import VTEBarberAgakov, vte_ba_loss
from vte_infonce import ConcatenatedCritic, SeparatedCritic, VTEInfoNCE, vte_infonce_loss

CRITICS = {"separated": SeparatedCritic, "concatenated": ConcatenatedCritic}


def tiny_batch(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.randn(n, 3, 32, 32, generator=generator)


def test_predictive_transform_loss_is_equation_16():
    """-log N(t; prediction, I) with its constant (8 / 2) log 2 pi taken off, averaged over the batch."""
    generator = torch.Generator().manual_seed(0)
    prediction, t = torch.randn(16, 8, generator=generator).double(), torch.randn(16, 8, generator=generator).double()
    z = torch.randn(16, 512, generator=generator).double()
    loss, metrics = predictive_transform_loss(prediction, t, z, torch.full((16, 512), -0.25).double())
    normal = torch.distributions.MultivariateNormal(prediction, torch.eye(8, dtype=torch.float64))
    expected = -normal.log_prob(t).mean() - 4 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert metrics["squared_error"].item() == pytest.approx(2 * expected.item(), abs=1e-12)
    assert metrics["logvar"].item() == -0.25
    assert metrics["z_std"].item() == pytest.approx(z.numpy().std(0, ddof=1).mean())
    assert avt_loss(prediction, t, z, z)[0] == loss  # the same equation, given another prediction


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
    deep = VTEBarberAgakov(AlexNet(), AlexNet(), deep_head=True).decoder
    assert widths(deep) == [(512, 2048), (2048, 1024), (1024, 512)] and norms(deep) == 2
    assert widths(VTEBarberAgakov(AlexNet(), AlexNet(), steerable=True).decoder)[0] == (520, 2048)
    decoder = AVT(AlexNet()).decoder
    assert widths(decoder) == [(1024, 2048), (2048, 1024), (1024, 8)] and norms(decoder) == 2
    for is_deep, like in ((False, shallow), (True, deep)):
        critic = SeparatedCritic(is_deep)
        assert widths(critic.g) == widths(critic.h) == widths(like) and norms(critic.g) == norms(like)
    f = ConcatenatedCritic().layers
    assert widths(f) == [(1024, 512), (512, 1)] and norms(f) == 0
    f = ConcatenatedCritic(deep=True).layers
    assert widths(f) == [(1024, 2048), (2048, 1024), (1024, 1)] and norms(f) == 2


def test_z_is_sampled_in_training_and_in_evaluation():
    model = PredictiveTransform(AlexNet()).eval()
    images, _ = tiny_batch()
    with torch.no_grad():
        assert not torch.equal(model(images)[0], model(images)[0])


def frozen_state(model):
    return {name: value.clone() for name, value in model.phase_one.state_dict().items()}


PHASE_TWO = {
    "ba": lambda e, p, **k: VTEBarberAgakov(e, p, **k),
    "steerable": lambda e, p, **k: VTEBarberAgakov(e, p, steerable=True, **k),
    "separated": lambda e, p, **k: VTEInfoNCE(e, p, SeparatedCritic(), **k),
    "concatenated": lambda e, p, **k: VTEInfoNCE(e, p, ConcatenatedCritic(), **k),
}


def phase_two_loss(model, images, transformed, t):
    if isinstance(model, VTEInfoNCE):
        return vte_infonce_loss(*model(images, transformed))[0]
    return vte_ba_loss(*model(images, transformed, t))[0]


@pytest.mark.parametrize("make", PHASE_TWO.values(), ids=PHASE_TWO)
def test_phase_one_stays_bit_identical_and_in_eval_mode(make):
    torch.manual_seed(0)
    model = make(NIN(), NIN())
    container = torch.nn.ModuleList([model])  # a parent module that is switched to train() switches its children
    before = frozen_state(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for step in range(3):
        container.train()
        assert not any(module.training for module in model.phase_one.modules())
        assert model.encoder.training
        optimizer.zero_grad()
        phase_two_loss(model, *tiny_batch(seed=step), torch.randn(8, 8)).backward()
        optimizer.step()
    after = model.phase_one.state_dict()
    assert any(name.endswith("running_mean") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert container.eval() and not model.encoder.training


@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.parametrize("make", PHASE_TWO.values(), ids=PHASE_TWO)
def test_gradients_reach_exactly_the_parameters_that_train(make, from_scratch):
    torch.manual_seed(0)
    model = make(AlexNet(), AlexNet(), from_scratch=from_scratch)
    phase_two_loss(model, *tiny_batch(), torch.randn(8, 8)).backward()
    for name, parameter in model.named_parameters():
        if isinstance(model, VTEInfoNCE) and name in ("critic.layers.2.bias", "critic.g.2.bias"):
            continue  # adds one number to each row of scores, which changes nothing: no gradient, but for rounding
        reached = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert reached == (from_scratch or not name.startswith("phase_one.")), name


def test_gradients_of_the_one_encoder_methods_reach_everything():
    torch.manual_seed(0)
    images, transformed = tiny_batch()
    model = PredictiveTransform(AlexNet())
    prediction, z, logvar = model(transformed)
    predictive_transform_loss(prediction, torch.randn(8, 8), z, logvar)[0].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    model = AVT(AlexNet())
    prediction, z, logvar = model(images, transformed)
    avt_loss(prediction, torch.randn(8, 8), z, logvar)[0].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_z_comes_from_the_transformed_image_and_z_hat_from_the_original():
    torch.manual_seed(0)
    model = VTEBarberAgakov(AlexNet(), AlexNet()).eval()
    for encoder in (model.encoder, model.phase_one):  # no noise: both codes are their means
        torch.nn.init.zeros_(encoder.logvar.weight)
        torch.nn.init.constant_(encoder.logvar.bias, -100.0)
    images, transformed = tiny_batch()
    prediction, z, _ = model(images, transformed, None)
    assert torch.allclose(z, model.phase_one(transformed)[0])
    assert torch.allclose(prediction, model.decoder(model.encoder(images)[0]))
    infonce = VTEInfoNCE(model.encoder, model.phase_one, SeparatedCritic()).eval()
    scores, z, _ = infonce(images, transformed)
    assert torch.allclose(z, model.phase_one(transformed)[0])
    assert torch.allclose(scores, infonce.critic(model.encoder(images)[0], z))
    avt = AVT(model.encoder).eval()
    expected = torch.cat([model.encoder(transformed)[0], model.encoder(images)[0]], 1)
    assert torch.allclose(avt(images, transformed)[0], avt.decoder(expected), atol=1e-6)


def test_the_mean_target_is_phase_one_s_mu_and_free_of_its_sigma():
    torch.manual_seed(0)
    model = VTEBarberAgakov(NIN(8), NIN(8), mean_target=True)
    with torch.no_grad():
        model.phase_one.logvar.bias.fill_(20.0)  # a sigma of e^10
    images = torch.randn(4, 3, 8, 8)
    prediction, z, _ = model(images, images, torch.zeros(4, 8))
    assert torch.equal(z, model.phase_one(images)[0]) and not z.requires_grad
    loss, _ = vte_ba_loss(prediction, z, torch.zeros(4, 512))
    sampled = VTEBarberAgakov(model.encoder, model.phase_one)(images, images, torch.zeros(4, 8))
    assert loss < 1e4 < 1e9 < vte_ba_loss(sampled[0], sampled[1], torch.zeros(4, 512))[0]


def test_the_steerable_decoder_sees_t_and_the_plain_one_does_not():
    torch.manual_seed(0)
    images, transformed = tiny_batch()
    for steerable in (False, True):
        model = VTEBarberAgakov(AlexNet(), AlexNet(), steerable=steerable)
        t = torch.randn(8, 8, requires_grad=True)
        prediction, _, _ = model(images, transformed, t)
        assert prediction.shape == (8, 512)
        gradient = torch.autograd.grad(prediction.sum(), t, allow_unused=True)[0]
        assert (gradient is not None) == steerable


# ------------------------------------------------------------------------------------------------------------- InfoNCE


def codes(n=10, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 512, generator=generator, dtype=dtype).requires_grad_(),
            torch.randn(n, 512, generator=generator, dtype=dtype).requires_grad_())


@pytest.mark.parametrize("name", CRITICS)
def test_scores_are_those_of_the_double_loop(name):
    torch.manual_seed(0)
    critic, (z_hat, z) = CRITICS[name]().double(), codes()
    scores = critic(z_hat, z)
    for i in range(10):
        for j in range(10):
            if name == "separated":
                expected = critic.g(z_hat[j : j + 1]).flatten() @ critic.h(z[i : i + 1]).flatten()
            else:
                expected = critic.layers(torch.cat([z_hat[j], z[i]])[None])[0, 0]
            assert scores[i, j].item() == pytest.approx(expected.item(), abs=1e-10)


def test_loss_is_equation_19_and_20_in_the_stated_direction():
    """For a fixed z_i, which is row i, the softmax runs over the z_hat_j, with the positive in the denominator."""
    scores = 2 * torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 0.0
    for i in range(7):
        denominator = sum(torch.exp(scores[i, j]) for j in range(7))
        expected -= torch.log(torch.exp(scores[i, i]) / denominator).item() / 7
    loss, metrics = vte_infonce_loss(scores, *codes(7))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert abs(loss.item() - vte_infonce_loss(scores.T, *codes(7))[0].item()) > 0.01  # the other direction is another
    assert metrics["bound"].item() == pytest.approx(torch.tensor(7.0).log().item() - expected, abs=1e-6)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_the_bound_never_exceeds_log_n(n):
    ceiling = torch.tensor(float(n)).log().item()
    for scale in (0.0, 1.0, 100.0):
        for scores in (scale * torch.eye(n), scale * torch.randn(n, n), -scale * torch.eye(n)):
            metrics = vte_infonce_loss(scores, *codes(n, dtype=torch.float32))[1]
            assert metrics["bound"].item() <= ceiling + 1e-6
    best = vte_infonce_loss(100 * torch.eye(n), *codes(n))[1]  # the right pairs stand out: all that can be measured
    assert best["bound"].item() == pytest.approx(ceiling, rel=1e-5)
    assert abs(vte_infonce_loss(torch.zeros(n, n), *codes(n))[1]["bound"].item()) < 1e-6  # nothing is known: nothing


@pytest.mark.parametrize("deep, training, dtype, tolerance", [
    (False, True, torch.float64, 1e-12), (False, True, torch.float32, 1e-5),
    (True, True, torch.float64, 1e-12), (True, False, torch.float64, 1e-12)])
def test_concatenated_critic_equals_the_naive_form(deep, training, dtype, tolerance, monkeypatch):
    """All pairs concatenated and put through f: the same scores, gradients and running statistics, over chunks that do
    not divide the batch. (The deep head in float64 alone: in float32 a unit within rounding of zero may be on in one
    form and off in the other.)"""
    monkeypatch.setattr(vte_infonce, "CHUNK", {"cpu": 11 * 512 * 4 * (4 if deep else 1), "cuda": 1 << 26})
    torch.manual_seed(0)
    critic, (z_hat, z) = ConcatenatedCritic(deep).to(dtype).train(training), codes(11, dtype=dtype)
    if deep:
        for norm in (critic.layers[1], critic.layers[4]):  # statistics and weights unlike those of an untrained layer
            torch.nn.init.uniform_(norm.weight, 0.5, 2)
            torch.nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    naive = copy.deepcopy(critic)
    pairs = torch.cat([z_hat[None].expand(11, 11, 512), z[:, None].expand(11, 11, 512)], 2)
    results = []
    for model, scores in ((critic, critic(z_hat, z)), (naive, naive.layers(pairs.reshape(121, 1024)).view(11, 11))):
        loss = (scores * torch.linspace(-1, 1, 121, dtype=dtype).view(11, 11)).sum() + vte_infonce_loss(scores, z, z)[0]
        gradients = torch.autograd.grad(loss, [z_hat, z, *model.parameters()])
        results.append([scores, *gradients, *(buffer.to(dtype) for buffer in model.buffers())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("deep", [False, True])
def test_concatenated_critic_compiled_equals_itself(deep):
    torch.manual_seed(0)
    critic, (z_hat, z) = ConcatenatedCritic(deep), codes(8, dtype=torch.float32)
    results = []
    for model in (critic, torch.compile(copy.deepcopy(critic), backend="aot_eager", fullgraph=True)):
        scores = model(z_hat, z)
        gradients = torch.autograd.grad(scores.logsumexp(1).sum(), [z_hat, z])
        results.append([scores, *gradients, *(buffer.float() for buffer in model.buffers())])
    for ours, compiled in zip(*results, strict=True):
        assert torch.allclose(ours, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [SeparatedCritic, ConcatenatedCritic, lambda: ConcatenatedCritic(deep=True)])
def test_scores_are_not_rounded_to_bfloat16_under_autocast(make):
    """Neither for float32 codes nor for the bfloat16 codes of an encoder that is not ours."""
    torch.manual_seed(0)
    critic, (z_hat, z) = make(), codes(6, dtype=torch.float32)
    exact = critic(z_hat, z)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            scores = critic(z_hat.to(dtype), z.to(dtype))
        assert (scores.float() - exact).abs().max() < 0.05 * exact.abs().max()
        if dtype == torch.float32:
            assert scores.dtype == torch.float32 and not torch.equal(scores.bfloat16().float(), scores)
        scores.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in critic.parameters())


def test_a_collapsed_z_is_no_error():
    """What --from-scratch tends to: a constant z. The loss and its metrics stay numbers."""
    constant = torch.ones(8, 512)
    loss, metrics = vte_ba_loss(constant, constant, constant)
    assert loss == 0 and metrics["z_std"] == 0 and metrics["explained"].isfinite()
    assert vte_ba_loss(constant + 1e-3, constant, constant)[1]["explained"].isfinite()


@pytest.mark.parametrize("script", [predictive_transform, vte_ba, vte_infonce, avt, stl])
def test_importing_a_script_has_no_side_effects_and_needs_common_and_the_warp_alone(script):
    import ast

    tree = ast.parse(open(script.__file__).read())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    standard = {"contextlib", "math", "warnings", "torch", "torch.nn.functional", "torch.utils.checkpoint"}
    assert modules - standard == {"common", "minter_warp.views" if script is stl else "minter_warp"}
    assert script.__doc__ and "python " in script.__doc__ and "eq. " in script.__doc__


def test_the_fast_recipes_optimizer_is_muon_for_the_encoder_and_adam_for_the_rest():
    """Muon's first step against the exact orthogonal factor, by its singular values; all else against torch's Adam."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 40, 1), torch.nn.BatchNorm2d(40))
    encoder = encoder.to(memory_format=torch.channels_last)
    head = torch.nn.Linear(5, 4)
    parameters = [*encoder.parameters(), *head.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    before, gradients = ([value.detach().clone() for value in values] for values in (
        parameters, [parameter.grad for parameter in parameters]))
    kernels = [number for number, parameter in enumerate(parameters) if parameter.dim() == 4]
    assert len(kernels) == 2
    others = [parameter for parameter in parameters if parameter.dim() != 4]
    MuonAdam([parameters[number] for number in kernels], others, lr=1e-3, muon_lr=0.1).step()
    adam = [torch.nn.Parameter(value) for value in before]
    for parameter, gradient in zip(adam, gradients, strict=True):
        parameter.grad = gradient
    torch.optim.Adam(adam, lr=1e-3, fused=True).step()
    for number, (old, new, gradient) in enumerate(zip(before, parameters, gradients, strict=True)):
        if number not in kernels:
            assert torch.equal(new, adam[number])
            continue
        rows, columns = gradient.flatten(1).shape
        step = (old - new).detach().flatten(1) / (0.1 * max(1, rows / columns) ** 0.5)
        left, _, right = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
        cosine = torch.nn.functional.cosine_similarity(step.flatten(), (left @ right).flatten(), 0)
        values = torch.linalg.svdvals(step)
        assert cosine > 0.95 and 0.6 < values.min() and values.max() < 1.25
    assert all(parameters[number].grad is None for number in kernels)


def test_muon_goes_on_from_its_state_as_if_it_had_not_stopped():
    """Momentum is part of the state: two steps, and one after loading what the first left."""
    torch.manual_seed(0)
    gradients = torch.randn(2, 8, 6)
    whole, stopped, resumed = (torch.nn.Linear(6, 8, bias=False) for _ in range(3))
    for other in (stopped, resumed):
        other.load_state_dict(whole.state_dict())
    first, second, third = (MuonAdam([module.weight], [torch.nn.Parameter(torch.zeros(1))], 1e-3, 0.1)
                            for module in (whole, stopped, resumed))

    def step(module, optimizer, gradient):
        module.weight.grad = gradient.clone()
        optimizer.step()

    step(whole, first, gradients[0]), step(whole, first, gradients[1])
    step(stopped, second, gradients[0])
    resumed.load_state_dict(stopped.state_dict())
    third.load_state_dict(second.state_dict())
    step(resumed, third, gradients[1])
    assert torch.equal(resumed.weight, whole.weight)
