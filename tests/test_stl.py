"""STL: the batches its script makes; losses and hypernetwork against literal forms; what the codes learn."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stl
from common import ResNet18, UserError, defaults_of, load_images

# ------------------------------------------------------------------------------------------------ the script's batches


def first_views(flags, tmp_path, monkeypatch, own=True):
    """The two views of the first batch that the script makes, 16 digits, all the same image; own=False: no flip, no
    blur."""
    seen, asked = [], []

    class Stop(Exception):
        pass

    def forward(model, view1, view2):
        seen.append((view1, view2))
        raise Stop

    def images(*args):
        asked.append(args[1])
        digits = load_images("digits", "train", image_size=32)
        return digits._replace(images=digits.images[:1].expand(64, -1, -1, -1))

    monkeypatch.setattr("common.load_images", images)
    if not own:
        monkeypatch.setattr("minter_warp.views.sample_flips_and_blurs",
                            lambda n, generator: {"flip": torch.zeros(n, dtype=torch.bool), "sigma": torch.zeros(n)})
    monkeypatch.setattr(stl.STL, "forward", forward)
    monkeypatch.setattr("sys.argv", ["stl.py", "--dataset", "digits", "--encoder", "nin", "--batch-size", "16",
                                     "--precision", "fp32", "--output", str(tmp_path / "stl.ckpt"), *flags])
    with pytest.raises(Stop):
        stl.main()
    assert asked == ["train+unlabeled"]  # STL-10's 105,000, as the released code takes them
    return seen[0]


INDEPENDENT = ["--batch", "independent"]


@pytest.mark.parametrize("flags, alike", [
    ([], True), (INDEPENDENT, False), (["--augmix"], True), (["--augmix", *INDEPENDENT], False)])
def test_the_batches_that_the_script_makes(flags, alike, tmp_path, monkeypatch):
    """The same image at every place of the data set: views 2i and 2i + 1 are then the same, up to flip and blur."""
    views = first_views(flags, tmp_path, monkeypatch, own=False)
    for view in views:
        assert [torch.equal(view[2 * i], view[2 * i + 1]) for i in range(7)] == [alike] * 7
        assert not any(torch.equal(view[2 * i], view[2 * i + 2]) for i in range(7))
    assert not torch.equal(*views)


def test_flips_and_blurs_are_each_images_own_augmix_is_used_and_views_are_normalised(tmp_path, monkeypatch):
    views = first_views([], tmp_path, monkeypatch)
    assert sum(not torch.equal(view[2 * i], view[2 * i + 1]) for view in views for i in range(7)) >= 6  # of 14
    both = torch.stack(views)
    assert abs(both.mean().item()) < 0.6 and 0.5 < both.std().item() < 1.6
    monkeypatch.undo()
    mixed = first_views(["--augmix"], tmp_path, monkeypatch)
    assert all(not torch.equal(a, b) for a, b in zip(views, mixed, strict=True))


GROUPS = {"crop": ["box"], "colour": ["factors", "order", "grey"], "rest": ["flip", "sigma"]}
SHARED = {"crop": ["crop"], "colour": ["colour"], "crop+colour": ["crop", "colour"], "all": ["crop", "colour", "rest"]}


@pytest.mark.parametrize("learn, batch", [*((learn, "aligned") for learn in SHARED), ("all", "independent")])
def test_a_pair_shares_what_is_learnt_and_each_image_draws_the_rest(learn, batch, tmp_path, monkeypatch):
    """The parameters of a whole epoch's views, of 128 images, as they reach `transform`; both views of all batches."""
    seen, whole = [], stl.transform
    monkeypatch.setattr(stl, "transform", lambda images, index, parameters, *rest: seen.append(parameters)
                        or whole(images, index, parameters, *rest))
    train(monkeypatch, tmp_path / "a.ckpt", "--limit", "128", "--batch-size", "64", "--equi", "0", "--trans", "0",
          "--learn", learn, "--batch", batch)
    assert len(seen) == 4  # two views of two batches
    drawn = {name: torch.cat([parameters[name] for parameters in seen]) for name in seen[0]}
    for group, names in GROUPS.items():
        same = torch.stack([(drawn[name][::2] == drawn[name][1::2]).flatten(1).all(1) if drawn[name].dim() > 1
                            else drawn[name][::2] == drawn[name][1::2] for name in names]).all(0)  # of 128 pairs
        if batch == "aligned" and group in SHARED[learn]:
            assert same.all(), group
        else:
            assert same.float().mean() < 0.4, group  # flip and blur are alike by chance in one of 8
        assert len(drawn[names[0]].unique(dim=0)) > 1


