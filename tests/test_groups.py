"""Which parameter of a model is in which group, and what everybody else makes of the groups."""

import io

import pytest
import torch
from torch import nn

import fusedcalib
from fusedcalib.groups import param_groups

SGD = [fusedcalib.SGD, torch.optim.SGD]


def kinds(model, *args, **options):
    """{name of the group: names of its parameters}, with each parameter found under its name."""
    named = dict(model.named_parameters(remove_duplicate=False))
    groups = param_groups(model, *args, **options)
    assert all(named[name] is param for group in groups for name, param in group["params"])
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


class Bare(nn.Module):
    """Parameters of no layer that torch has."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))


W, E, N = "weights", "embeddings", "no_decay"


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(3, 2), {W: ["weight"], N: ["bias"]}),
        (nn.ConvTranspose2d(3, 2, 3, bias=False), {W: ["weight"]}),
        (nn.BatchNorm2d(3), {N: ["weight", "bias"]}),
        (nn.InstanceNorm1d(3, affine=True), {N: ["weight", "bias"]}),
        (nn.GroupNorm(1, 3), {N: ["weight", "bias"]}),
        (nn.LayerNorm((3, 4)), {N: ["weight", "bias"]}),
        (nn.RMSNorm((3, 4)), {N: ["weight"]}),
        (nn.Embedding(4, 3), {E: ["weight"]}),
        (nn.EmbeddingBag(4, 3), {E: ["weight"]}),
        (nn.LSTM(3, 2), {W: ["weight_ih_l0", "weight_hh_l0"], N: ["bias_ih_l0", "bias_hh_l0"]}),
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True),
            {
                W: ["in_proj_weight", "out_proj.weight"],
                N: ["in_proj_bias", "bias_k", "bias_v", "out_proj.bias"],
            },
        ),
        (Bare(matrix=(2, 3), vector=3, scalar=()), {W: ["matrix"], N: ["vector", "scalar"]}),
        (Bare(bias=(2, 3), bias_table=(2, 3), biased=(2, 3)), {W: ["biased"], N: ["bias", "bias_table"]}),
        (nn.utils.parametrizations.orthogonal(nn.Linear(3, 3, bias=False)), None),
        (nn.utils.parametrizations.orthogonal(nn.Embedding(3, 3)), {E: ["parametrizations.weight.original"]}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_group_of_a_layers_parameters(layer, expected):
    expected = expected or {W: ["parametrizations.weight.original"]}
    assert kinds(layer) == expected
    inside = {kind: [f"0.part.{name}" for name in names] for kind, names in expected.items()}
    assert kinds(nn.Sequential(nn.ModuleDict({"part": layer}))) == inside


def test_a_weight_tied_to_an_embedding_is_an_embedding_and_appears_once():
    for first, second in ((0, 1), (1, 0)):
        model = nn.Sequential(*[nn.Linear(3, 4, bias=False), nn.Embedding(4, 3)][:: 1 - 2 * first])
        model[second].weight = model[first].weight
        assert kinds(model) == {E: ["0.weight"]}
    layer = nn.Linear(3, 3)
    assert kinds(nn.Sequential(layer, nn.ReLU(), layer)) == {W: ["0.weight"], N: ["0.bias"]}


def test_frozen_parameters_are_left_out_and_so_are_empty_groups():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    assert kinds(model) == {W: ["1.weight"]}


@pytest.mark.parametrize(
    ("no_decay", "expected"),
    [
        (["embed.weight"], {W: ["fc.0.weight", "fc.1.weight"], N: ["embed.weight"]}),
        (["fc.*"], {E: ["embed.weight"], N: ["fc.0.weight", "fc.1.weight"]}),
        ("fc.[1-9].weight", {W: ["fc.0.weight"], E: ["embed.weight"], N: ["fc.1.weight"]}),
        ({"again.weight"}, {W: ["fc.1.weight"], E: ["embed.weight"], N: ["fc.0.weight"]}),
        (iter(["*.weight"]), {N: ["embed.weight", "fc.0.weight", "fc.1.weight"]}),
    ],
)
def test_parameters_named_in_no_decay(no_decay, expected):
    layers = [nn.Linear(3, 3, bias=False) for _ in range(2)]
    parts = {"embed": nn.Embedding(4, 3), "fc": nn.Sequential(*layers), "again": layers[0]}
    assert kinds(nn.ModuleDict(parts), 0.1, no_decay) == expected


class Vision(Bare):
    """As timm's models: also names that this one does not have."""

    def no_weight_decay(self):
        return {"pos_embed", "dist_token"}


class Wrapper(nn.Module):
    """As torch.compile's: other names, the same attributes."""

    def __init__(self, wrapped):
        super().__init__()
        self._orig_mod = wrapped

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, lambda m: nn.ModuleDict({"backbone": m})])
def test_what_the_model_or_a_part_of_it_names(wrap):
    model = wrap(Vision(pos_embed=(1, 4, 3), head=(2, 3)))
    names = [name for name, _ in model.named_parameters()]
    assert kinds(model) == {W: [names[1]], N: [names[0]]}


