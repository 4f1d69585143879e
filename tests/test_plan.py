"""A plan on paper: its shapes are those that torch makes, its bytes those of the benchmarks."""

import json
import math
from math import prod

import pytest
from plan_subjects import ALONE, TINY, placements_of
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from fusedcalib import __main__ as command
from fusedcalib.bench import cli
from fusedcalib.bench.measure import host
from fusedcalib.bench.measure.baselines import METHODS
from fusedcalib.bench.measure.method import SUBJECTS
from fusedcalib.bench.models import architectures, shardings
from fusedcalib.bench.models.architectures import Model, Param
from fusedcalib.bench.models.shardings import Sharding
from fusedcalib.bench.models.traffic import DTYPES
from fusedcalib.bench.predict import gpus, plan_steps

ADAMW = SUBJECTS["AdamW"]


# -- parameter lists


@pytest.mark.parametrize(
    ("name", "params", "tensors"),
    [
        ("gpt2", 124_439_808, 148),
        ("llama3-8b", 8_030_261_248, 291),
        ("llama3-70b", 70_553_706_496, 723),
        ("llama3-405b", 405_853_388_800, 1137),
    ],
)
def test_models_have_their_published_number_of_parameters(name, params, tensors):
    model = architectures.get(name)
    assert (model.count, len(model.params)) == (params, tensors)
    assert len({param.name for param in model.params}) == tensors


CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
    "head_dim": 64,
}


def test_a_config_file_is_a_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    assert architectures.from_config(path).count == 1_235_814_400  # Llama-3.2-1B, as published
    path.write_text(json.dumps({**CONFIG, "tie_word_embeddings": False}))
    assert architectures.from_config(path).params[-1] == Param("lm_head.weight", (128_256, 2048))


# -- layouts


UNEVEN = (Sharding(1, 3, 1), Sharding(2, 7, 1), Sharding(1, 64, 1), Sharding(1, 200, 1))


@pytest.mark.parametrize("layout", UNEVEN, ids=str)
@pytest.mark.parametrize("param", TINY.params[:10], ids=lambda param: param.name)
def test_uneven_parts_are_those_of_torch(param, layout):
    sizes = [size for _, size in layout.mesh.dims]
    total = 0
    for rank in range(layout.fsdp):
        coordinate = [0, rank] if layout.replicate > 1 else [rank]
        shape, _ = _compute_local_shape_and_global_offset(
            param.shape, sizes, coordinate, placements_of(param, layout)
        )
        assert shardings.local_shape(param, layout, rank) == shape
        total += prod(shape)
    assert total == prod(param.shape)


@pytest.mark.parametrize("layout", [Sharding(1, 2, 4), Sharding(1, 1, 2), Sharding(2, 3, 4)], ids=str)
@pytest.mark.parametrize("param", TINY.params[1:11], ids=lambda param: param.name)
def test_parts_under_tensor_parallel_are_those_of_torch(param, layout):
    """Where tensor parallel divides: elsewhere torch's strided shards are not what FSDP2 cuts."""
    sizes = [size for _, size in layout.mesh.dims]
    for fsdp in range(layout.fsdp):
        for tp in range(layout.tp):
            ranks = {"replicate": 0, "fsdp": fsdp, "tp": tp}
            coordinate = [ranks[name] for name, _ in layout.mesh.dims]
            shape, _ = _compute_local_shape_and_global_offset(
                param.shape, sizes, coordinate, placements_of(param, layout)
            )
            assert shardings.local_shape(param, layout, fsdp, tp) == shape


def test_the_first_rank_has_most_and_the_empty_are_counted():
    model = Model("m", (Param("a.weight", (10, 4)), Param("b.weight", (3,))))
    layout = Sharding(1, 8, 1)
    (first, second) = shardings.shards(model, layout)
    assert (first.shape, second.shape) == ((2, 4), (1,))  # of 10 rows over 8: 2 2 2 2 2 0 0 0
    assert second.offset == 8
    assert shardings.empty_somewhere(model, layout) == 2
    assert shardings.empty_somewhere(model, Sharding(1, 5, 1)) == 1
    assert shardings.empty_somewhere(model, Sharding(8, 1, 1)) == 0


# -- our step