def test_weights_and_temperature_reach_the_loss(tmp_path, monkeypatch):
    given = []

    def loss(compared, weights, temperature):
        given.append((weights, temperature))
        raise KeyboardInterrupt

    monkeypatch.setattr(stl, "stl_loss", loss)
    monkeypatch.setattr("sys.argv", [
        "stl.py", "--dataset", "digits", "--image-size", "8", "--encoder", "nin", "--limit", "8", "--batch-size", "8",
        "--preset", "paper", "--inv", "0", "--equi", "3", "--temperature", "0.5", "--output", str(tmp_path / "a.ckpt")])
    with pytest.raises(KeyboardInterrupt):
        stl.main()
    assert given == [({"equi": 3.0, "trans": 0.2}, 0.5)]


def test_defaults_are_the_papers_or_its_codes(monkeypatch):
    def args(*flags):
        monkeypatch.setattr("sys.argv", ["stl.py", *flags])
        return stl.parse_args()

    plain = args("--dataset", "stl10")
    assert (plain.encoder, plain.image_size, plain.batch_size) == ("resnet18", 96, 256)
    assert plain.epochs is None and defaults_of(plain.recipe, plain.dataset)["epochs"] == 200
    assert (plain.lr, plain.weight_decay, plain.temperature) == (0.03, 5e-4, 0.2)
    assert (plain.inv, plain.equi, plain.trans, plain.preset, plain.batch) == (1, 1, 0.1, "code", "aligned")
    assert args("--dataset", "cifar10").image_size == 32
    assert args("--preset", "paper").trans == 0.2 and args("--preset", "paper", "--trans", "0.3").trans == 0.3


# ------------------------------------------------------------------------------------------------------------- losses


def literal_nt_xent(a, b, temperature=0.2):
    """Each row in turn, in float64: -log of its positive's share among all rows but itself."""
    z = np.concatenate([np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    n, total = len(a), 0.0
    for i in range(2 * n):
        similarity = [math.exp(z[i] @ z[k] / temperature) for k in range(2 * n)]
        positive = similarity[i + n if i < n else i - n]
        total -= math.log(positive / (sum(similarity) - similarity[i]))
    return total / (2 * n)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_nt_xent_is_its_definition(n):
    a, b = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(0))
    assert stl.nt_xent(a, b).item() == pytest.approx(literal_nt_xent(a, b), abs=1e-5)
    assert stl.nt_xent(3 * a, b / 7, 0.5).item() == pytest.approx(literal_nt_xent(a, b, 0.5), abs=1e-5)


def test_the_positive_is_right_in_both_directions():
    """Rows that only match as they should give nearly 0; any other order of either side does not."""
    a = torch.eye(6)
    assert stl.nt_xent(a, a, 0.01).item() < 1e-6
    for shift in range(1, 6):
        assert stl.nt_xent(a, a.roll(shift, 0), 0.01).item() > 90
    b = a.clone().requires_grad_()
    rows = torch.autograd.grad(stl.nt_xent(a.roll(1, 0), b), b)[0]
    assert (rows.abs().sum(1) > 0).all()


class Flat(nn.Module):
    """The smallest encoder: images (N, 3, S, S) -> (N, features)."""

    def __init__(self, size, features):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, features), nn.Tanh())

    def forward(self, images):
        return self.layers(images)


