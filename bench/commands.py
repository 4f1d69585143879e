"""The commands of `python -m fusedcalib` and `python3 bench/run.py`: a line each, and nowhere else.

Read also by a Python that has nothing installed.
"""

COMMANDS = {  # name: (module in fusedcalib whose main(arguments) it is, what it does)
    "plan": ("bench.plan", "what a step costs on so many GPUs, on paper"),
    "bench": ("bench.tool", "times the step of any rule, beside torch.optim's and others'"),
    "profile": ("bench.profiles", "what the kernels of a step take of a GPU, on paper or measured"),
    "env": ("bench.env", "versions, devices and what is missing here"),
    "papers": ("bench.papers", "what the papers claim, in miniature"),
    "cifar": ("bench.cifar", "trains the networks of the papers on CIFAR"),
}