def test_long_rows_and_cut_rows_read_the_gradient_once_more():
    def widths(name, model, layout=ALONE):
        found = shardings.shards(model, layout)
        step = plan_steps.step_of(name, ADAMW, "fp32", found, layout)
        return step.moved / sum(shard.elements * count for shard, count in found.items())

    rows = [Model("m", (Param("fc.weight", (4, columns)),)) for columns in (4096, 32_768, 32_769)]
    assert [widths("own_gc", model) for model in rows] == [28, 28, 32]
    assert [widths("own_plain", model) for model in rows] == [28, 28, 28]
    down = Model("m", (Param("mlp.down_proj.weight", (64, 64)),))
    assert widths("own_gc", down, Sharding(1, 1, 8)) == 32
    assert widths("own_chain", down, Sharding(1, 1, 8)) == 44


def test_rows_that_are_cut_are_summed_in_one_all_reduce():
    found = shardings.shards(TINY, Sharding(1, 3, 2))
    step = plan_steps.step_of("own_gc", ADAMW, "fp32", found, Sharding(1, 3, 2))
    # o and down have 96 rows, 32 of them on a GPU, in 2 layers.
    assert step.collectives == (plan_steps.Collective("tp", 8 * 2 * 2 * 32),)
    theirs = plan_steps.step_of("eager_gc_fused", ADAMW, "fp32", found, Sharding(1, 3, 2))
    assert theirs.collectives == (plan_steps.Collective("tp", 4 * 32),) * 4


# -- bytes


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16+fp32-state"])
@pytest.mark.parametrize("name", ["own_plain", "own_gc", "own_clip", "own_chain", "own_ema", "own_noise"])
@pytest.mark.parametrize("subject", ["AdamW", "AdamW amsgrad", "SGD", "SGD momentum", "Lion", "Adan"])
def test_bytes_are_those_of_the_benchmarks(subject, name, dtypes):
    """Case by case as bench/measure/case.py writes them beside the times it measures."""
    found = shardings.shards(Model("m", (Param("fc.weight", (8, 64)),)), ALONE)
    step = plan_steps.step_of(name, SUBJECTS[subject], dtypes, found, ALONE)
    states = SUBJECTS[subject].states()
    assert step.moved == 8 * 64 * METHODS[name].extras.width(DTYPES[dtypes], states)


@pytest.mark.parametrize(
    ("name", "width", "launches"),
    [
        ("torch_fused", 28, 2),
        ("torch_foreach", 84, 8),
        ("eager_gc_fused", 40, 4),
        ("eager_clip", 40, 4),
        ("eager_ema", 40, 3),
        ("eager_noise", 44, 4),
        ("eager_chain", 80, 9),
    ],
)
def test_what_is_composed_moves_what_its_operations_do(name, width, launches):
    found = shardings.shards(Model("m", (Param("fc.weight", (8, 64)),)), ALONE)
    step = plan_steps.step_of(name, ADAMW, "fp32", found, ALONE)
    assert (step.moved, step.launches) == (8 * 64 * width, launches)


@pytest.mark.parametrize(
    ("counts", "most", "launches"),
    [
        ([1] * 36, 36, 1),
        ([1] * 37, 36, 2),
        ([320 * 65_536], 36, 1),
        ([320 * 65_536 + 1], 36, 2),
        ([319 * 65_536, 65_537, 1], 36, 2),  # a tensor in two launches
        ([0, 0], 36, 0),
    ],
)
def test_a_multi_tensor_launch_takes_so_many_tensors_and_blocks(counts, most, launches):
    assert plan_steps.multi_tensor_launches(counts, most) == launches


# -- times


def test_a_time_is_the_longer_of_memory_and_host_and_what_is_waited_for():
    step = plan_steps.Step("own_clip", "", 3_350_000_000, 0, 10, (plan_steps.Collective("fsdp", 8),))
    h100 = gpus.GPUS["h100"]
    time = gpus.time_of(step, 100, Sharding(1, 64, 1), h100, 0.5)
    assert time.memory == pytest.approx(2e-3)
    assert time.host == pytest.approx(100 * gpus.OWN_TENSOR + 10 * gpus.OWN_LAUNCH)
    # 7 others in a node and 3 levels between 8 nodes, both ways.
    assert time.collectives == pytest.approx(6.8e-6 + 2 * (7 * 0.6e-6 + 3 * 5e-6), rel=1e-3)
    assert time.total == pytest.approx(time.memory + time.collectives)
    assert time.bound == "memory"
    assert gpus.time_of(step, 10_000, Sharding(1, 64, 1), h100, 1).bound == "host"