def small_model(losses=("inv", "equi", "trans"), preset="code", features=12, seed=0):
    torch.manual_seed(seed)
    return stl.STL(Flat(4, features), preset, losses, features).eval()  # images do not see each other in eval mode


@pytest.mark.parametrize("n", [2, 3, 8, 9])
@pytest.mark.parametrize("preset", ["code", "paper"])
def test_all_three_losses_are_equations_5_7_and_9_written_out(n, preset):
    model = small_model(preset=preset)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # farther from ties
    view1, view2 = torch.randn(2, n, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    losses = stl.stl_loss(model(view1, view2), {"inv": 1.0, "equi": 1.0, "trans": 0.1})
    with torch.no_grad():
        y1, y2 = [model.encoder(x[None])[0] for x in view1], [model.encoder(x[None])[0] for x in view2]

        def code(before, after):  # eq. 5
            return model.transformation_encoder(torch.cat([before, after])[None])[0]

        def moved(y, t):  # W(t) y with the matrix written out
            matrix = sum(t[k] * model.hypernetwork.weight[:, :, k] for k in range(len(t)))
            return matrix @ y

        def rows(projector, values):
            return torch.stack([projector(value[None])[0] for value in values])

        inv = literal_nt_xent(rows(model.inv_projector, y1), rows(model.inv_projector, y2))
        paired = [(i, i + 1 - 2 * (i % 2)) for i in range(n - n % 2)]  # x and its x'
        predictions = ([moved(y2[i], code(y2[j], y1[j])) for i, j in paired]
                       + [moved(y1[i], code(y1[j], y2[j])) for i, j in paired])  # eq. 7
        targets = [y1[i] for i, _ in paired] + [y2[i] for i, _ in paired]
        equi = literal_nt_xent(rows(model.equi_projector, targets), rows(model.equi_projector, predictions))
        codes = [[code(y1[i], y2[i]) for i in which] + [code(y2[i], y1[i]) for i in which]
                 for which in (range(0, n - n % 2, 2), range(1, n, 2))]
        trans = literal_nt_xent(*(rows(model.trans_projector, side) for side in codes))  # eq. 9
    total, metrics = losses
    assert metrics["inv"].item() == pytest.approx(inv, abs=1e-4)
    assert metrics["equi"].item() == pytest.approx(equi, abs=1e-4)
    assert metrics["trans"].item() == pytest.approx(trans, abs=1e-4)
    assert total.item() == pytest.approx(inv + equi + 0.1 * trans, abs=1e-4)


def test_the_code_that_predicts_an_image_comes_from_the_other_image_of_its_pair():
    model = small_model(losses=("equi",))
    view1, view2 = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    before = model(view1, view2)["equi"][1]

    def predictions_that_change(which, view):
        views = [view1.clone(), view2.clone()]
        views[view][which] += 1
        changed = (model(*views)["equi"][1] != before).any(1)
        return sorted(changed.nonzero()[:, 0].tolist())

    # Rows 0 to 5 predict view 1 from view 2, rows 6 to 11 view 2 from view 1. Image 2 changes what it is predicted from
    # and, through the code, both predictions of image 3; never those of its target view by itself.
    assert predictions_that_change(2, view=1) == [2, 3, 9]
    assert predictions_that_change(2, view=0) == [3, 8, 9]


def test_a_loss_that_is_switched_off_is_not_built_and_the_rest_stays_the_same():
    torch.manual_seed(0)
    only = stl.STL(Flat(4, 12), losses=("inv",), features=12)
    assert {name.split(".")[0] for name, _ in only.named_parameters()} == {"encoder", "inv_projector"}
    codes_only = stl.STL(Flat(4, 12), losses=("inv", "trans"), features=12)
    assert codes_only.hypernetwork is None and codes_only.transformation_encoder is not None
    full = small_model()
    views = torch.randn(2, 6, 3, 4, 4)
    compared = full(*views)
    alone, _ = stl.stl_loss(compared, {"inv": 1.0})
    literal = literal_nt_xent(*(part.detach() for part in compared["inv"]))
    assert alone.item() == pytest.approx(literal, abs=1e-5)


def test_every_parameter_gets_a_gradient():
    model = small_model().train()
    loss, _ = stl.stl_loss(model(*torch.randn(2, 8, 3, 4, 4)), {"inv": 1.0, "equi": 1.0, "trans": 0.1})
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# ------------------------------------------------------------------------------------------------------- hypernetwork


def test_hypernetwork_equals_the_generated_matrices_in_value_and_gradient():
    torch.manual_seed(0)
    hypernetwork = stl.Hypernetwork()
    codes, y = torch.randn(6, 128, requires_grad=True), torch.randn(6, 512, requires_grad=True)
    gradient = torch.randn(6, 512) / 512
    ours = hypernetwork(codes, y)
    literal = torch.einsum("noi,ni->no", hypernetwork.matrices(codes), y)
    assert torch.allclose(ours, literal, rtol=1e-4, atol=1e-4)
    leaves = [codes, y, hypernetwork.weight]
    for a, b in zip(torch.autograd.grad(ours, leaves, gradient), torch.autograd.grad(literal, leaves, gradient),
                    strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    one = hypernetwork.matrices(codes)[0]
    assert torch.allclose(one, sum(codes[0, k] * hypernetwork.weight[:, :, k] for k in range(128)), atol=1e-4)


def test_points_lie_as_far_apart_as_the_matrices_that_are_not_made(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "study"))
    from figures import matrix_points

    torch.manual_seed(0)
    hypernetwork = stl.Hypernetwork(24, 128)
    codes = torch.randn(9, 128)
    with torch.no_grad():
        hypernetwork.weight[:, :, 3] = 2 * hypernetwork.weight[:, :, 7]  # of lower rank than the code
        matrices = hypernetwork.matrices(codes).flatten(1).double()
    points = matrix_points(codes, hypernetwork.weight)
    assert points.shape == (9, 128)
    for measure in (torch.cdist, lambda a, b: a @ b.T):
        assert measure(points, points).numpy() == pytest.approx(measure(matrices, matrices).numpy(), rel=1e-4, abs=1e-3)


def test_hypernetwork_never_makes_a_matrix_for_each_image():
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in (result if isinstance(result, (tuple, list)) else [result])
                         if isinstance(part, torch.Tensor))
            return result

    hypernetwork = stl.Hypernetwork(features=32, code=4)
    codes, y = torch.randn(256, 4, requires_grad=True), torch.randn(256, 32, requires_grad=True)
    with Watch():
        hypernetwork(codes, y).sum().backward()
    assert max(sizes) <= 256 * 32 * 4 < 256 * 32 * 32  # the outer products, not the matrices


