"""docs/frameworks.md and distributed.md as they stand and what they claim, with what is installed."""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from libraries import library
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fusedcalib
from fusedcalib.groups import param_groups

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXTS = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("frameworks", "distributed")}
RECIPE = re.compile(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
RECIPES = [(page, recipe) for page, text in TEXTS.items() for recipe in RECIPE.finditer(text)]
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:::{theirs}") for theirs in ("pytorch_lightning", "torch.utils.data")
]
LIBRARIES = {"pytorch_lightning", "accelerate", "transformers", "timm", "torchtitan", "deepspeed"}


def imported(source):
    tree = ast.walk(ast.parse(source))
    names = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    return {name.split(".")[0] for name in names}


def test_every_library_has_its_recipe():
    assert {name for _, recipe in RECIPES for name in imported(recipe[2])} >= LIBRARIES
    assert sum(text.count("```python") for text in TEXTS.values()) == len(RECIPES)


@pytest.fixture
def only_rank(monkeypatch):
    """What torchrun tells the only rank; any process group is taken down again."""
    variables = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def titled(value):
    return value if isinstance(value, str) else value[1]


@pytest.mark.parametrize(("page", "recipe"), RECIPES, ids=titled)
def test_the_recipe_runs(page, recipe, tmp_path, monkeypatch, capsys, request):
    for name in LIBRARIES & imported(recipe[2]):
        library(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if page == "distributed":
        if not dist.is_available():
            pytest.skip("this torch has no torch.distributed")
        request.getfixturevalue("only_rank")
    line = TEXTS[page][: recipe.start(2)].count("\n")
    namespace = {"__name__": "frameworks"}
    exec(compile("\n" * line + recipe[2], str(DOCS / f"{page}.md"), "exec"), namespace)
    if not {"trainer", "optimizer"} & namespace.keys():  # it only defines a class
        return
    trainer = namespace.get("trainer")
    optimizer = getattr(trainer, "optimizer", None) or namespace.get("optimizer") or trainer.optimizers[0]
    while not isinstance(optimizer, fusedcalib.FusedOptimizer):  # accelerate's or ZeRO's wrapper
        optimizer = getattr(optimizer, "optimizer", None) or optimizer.optim
    assert optimizer.param_groups[0]["centralize"]
    assert optimizer.state or "config" in namespace


# Trainings that must end where torch.optim's end, also if they start from a checkpoint in the middle


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
    return torch.nn.Sequential(*layers)


def data():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(48, 8), torch.randint(0, 3, (48,)))


def parts(cls, model):
    optimizer = cls(param_groups(model, weight_decay=0.1), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)


def lightning_run(cls, folder, start, **options):
    lightning = library("pytorch_lightning")
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer, scheduler = parts(cls, self)
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", callbacks=[keep], **quiet, **options)
    model = Module()
    trainer.fit(model, DataLoader(data(), 8), ckpt_path=start and start / "epoch=1.ckpt")
    return model.net


def accelerate_run(cls, folder, start, **options):
    library("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, **options)
    model = network()
    model, optimizer, scheduler, loader = accelerator.prepare(
        model, *parts(cls, model), DataLoader(data(), 8)
    )
    if start:
        accelerator.load_state(start / "1")
    for epoch in range(2 if start else 0, 4):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.save_state(folder / str(epoch))
    return model


class WithLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels):
        return {"loss": cross_entropy(self.net(x), labels)}


def transformers_run(cls, folder, start, by_class=False, **options):
    transformers = library("transformers")
    options = {
        "num_train_epochs": 4,
        "save_strategy": "epoch",
        "weight_decay": 0.1,
        "use_cpu": True,
        **options,
    }
    arguments = transformers.TrainingArguments(folder, per_device_train_batch_size=8, report_to=[], **options)
    model = WithLoss()
    made = (
        {"optimizer_cls_and_kwargs": (cls, {"lr": 0.01})} if by_class else {"optimizers": parts(cls, model)}
    )
    examples = [{"x": x, "labels": y} for x, y in data()]
    saved = sorted(start.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[1] if start else None
    transformers.Trainer(model, arguments, train_dataset=examples, **made).train(resume_from_checkpoint=saved)
    return model.net


@pytest.mark.parametrize(
    ("run", "options", "atol"),
    [
        (lightning_run, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, 1e-5),
        (accelerate_run, {}, 1e-5),
        (transformers_run, {}, 1e-5),
        *(
            pytest.param(*setting, marks=pytest.mark.slow)
            for setting in (
                (lightning_run, {}, 1e-5),
                # what differs by rounding may round apart
                (lightning_run, {"precision": "bf16-mixed"}, 5e-3),
                (accelerate_run, {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"}, 5e-3),
                (transformers_run, {"by_class": True, "gradient_accumulation_steps": 2}, 1e-5),
            )
        ),
    ],
    ids=lambda value: getattr(value, "__name__", "+".join(value) if isinstance(value, dict) else None),
)
def test_trainings_end_where_torchs_end(run, options, atol, tmp_path):
    ours, theirs = fusedcalib.AdamW, torch.optim.AdamW
    expected = run(ours, tmp_path / "ours", None, **options).state_dict()
    resumed = run(ours, tmp_path / "resumed", tmp_path / "ours", **options).state_dict()
    elsewhere = [
        run(theirs, tmp_path / "theirs", None, **options),
        run(theirs, tmp_path / "moved", tmp_path / "ours", **options),
    ]
    for name, start in network().named_parameters():
        assert (expected[name] - start).abs().max() > 0.01
        assert torch.equal(resumed[name], expected[name])
        for model in elsewhere:
            torch.testing.assert_close(model.state_dict()[name], expected[name], rtol=0, atol=atol)


def test_param_groups_decay_what_trainer_decays():
    transformers = library("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    ours = {
        name for group in param_groups(model, 0.1) if group["weight_decay"] for name, _ in group["params"]
    }
    assert ours == set(transformers.Trainer.get_decay_parameter_names(None, model))
