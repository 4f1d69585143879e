"""The same training in one process, in several, and across a change of their number: curves on each other.

python examples/transformer/compare.py --run out/compare   trains in every way, then draws
python examples/transformer/compare.py                     draws what results/ has
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
STEPS, SAVED = 150, 75
SETTING = ("--steps", str(STEPS), "--context", "64", "--save-every", str(SAVED), "--log-every", "25")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # as many as torchrun gives a rank


class Way(NamedTuple):
    """One way to train, and its line: a colour of Okabe and Ito's palette, dashes and width."""

    name: str
    mode: str
    ranks: int
    colour: str
    dashes: Any = "-"
    width: float = 1.6
    resumes: str = ""
    dtype: str = "float32"


WAYS = {
    "single": Way("1 process", "single", 1, "#222222", width=5.0),
    "ddp-2": Way("DDP, 2 ranks", "ddp", 2, "#E69F00", width=3.4),
    "fsdp2-2": Way("FSDP2, 2 ranks", "fsdp2", 2, "#56B4E9", width=2.2),
    "fsdp2-4": Way("FSDP2, 4 ranks", "fsdp2", 4, "#0072B2", (0, (4, 2))),
    "fsdp2-tp-4": Way("FSDP2 x TP, 2 x 2 ranks", "fsdp2-tp", 4, "#D55E00", (0, (1, 1.5))),
    "resumed-4": Way("saved by 2, resumed by 2 x 2", "fsdp2-tp", 4, "#CC79A7", (3, (3, 3)), 1.6, "fsdp2-2"),
    "resumed-1": Way("saved by 2, resumed by 1", "single", 1, "#009E73", (0, (3, 3)), 1.6, "fsdp2-2"),
}
# The same in fp64: what then differs is no rounding of fp32.
EXACT = {
    "single-fp64": Way("1 process, fp64", "single", 1, "#222222", dtype="float64"),
    "fsdp2-tp-4-fp64": Way("FSDP2 x TP, fp64", "fsdp2-tp", 4, "#6b6b6b", dtype="float64"),
}


def run(folder: Path) -> dict[str, Any]:
    """Trains in every way that the folder does not have yet, one after the other; returns losses by step."""
    import torch

    curves = {}
    for key, way in {**WAYS, **EXACT}.items():
        out = folder / key
        file = out / "metrics.jsonl"
        launch = [sys.executable]
        if way.ranks > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={way.ranks}"]
        command = [*launch, str(HERE / "train.py"), "--parallel", way.mode, *SETTING, "--out", str(out)]
        command += ["--dtype", way.dtype]
        if way.resumes:
            command += ["--resume", str(folder / way.resumes / f"step-{SAVED}")]
        if not file.exists() or "held_out" not in file.read_text():
            print(f"\n{way.name}", flush=True)
            subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD})
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        curves[key] = {
            "steps": [row["step"] for row in rows if "step" in row],
            "loss": [row["loss"] for row in rows if "step" in row],
            **rows[-1],
        }
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"device": gpu or "cpu", "versions": versions, "setting": SETTING, "curves": curves}


def draw(results: dict[str, Any], path: Path) -> None:
    """Losses above, and below how far they lie from those of one process."""
    from matplotlib import pyplot

    curves = results["curves"]
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    style |= {"font.size": 11, "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True}
    with pyplot.rc_context(style):
        figure, (above, below) = pyplot.subplots(
            2, 1, figsize=(9, 7), sharex=True, layout="constrained", height_ratios=(3, 2)
        )
        for key, way in {**WAYS, **EXACT}.items():
            steps, loss = curves[key]["steps"], curves[key]["loss"]
            line: dict[str, Any] = {"color": way.colour, "linestyle": way.dashes}
            if key in WAYS:
                above.plot(steps, loss, linewidth=way.width, label=way.name, **line)
            if way.mode != "single" or way.resumes:
                below.plot(steps, apart(curves, key, "single-fp64" if key in EXACT else "single"), **line)
        for axes in (above, below):
            axes.axvline(SAVED + 0.5, color="#6b6b6b", linewidth=1, linestyle=":")
        above.annotate("checkpoint", (SAVED + 2, above.get_ylim()[1]), va="top", color="#6b6b6b")
        above.set(ylabel="training loss (bits/byte)", xlim=(0, STEPS))
        above.set_title("One loss curve, whatever the ranks", fontweight="bold", fontsize=13)
        above.legend(frameon=False, handlelength=4)
        below.set(ylabel="|difference to 1 process|\n(bits/byte, log scale)", xlabel="step", yscale="log")
        grey = EXACT["fsdp2-tp-4-fp64"]
        most = max(y or 0 for y in apart(curves, "fsdp2-tp-4-fp64", "single-fp64"))
        place: dict[str, Any] = {"xytext": (0, -40), "textcoords": "offset points", "ha": "center"}
        below.annotate(f"{grey.name} ({most:.0e} at most)", (110, most), color=grey.colour, **place)
        said = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        title = "Ranks round differently, and training magnifies that; in fp64 far less is to be magnified"
        below.set_title(f"{title}\n{results['device']}, {said}", fontsize=10)
        figure.savefig(path, dpi=100)


def apart(curves: dict[str, Any], key: str, other: str) -> list[float | None]:
    """How far the losses of a way lie from those of another; None, which is not drawn, where equal."""
    known = dict(zip(curves[other]["steps"], curves[other]["loss"], strict=True))
    return [abs(y - known[x]) or None for x, y in zip(curves[key]["steps"], curves[key]["loss"], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, metavar="DIR", help="train first, with outputs there")
    options = parser.parse_args()
    file = RESULTS / "curves.json"
    if options.run:
        file.write_text(json.dumps(run(options.run)) + "\n")
    draw(json.loads(file.read_text()), RESULTS / "curves.png")
    print(f"wrote {RESULTS / 'curves.png'}")


if __name__ == "__main__":
    main()