def test_sizes_are_the_papers():
    model = stl.STL(ResNet18(image_size=96))
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    assert sum(millions.values()) == pytest.approx(45.57, abs=0.01)
    assert millions["hypernetwork"] == pytest.approx(33.55, abs=0.01)
    two = [(512, 512, None), (512, 128, None)]
    three = [(512, 512, None), *two]
    shapes = {"paper": {"transformation_encoder": [(1024, 512, None), *two], "inv_projector": three,
                        "equi_projector": three, "trans_projector": [(128, 512, None), *two]},
              "code": {"transformation_encoder": [(1024, 128, None), (128, 128, None)], "inv_projector": two,
                       "equi_projector": two, "trans_projector": 2 * [(128, 128, None)]}}
    for preset, expected in shapes.items():
        made = stl.STL(Flat(4, 512), preset=preset)
        for name, layers in expected.items():
            found = [(layer.in_features, layer.out_features, layer.bias) for layer in getattr(made, name)
                     if isinstance(layer, nn.Linear)]
            assert found == layers, (preset, name)
            # batch normalisation, with two parameters a channel, and ReLU between the layers
            assert sum(p.numel() for p in getattr(made, name).parameters()) == (
                sum(i * o for i, o, _ in layers) + 2 * sum(o for _, o, _ in layers[:-1]))
    assert stl.PRESETS["paper"]["trans"] == 0.2 and stl.PRESETS["code"]["trans"] == 0.1
    bound = model.hypernetwork.weight.abs().max().item()
    assert bound == pytest.approx(nn.Linear(128, 4096, bias=False).weight.abs().max().item(), rel=0.01)