# What the groups say, and whom they say it to


@pytest.mark.parametrize("centralize", [False, True, "update"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1, None])
def test_options_of_the_groups_and_of_the_optimizer(weight_decay, centralize):
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    groups = param_groups(model, weight_decay, centralize=centralize)
    for default in (False, "gradient"):
        made = fusedcalib.SGD(groups, lr=1, weight_decay=0.5, centralize=default)
        decay = 0.5 if weight_decay is None else weight_decay
        found = [(g["name"], g["weight_decay"], g["centralize"]) for g in made.param_groups]
        assert found == [(W, decay, centralize or default), (E, decay, False), (N, 0.0, False)]
        groups = param_groups(model, weight_decay, centralize=centralize)
    assert param_groups(model) == param_groups(model, 0.0, (), False)


def test_a_step_centres_weights_and_nothing_else():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.LayerNorm((4, 2)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(4)).pow(3).sum().backward()
    fusedcalib.SGD(param_groups(model, centralize=True), lr=1.0).step()
    for name, p in model.named_parameters():
        change = p.detach() - before[name]
        assert change.any()
        centred = change.flatten(1).mean(1).abs().max() < 1e-6 if p.ndim > 1 else False
        assert centred == (name == "1.weight"), name


SCHEDULERS = {
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2},
    "ReduceLROnPlateau": {"patience": 0},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "LambdaLR": {"lr_lambda": [lambda epoch: 0.5**epoch] * 3},
}


@pytest.mark.parametrize("cls", SGD, ids=["ours", "torch"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_and_checkpoints_keep_the_groups(cls, name):
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))

    def build(**options):
        optimizer = cls(param_groups(model, 0.1, **options), lr=0.1, momentum=0.9)
        return optimizer, getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])

    optimizer, scheduler = build(centralize=True)
    model(torch.arange(4)).sum().backward()
    for _ in range(3):
        optimizer.step()
        scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, _ = build()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [g["name"] for g in other.param_groups] == [W, E, N]
    assert [g["param_names"] for g in other.param_groups] == [["1.weight"], ["0.weight"], ["1.bias"]]
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert other.param_groups[0]["centralize"] is True


@pytest.mark.parametrize("cls", SGD, ids=["ours", "torch"])
def test_the_groups_go_through_distributed_checkpoints(cls):
    from torch.distributed.checkpoint import state_dict as dcp

    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    optimizer = cls(param_groups(model, 0.1, centralize=True), lr=0.1, momentum=0.9)
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=True)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    assert saved["param_groups.1.weight.name"] == W
    other = cls(param_groups(model), lr=0.3, momentum=0.9)
    dcp.set_optimizer_state_dict(model, other, saved, options=options)
    assert [(g["name"], g["weight_decay"], g["lr"]) for g in other.param_groups] == [
        (W, 0.1, 0.1),
        (E, 0.1, 0.1),
        (N, 0.0, 0.1),
    ]


@pytest.mark.parametrize(
    ("model", "no_decay", "error", "said"),
    [
        ([nn.Parameter(torch.ones(2))], (), TypeError, "got list: pass model, not"),
        (nn.Linear(3, 2).parameters(), (), TypeError, "got generator"),
        (nn.Linear(3, 2).requires_grad_(False), (), ValueError, "Linear has no trainable.*requires_grad_"),
        (nn.ReLU(), (), ValueError, "ReLU has no trainable parameter: it has none"),
        (nn.Sequential(nn.LazyLinear(2)), (), ValueError, "0.weight has no shape yet: run a batch"),
        (nn.Linear(3, 2), ["wieght"], ValueError, "'wieght' matches no .* Linear; .* such as weight, bias"),
        (nn.Linear(3, 2), ["bias", "*.norm"], ValueError, r"'\*.norm' matches no parameter"),
        (nn.Linear(3, 2), "bias.", ValueError, "'bias.' matches no parameter"),
    ],
)
def test_what_cannot_be_grouped_is_told(model, no_decay, error, said):
    with pytest.raises(error, match=said):
        param_groups(model, 0.1, no_decay)


def test_embeddings_may_have_options_of_their_own():
    model = torch.nn.Sequential(torch.nn.Embedding(64, 64), torch.nn.Linear(64, 64))
    groups = fusedcalib.param_groups(model, embeddings={"state_dtype": "float32"})
    optimizer = fusedcalib.AdamW(groups, state_dtype="8bit", min_8bit_size=0, backend="eager")
    model(torch.arange(8)).sum().backward()
    optimizer.step()
    assert "exp_avg" in optimizer.state[model[0].weight]
    assert "exp_avg_codes" in optimizer.state[model[1].weight]
