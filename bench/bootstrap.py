"""Find, or make, a Python that can run fusedcalib, with nothing but the standard library.

An interpreter that has all that a command needs is used as it is. Otherwise an environment is made
once, in `.venv` at the root of the repository, and used again as long as its stamp fits.
What stops the set-up is told in one sentence on stderr.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

if sys.version_info < (3, 10):  # noqa: UP036 - an older Python must get this far, to be told
    sys.exit(f"fusedcalib: Python {sys.version.split()[0]} is too old: use Python 3.10 or newer")

ROOT = Path(__file__).resolve().parents[1]
STAMP = "fusedcalib.stamp"
PIP = "pip-25.3-py3-none-any.whl"
PIP_SHA256 = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ROCM_INDEX = "https://download.pytorch.org/whl/rocm7.2"
DEBIAN = "on Debian and Ubuntu: apt install python3-venv"

# What every command needs, with the lowest version. torch for ROCm brings Triton by other names.
CORE = {"torch": (2, 11), "numpy": (1,)} | ({"triton": (3, 6)} if sys.platform == "linux" else {})
ALSO = {"triton": ("triton-rocm", "pytorch-triton-rocm")}
EXTRAS = (
    "numpy numba rich matplotlib scikit-learn "
    "pytest pytest-benchmark pytest-timeout pytest-xdist hypothesis expecttest"
)
# For tests alone, which are skipped without: 61 MB, about ten seconds.
FRAMEWORKS = ["accelerate>=1.15", "pytorch-lightning>=2.6"]


def main(work: Callable[[list[str]], int]) -> NoReturn:
    """Run a command; what stops it is one sentence and never a traceback."""
    try:
        sys.exit(work(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except ImportError as error:
        fail(f"{sys.executable} has no module {error.name!r}: install all of Python ({DEBIAN})")
    except OSError as error:
        fail(f"the set-up stopped: {error}")


def fail(sentence: str) -> NoReturn:
    sys.exit(f"fusedcalib: {sentence}")


def say(what: str) -> None:
    print(f"set-up: {what}", flush=True)


def prepare(*needed: str) -> tuple[str, dict[str, str]]:
    """A Python that has the core and `needed`, and the variables to run it with.

    It is the running one if that will do. The package is found by its path: it is not installed.
    """
    ours = Path(sys.prefix).resolve() in [folder.resolve() for folder in folders()]
    if not ours and not missing(*CORE, *needed):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return sys.executable, {**os.environ, "PYTHONPATH": path}
    return str(own_python()), {**os.environ, "PYTHONPATH": str(ROOT)}


def missing(*names: str) -> list[str]:
    """Which of these the running interpreter lacks or has too old; imports none of them."""
    return [name for name in names if numbers(installed(name)) < CORE.get(name, (0,))]


def installed(name: str) -> str | None:
    """The version of a package, by any of its names."""
    from importlib import metadata  # new in Python 3.8: at the top it would precede the check

    for known_as in (name, *ALSO.get(name, ())):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(known_as)
    return None


def numbers(version: str | None) -> tuple[int, ...]:
    """(2, 11, 0) for 2.11.0+cu130; () for what is not installed."""
    found = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, found[0].split("."))) if found else ()


def gpu() -> str:
    """The kind of GPU that the drivers offer: "nvidia", "amd" or "".

    No sign of NVIDIA is enough alone: a container sees its host's /proc/driver though it was given
    no GPU, and images take libcuda to machines that have no driver.
    """
    if sys.platform != "linux":
        return ""  # the torch on PyPI fits there, whatever the GPU
    driver = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
    with suppress(OSError):
        import ctypes

        if any(map(os.path.exists, driver)) and ctypes.CDLL("libcuda.so.1"):
            return "nvidia"
    return "amd" if os.access("/dev/kfd", os.R_OK | os.W_OK) else ""


def torch_source(kind: str) -> tuple[str, list[list[str]]]:
    """The requirement for torch with this GPU, and the pip options to try one after another.

    On Linux PyPI has the CUDA build, gigabytes that are of no use without a GPU. The local version
    in the pin keeps it out: nothing on PyPI can satisfy it.
    """
    if kind == "amd":
        return "torch>=2.11", [["--index-url", ROCM_INDEX]]
    if kind == "nvidia" or sys.platform != "linux":
        return "torch>=2.11", [[]]
    return "torch==2.13.0+cpu", [[], ["--extra-index-url", CPU_INDEX]]


def requirements(kind: str) -> list[str]:
    """All that our own environment holds, torch first."""
    torch, _ = torch_source(kind)
    # torch for a GPU brings the Triton that belongs to it, torch for the CPU brings none.
    triton = "triton==3.7.1; platform_machine == 'x86_64' or platform_machine == 'aarch64'"
    return [torch, *([triton] if torch.endswith("+cpu") else []), *EXTRAS.split()]


def folders() -> list[Path]:
    """Where our environment may be; the second is for a checkout that cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return [ROOT / ".venv", cache / "fusedcalib" / hashlib.sha256(bytes(ROOT)).hexdigest()[:12]]