# ---------------------------------------------------------------------------------------------------- labels for codes


def model_and_views(code, learn, n=8, preset="code"):
    """A model in eval mode, two views of n images, and the labels of two transformations of each image."""
    torch.manual_seed(2)
    model = stl.STL(Flat(4, 12), preset, stl.LOSSES[code], 12, code, learn).eval()
    generator = torch.Generator().manual_seed(3)
    drawn = [stl.sample_views(n, 32, generator) for _ in range(2)]
    labels = [stl.transformation_labels(parameters, 32, stl.LEARN[learn]) for parameters in drawn]
    return model, torch.randn(2, n, 3, 4, 4, generator=generator), labels


@torch.no_grad()
@pytest.mark.parametrize("learn, numbers", [("crop", 4), ("colour", 5), ("crop+colour", 9), ("all", 11)])
def test_the_hypernetwork_fed_by_labels_is_equation_7_with_each_images_own_labels_written_out(learn, numbers):
    model, (view1, view2), labels = model_and_views("labels", learn)
    assert labels[0].shape == (8, numbers) and model.trans_projector is None
    _, metrics = stl.stl_loss(model(view1, view2, *labels), {"inv": 1.0, "equi": 1.0})
    y1, y2 = ([model.encoder(image[None])[0] for image in view] for view in (view1, view2))

    def moved(y, before, after):
        t = model.transformation_encoder(torch.cat([before, after])[None])[0]
        return sum(t[k] * model.hypernetwork.weight[:, :, k] for k in range(len(t))) @ y

    def rows(values):
        return torch.stack([model.equi_projector(value[None])[0] for value in values])

    one, two = labels
    predicted = ([moved(y2[i], two[i], one[i]) for i in range(8)] + [moved(y1[i], one[i], two[i]) for i in range(8)])
    assert metrics["equi"].item() == pytest.approx(literal_nt_xent(rows([*y1, *y2]), rows(predicted)), abs=1e-4)
    assert set(metrics) == {"inv", "equi", "map_variation"}


@torch.no_grad()
@pytest.mark.parametrize("learn", ["crop", "all"])
@pytest.mark.parametrize("preset", ["code", "paper"])
def test_predicted_labels_are_compared_with_the_difference_of_the_true_ones_number_by_number(learn, preset):
    model, (view1, view2), labels = model_and_views("predicted", learn, preset=preset)
    total, metrics = stl.stl_loss(model(view1, view2, *labels), {"inv": 2.0, "predict": 0.5})
    squares = []
    for first, second, before, after in zip(view1, view2, *labels, strict=True):
        y1, y2 = (model.encoder(view[None])[0] for view in (first, second))
        for pair, truth in (((y1, y2), after - before), ((y2, y1), before - after)):
            guess = model.transformation_encoder(torch.cat(pair)[None])[0]
            squares += [(guess[k].item() - truth[k].item() / math.sqrt(2)) ** 2 for k in range(len(truth))]
    assert len(squares) == 8 * 2 * labels[0].shape[1] and set(metrics) == {"inv", "predict"}
    assert metrics["predict"].item() == pytest.approx(sum(squares) / len(squares), rel=1e-4)
    assert total.item() == pytest.approx(2 * metrics["inv"].item() + 0.5 * metrics["predict"].item(), rel=1e-5)


