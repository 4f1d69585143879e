"""Train a byte-level transformer on the standard library's source, on one device or on many.

python examples/transformer/train.py
torchrun --nproc-per-node=2 examples/transformer/train.py --parallel ddp|fsdp2|tp
torchrun --nproc-per-node=4 examples/transformer/train.py --parallel fsdp2-tp

A step's batch is the same whatever the number of ranks, and each works on its share of it: so is the loss.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs without an installation

import data
import parallel
import torch
import torch.distributed as dist
from log import Log
from model import Transformer
from torch import Tensor, nn
from torch.nn import functional

import fusedcalib

# A checkpoint goes on only with the same; what is said of ranks may differ.
SETTINGS = ("layers", "width", "heads", "context", "batch", "seed", "dtype")
HELD_OUT_BATCHES = 4


def rate(step: int, options: argparse.Namespace) -> float:
    """The learning rate of a step, counted from 1: up in a line, then down a cosine to a tenth."""
    if step <= options.warmup:
        return float(options.lr * step / options.warmup)
    done = (step - options.warmup) / max(options.steps - options.warmup, 1)
    return float(options.lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0))))


def optimizer_of(model: nn.Module, options: argparse.Namespace) -> fusedcalib.FusedOptimizer:
    """AdamW, or Muon with AdamW beside it, with clipping, noise, centring and average, all in the step.

    Muon's updates are made as large as AdamW's, so that both take one learning rate.
    """
    if options.optimizer == "muon":
        groups = fusedcalib.muon_groups(model, weight_decay=options.weight_decay)
        own = {"adjust_lr_fn": "match_rms_adamw", "centralize": options.centralize}
    else:
        groups = fusedcalib.param_groups(model, options.weight_decay, centralize=options.centralize)
        own = {}
    make: Any = fusedcalib.Muon if options.optimizer == "muon" else fusedcalib.AdamW
    found: fusedcalib.FusedOptimizer = make(
        groups,
        **own,
        lr=options.lr,
        betas=(0.9, 0.95),
        max_grad_norm=options.max_grad_norm or None,
        ema_decay=options.ema_decay or None,
        noise=fusedcalib.GradientNoise(options.noise) if options.noise else None,
        master_weights=options.master_weights,
        state_dtype=options.state_dtype,
        stochastic_rounding=options.stochastic_rounding,
        seed=options.seed,
        backend=options.backend,
        offload="states" if options.offload else None,
    )
    return found


def bits(net: nn.Module, sequences: Tensor) -> Tensor:
    """Mean loss of sequences [n, context + 1], in bits a byte."""
    scores = net(sequences[:, :-1]).flatten(0, 1)
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return functional.cross_entropy(exact, sequences[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def validated(net: nn.Module, text: Tensor, share: parallel.Share, options: argparse.Namespace) -> float:
    """Bits a byte of text held out."""
    sequences = data.spaced(text, HELD_OUT_BATCHES * options.batch, options.context).to(options.device)
    losses = [bits(net, share.of(part)) for part in torch.split(sequences, options.batch)]
    return share.mean(torch.stack(losses).mean()).item()


def train(options: argparse.Namespace) -> None:
    """All steps and the validation.

    Raises:
        ValueError: options that do not fit each other or the number of ranks.
    """
    text = data.read(options.data)
    torch.manual_seed(options.seed)
    model = Transformer(options.layers, options.width, options.heads, options.context)
    model.to(options.device, getattr(torch, options.dtype))
    size = sum(p.numel() for p in model.parameters())
    net, share = parallel.spread(model, options.parallel, options.tp, options.device)
    if options.batch % share.count:
        raise ValueError(f"--batch {options.batch} cannot be divided into {share.count} shares")
    optimizer = optimizer_of(model, options)
    if options.release:
        if options.parallel == "ddp":
            raise ValueError(
                "--release and DDP, which keeps all gradients, do not go together: --parallel fsdp2"
            )
        fusedcalib.enable_gradient_release(model, optimizer)
    settings = {key: getattr(options, key) for key in SETTINGS}
    start = parallel.load(options.resume, model, optimizer, settings) if options.resume else 0
    with Log(options.out, options.steps, start) as log:
        log.say(
            f"{size / 1e6:.2f}M parameters, {dist.get_world_size()} x {options.device.type}, "
            f"{options.parallel}, step by {optimizer.backend}, {len(text.train) / 1e6:.1f} MB of text"
        )
        for step in range(start + 1, options.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, options)
            sequences = data.drawn(text.train, step, options.seed, options.batch, options.context)
            loss = bits(net, share.of(sequences).to(options.device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            log.step(step, rate(step, options), loss, optimizer.grad_norm)
            if step % options.log_every == 0 or step == options.steps:
                log.flush(share.mean, options.batch * options.context)
            if options.save_every and (step % options.save_every == 0 or step == options.steps):
                parallel.save(options.out / f"step-{step}", model, optimizer, {"step": step, **settings})
        found = {"held_out": validated(net, text.held_out, share, options)}
        if options.ema_decay:
            with optimizer.ema_weights():
                found["held_out_average"] = validated(net, text.held_out, share, options)
        log.write(found)
        log.say("held-out text, bits/byte: " + ", ".join(f"{key} {loss:.4f}" for key, loss in found.items()))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--parallel", choices=parallel.MODES, help="how; single alone, else ddp, unless said")
    add("--tp", type=int, default=2, help="tensor parallel ranks of fsdp2-tp")
    add("--device", default="auto", help="cpu or cuda; auto takes GPUs where there are some")
    add("--data", type=Path, help="folder of *.py files; the standard library unless said")
    for name, value, about in (
        ("steps", 200, "of the whole training, also if resumed"),
        ("batch", 16, "sequences a step, over all ranks"),
        ("context", 128, "bytes a sequence"),
        ("layers", 4, "blocks"),
        ("width", 96, "of the residual stream"),
        ("heads", 4, "of the attention"),
        ("warmup", 20, "steps"),
        ("seed", 0, "of weights, batches and noise"),
        ("log-every", 10, "steps"),
        ("save-every", 0, "steps; 0 saves nothing"),
    ):
        add(f"--{name}", type=int, default=value, help=about)
    for name, rate_or_limit, about in (
        ("lr", 3e-3, "highest learning rate"),
        ("weight-decay", 0.1, "of matrices"),
        ("max-grad-norm", 1.0, "clips by the norm of all gradients"),
        ("ema-decay", 0.98, "of an average of the weights; 0 is none"),
        ("noise", 0.0, "variance of annealed noise on the gradient; 0 is none"),
    ):
        add(f"--{name}", type=float, default=rate_or_limit, help=about)
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: of hidden matrices")
    add("--centralize", action="store_true", help="remove the mean of each row of the gradient")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float64"), help="of the weights")
    add("--master-weights", choices=("split16", "split8", "float32"), help="beside bf16 weights")
    add("--state-dtype", help="of the states: float32, bfloat16, 8bit, bfloat16_stochastic; the weights' own")
    add("--stochastic-rounding", action="store_true", help="of bf16 weights, or of the last bit of split8")
    add(
        "--release",
        action="store_true",
        help="step within backward and free gradients; needs --max-grad-norm 0",
    )
    add("--backend", default="auto", help="of the optimizer: auto, triton, numba or eager")
    add("--offload", action="store_true", help="keep its states in the host's memory, of a GPU alone")
    add("--out", type=Path, help="folder of metrics.jsonl and checkpoints; nothing is written unless said")
    add("--resume", type=Path, help="a checkpoint, such as OUT/step-100, of any number of ranks")
    options = parser.parse_args(arguments)
    if options.save_every and not options.out:
        parser.error("--save-every needs --out, the folder to save to")
    if options.release and options.max_grad_norm:
        parser.error("--release frees gradients before their norm is known: --max-grad-norm 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    own = not dist.is_initialized()
    options.device = parallel.join(options.device)
    options.parallel = options.parallel or ("ddp" if dist.get_world_size() > 1 else "single")
    try:
        train(options)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    finally:
        if own:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