def python_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fits(folder: Path, stamp: str) -> bool:
    file = folder / STAMP
    return file.is_file() and file.read_text() == stamp and python_in(folder).exists()


def own_python() -> Path:
    """The Python of our environment, made first if none fits."""
    kind = gpu()
    base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    facts = (requirements(kind), FRAMEWORKS, sys.version_info[:2], base)
    stamp = hashlib.sha256(repr(facts).encode()).hexdigest()
    for folder in folders():
        if fits(folder, stamp):
            return python_in(folder)
    folder = writable_folder()
    with (folder / STAMP).open("a") as file:
        with suppress(ImportError):  # one process at a time, where there are such locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        if not fits(folder, stamp):  # another process may have made it while this one waited
            file.truncate(0)
            make(folder, kind)
            file.write(stamp)  # last: a set-up that was cut short is never taken for a whole one
    return python_in(folder)


def writable_folder() -> Path:
    for folder in folders():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # An environment without our stamp is somebody else's, and stays as it is. Looked at
            # once: the stamp is the first thing that another set-up, just begun, puts there.
            found = [file.name for file in folder.iterdir()]
            if not found or STAMP in found:
                (folder / STAMP).touch()
                return folder
    fail(f"no environment can be made in {' or '.join(map(str, folders()))}: make one writable")


def make(folder: Path, kind: str) -> None:
    import venv

    say(f"making an environment in {folder}, once")
    for old in folder.iterdir():
        if old.name != STAMP:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    venv.create(folder, symlinks=os.name != "nt")
    add_pip(folder)
    wanted = requirements(kind)
    install(folder, wanted[:1], torch_source(kind)[1])
    install(folder, wanted, [[]])  # with the pin of torch again, so that nothing replaces it
    install(folder, [*wanted[:1], *FRAMEWORKS], [[]], needed=False)


def add_pip(folder: Path) -> None:
    """Gives an environment pip: by ensurepip, which Debian keeps apart, or else from wherever it can be."""
    python = str(python_in(folder))
    if run(python, "-I", "-m", "ensurepip").returncode:
        say("no ensurepip, so pip from elsewhere")
        if run(sys.executable, "-m", "pip", "--python", python, "install", "pip").returncode:
            wheel = folder / PIP
            wheel.write_bytes(downloaded_pip())
            run(python, "-I", f"{wheel}/pip", "install", "--no-index", str(wheel))


def downloaded_pip() -> bytes:
    from urllib.parse import urljoin
    from urllib.request import urlopen

    page = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    try:
        with urlopen(page, timeout=60) as answer:
            links = re.findall(rf'href="([^"#]*{re.escape(PIP)})', answer.read().decode())
        with urlopen(urljoin(page, (links or [PIP])[0]), timeout=60) as answer:
            content: bytes = answer.read()
        if hashlib.sha256(content).hexdigest() == PIP_SHA256:
            return content
        raise ValueError("not the file it should be")
    except (OSError, ValueError) as error:
        fail(f"no pip here, and no {PIP} from {page} ({error}): install pip ({DEBIAN})")


def install(folder: Path, wanted: list[str], sources: list[list[str]], needed: bool = True) -> None:
    say(f"installing {', '.join(name.split(';')[0] for name in wanted)}")
    # Wheels only: there may be no compiler, and an older wheel beats a build that fails.
    pip = [str(python_in(folder)), "-I", "-m", "pip", "install", "--only-binary", ":all:"]
    pip.append("--no-compile")  # Python compiles what is imported, a quarter of it: half a minute less
    for source in sources:
        done = run(*pip, "--log", str(folder / "pip.log"), *source, *wanted)
        if not done.returncode:
            return
    reason = (re.findall(r"^ERROR: (.*)", done.stderr, re.MULTILINE) or ["no reason given"])[-1]
    if needed:
        fail(
            f"pip could not install what is needed ({reason}): let it reach pypi.org and "
            "download.pytorch.org, or point it at a folder of wheels, or use a Python that has it all"
        )
    say(f"not installed ({reason}): tests that need them are skipped")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    # PIP_USER would make pip refuse an environment.
    variables = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace")