@pytest.mark.parametrize("code", ["labels", "predicted"])
def test_with_labels_every_parameter_gets_a_gradient_and_their_loss_reaches_the_encoder(code):
    model, views, labels = model_and_views(code, "all", n=9)  # the odd image is left to L_inv
    compared = model.train()(*views, *labels)
    loss, metrics = stl.stl_loss(compared, dict.fromkeys(stl.LOSSES[code], 1.0))
    other = metrics[stl.LOSSES[code][1]]
    assert all((gradient != 0).any() for gradient in torch.autograd.grad(other, model.encoder.parameters(),
                                                                         retain_graph=True))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


def train(monkeypatch, output, *flags):
    few = "--dataset digits --image-size 8 --encoder nin --limit 16 --batch-size 8 --epochs 1".split()
    monkeypatch.setattr("sys.argv", ["stl.py", *few, "--output", str(output), *flags])
    stl.main()


@pytest.mark.parametrize("code, method, losses", [
    ("labels", "stl_labels", {"inv", "equi", "map_variation"}), ("predicted", "stl_predicted", {"inv", "predict"})])
def test_labels_are_trained_with_loaded_and_resumed(code, method, losses, tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    train(monkeypatch, path, "--code", code, "--learn", "all", "--batch", "independent")
    model, checkpoint = stl.load_stl(path)
    assert checkpoint["method"] == method and model.code == code
    (row,) = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert losses == row.keys() & {*losses, "inv", "equi", "trans", "predict", "map_variation", "code_spread"}
    with pytest.raises(UserError, match=f"is a checkpoint of {method}"):
        train(monkeypatch, path, "--resume")  # as if the codes were learnt


def test_a_checkpoint_from_before_there_were_labels_is_of_learnt_codes_and_is_resumed(tmp_path, monkeypatch):
    path, flags = tmp_path / "a.ckpt", ("--equi", "0", "--save-every", "1")
    train(monkeypatch, path, *flags)
    whole = torch.load(path)
    for name in ("code", "learn", "predict"):
        del whole["config"][name]
    torch.save(whole, path)
    model, _ = stl.load_stl(path)
    assert model.code == "learned" and model.trans_projector is not None
    train(monkeypatch, path, *flags, "--resume")
    with pytest.raises(UserError, match="was trained with learn crop.colour, not all"):
        train(monkeypatch, path, *flags, "--learn", "all", "--resume")


def test_weights_that_have_no_part_are_refused_and_the_defaults_are_those_of_the_code(monkeypatch, capsys):
    def args(*flags):
        monkeypatch.setattr("sys.argv", ["stl.py", *flags])
        found = stl.parse_args()
        return found.inv, found.equi, found.trans, found.predict

    assert args() == (1, 1, 0.1, 0) and args("--preset", "paper") == (1, 1, 0.2, 0)
    assert args("--code", "labels", "--trans", "0") == (1, 1, 0, 0)
    assert args("--code", "predicted", "--inv", "0") == (0, 0, 0, 0.5)
    for flags, says in ((("--code", "labels", "--trans", "1"), "--trans 1 has no part in --code labels"),
                        (("--code", "predicted", "--equi", "1"), "--equi 1 has no part in --code predicted"),
                        (("--predict", "1"), "--predict 1 has no part in --code learned"),
                        (("--code", "predicted", "--inv", "0", "--predict", "0"), "--inv and --predict are all 0")):
        with pytest.raises(SystemExit, match="2"):
            args(*flags)
        assert says in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ what to watch


def metrics_with(codes=None, right=None, wrong=None):
    compared = {"inv": tuple(torch.randn(2, 8, 4))}
    compared |= {"codes": codes} if codes is not None else {}
    compared |= {"right_and_wrong": (right, wrong)} if right is not None else {}
    return stl.stl_loss(compared, {"inv": 1.0})[1]


def test_spread_and_variation_are_0_and_1_where_they_should_be():
    constant = torch.randn(1, 128).expand(64, -1)
    assert metrics_with(codes=constant)["code_spread"].item() == pytest.approx(0, abs=1e-5)
    opposite = torch.cat([constant, -3 * constant])
    assert metrics_with(codes=opposite)["code_spread"].item() == pytest.approx(1, abs=1e-5)
    y = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    other = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    assert metrics_with(right=y, wrong=y)["map_variation"].item() == 0
    assert metrics_with(right=y, wrong=other)["map_variation"].item() == pytest.approx(1, abs=0.05)
    model = small_model()
    with torch.no_grad():
        model.hypernetwork.weight[:, :, 1:] = 0  # W scales with one number of the code
        model.transformation_encoder[-1].weight.fill_(0.1)
    variation = stl.stl_loss(model(*torch.randn(2, 16, 3, 4, 4)), {"equi": 1.0})[1]["map_variation"]
    ignoring = small_model()
    ignoring.hypernetwork.forward = lambda codes, y: y
    assert variation > 0
    assert stl.stl_loss(ignoring(*torch.randn(2, 16, 3, 4, 4)), {"equi": 1.0})[1]["map_variation"] == 0


@pytest.mark.parametrize("means, early, says", [
    ({"code_spread": 0.01}, False, "collapsed"), ({"map_variation": 0.001}, False, "ignores the transformation"),
    ({"trans": 0.01}, True, "near zero this early"), ({"trans": 0.01}, False, None),
    ({"code_spread": 0.5, "map_variation": 0.4, "trans": 1.0}, True, None), ({"inv": 0.01}, True, None),
])
def test_failures_are_named_when_they_happen(means, early, says):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stl.watch(means, early)
    assert [says in str(warning.message) for warning in caught] == [True] * (says is not None)


# ------------------------------------------------------------------------------------------------------- what is learnt


class Small(nn.Module):
    """A small convolutional encoder: (N, 3, 24, 24) -> (N, 64)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
            nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(256, 64))

    def forward(self, images):
        return self.layers(images)


def views_of(images, n, generator, together=2):
    index = torch.randint(0, len(images), (n,), generator=generator)
    drawn = [stl.sample_views(n, 24, generator, stl.LEARN["crop+colour"] if together == 2 else ()) for _ in range(2)]
    normalize = torch.full((3,), 1 / 0.3), torch.full((3,), -0.5 / 0.3)
    return [stl.transform(images, index, parameters, normalize) for parameters in drawn], drawn


def code_scores(model, images, others):
    """R^2 on held-out images of a ridge regression from the code to what differs between the two views."""
    model.eval()
    sets = []
    for split, seed in ((images, 10), (others, 11)):
        views, (one, two) = views_of(split, 600, torch.Generator().manual_seed(seed), together=1)
        with torch.no_grad():
            codes = model.encode_transformation(*(model.encoder(view) for view in views))
        size = (two["box"][:, 2].log() - one["box"][:, 2].log())
        sets.append((codes.numpy(), torch.stack([two["factors"][:, 0] - one["factors"][:, 0], size], 1).numpy()))
    (train, targets), (test, truth) = sets
    predicted = RidgeCV(np.logspace(-3, 3, 7)).fit(train, targets).predict(test)
    model.train()
    return 1 - ((predicted - truth) ** 2).sum(0) / ((truth - targets.mean(0)) ** 2).sum(0)


def test_codes_come_to_tell_the_transformation_of_images_never_seen():
    images, others = (load_images("digits", split, image_size=24)[0] for split in ("train", "test"))
    torch.manual_seed(0)
    model, generator = stl.STL(Small(), features=64), torch.Generator().manual_seed(0)
    untrained = code_scores(model, images, others)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    first = last = None
    for _ in range(150):
        views, _ = views_of(images, 64, generator)
        loss, metrics = stl.stl_loss(model(*views), {"inv": 1.0, "equi": 1.0, "trans": 0.1})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = {name: value.item() for name, value in metrics.items()}
        first = first or last
    trained = code_scores(model, images, others)
    assert (trained > 0.3).all() and (trained > untrained + 0.05).all(), (untrained, trained)  # chance: 0
    for name in ("inv", "equi", "trans"):
        assert last[name] < 0.85 * first[name], (name, first, last)
    assert last["code_spread"] > 0.1 and last["map_variation"] > 0.05