def test_a_dimension_within_a_node_never_leaves_it():
    sent = plan_steps.Collective("tp", 0)
    h100 = gpus.GPUS["h100"]
    assert gpus.all_reduce(sent, Sharding(1, 64, 8), h100) == pytest.approx(6.8e-6 + 2 * 7 * 0.6e-6)
    across = plan_steps.Collective("fsdp", 450_000_000)  # each GPU's neighbour in fsdp is on another node
    expected = 6.8e-6 + 2 * 5e-6 + 2 * 0.5 * 450_000_000 / 50e9
    assert gpus.all_reduce(across, Sharding(1, 2, 8), h100) == pytest.approx(expected)


def test_the_host_is_measured_without_kernels():
    measured = host.each_tensor(rounds=1, backend="eager")  # compiles nothing
    assert list(measured) == ["own", "torch"]
    assert all(0 < seconds < 1e-3 for seconds in measured.values())


# -- the command


def test_a_plan_is_printed_written_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    data, figure = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["plan", "--model", "gpt2", "--gpus", "8,64", "--json", str(data), "--plot", str(figure)]
    assert command.main(arguments) == 0
    assert "gpt2: 0.1244B parameters in 148 tensors" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    results = json.loads(data.read_text())
    assert [found["gpus"] for found in results["plans"]] == [8, 64]
    for found in results["plans"]:
        assert [step["name"] for step in found["steps"]] == list(plan_steps.ROWS)
        for step in found["steps"]:
            seconds = step["seconds"]
            assert math.isclose(step["moved"] / 3.35e12, seconds["memory"])
            assert seconds["total"] == max(seconds["memory"], seconds["host"]) + seconds["collectives"]


def test_what_torch_has_not_is_said(capsys):
    assert command.main(["plan", "--model", "gpt2", "--optimizer", "Lion"]) == 0
    said = capsys.readouterr().out
    assert "not counted: torch foreach, torch fused" in said
    assert ": torch.optim has no Lion" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llama9"], "no model is named 'llama9'; there are gpt2, llama3-8b"),
        (["--gpus", "12", "--tp", "8"], "12 GPUs are no multiple of tp * replicate = 8"),
        (["--gpus", "8", "--fsdp", "3"], "8 GPUs are no multiple of fsdp * tp = 3"),
        (["--gpus", "8", "--fsdp", "2", "--replicate", "2"], "2 * 2 * 1 = 4 is not 8 GPUs"),
        (["--gpus", "16", "--tp", "16"], "tp 16: the 8 heads of keys of llama3-8b cannot be split so"),
        (["--model", "gpt2", "--gpus", "8", "--tp", "2"], "how tensor parallel cuts transformer.wte.weight"),
        (["--shapes", "absent.json"], "absent.json cannot be read"),
        (["--hf-config", "absent.json"], "absent.json cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(arguments, said, capsys):
    assert command.main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fusedcalib plan: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "text", "said"),
    [
        ("--shapes", "[", "is not JSON"),
        ("--shapes", "{}", "holds no list of parameters"),
        ("--shapes", '[{"name": "a", "shape": [2, 0]}]', "entry 0"),
        ("--shapes", '[{"shape": [2]}]', "entry 0"),
        ("--hf-config", "[]", "not a config.json"),
        ("--hf-config", '{"model_type": "bert"}', "model_type 'bert' is not known here"),
        ("--hf-config", json.dumps({**CONFIG, "mlp_bias": True}), "mlp_bias adds parameters"),
        ("--hf-config", json.dumps({**CONFIG, "vocab_size": None}), "vocab_size must be a positive integer"),
    ],
)
def test_a_file_that_is_no_model_is_said_in_a_sentence(flag, text, said, tmp_path, capsys):
    path = tmp_path / "file.json"
    path.write_text(text)
    assert command.main(["plan", flag, str(path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "8,x", "-8", "1.5", ""])
def test_a_number_of_gpus_is_a_whole_number(value, capsys):
    with pytest.raises(SystemExit):
        command.main(["plan", "--gpus", value])
    assert "is not a whole number above 0" in capsys.readouterr().err


def test_a_list_of_shapes_is_enough(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text('[{"name": "fc.weight", "shape": [16, 10]}, {"name": "fc.bias", "shape": [16]}]')
    assert command.main(["plan", "--shapes", str(path), "--gpus", "32"]) == 0
    assert "32 GPUs (fsdp 32): 11 parameters on the fullest" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["plam"]])
def test_an_unknown_command_is_told_the_known_ones(arguments, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"the commands are {', '.join(cli.USERS)}" in error


def test_help_names_every_command(capsys):
    assert command.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in cli.USERS)
