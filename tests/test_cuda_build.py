"""What nvcc made of the CUDA kernels: no spills, the instructions that they were written for, and other architectures.

Looks at the objects of the extension's own build (`make build`); they are brought up to date first.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
SM80 = sorted(path.stem for path in (ROOT / "csrc/cuda/sm80").glob("*.cu"))
SM90 = sorted(path.stem for path in (ROOT / "csrc/cuda/sm90").glob("*.cu"))


@functools.cache
def built() -> bool:
    """Whether the extension was built here with CUDA kernels; they are then up to date."""
    if not (TREE / "cuda").is_dir() or not shutil.which("cmake"):
        return False
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    command = ["cmake", "--build", str(TREE), "-j", jobs, "--target", "cuda_objects"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return True


@pytest.fixture(autouse=True)
def _built() -> None:
    if not built():
        pytest.skip("the extension was not built here with CUDA kernels: make build RESNET_FUSED_CUDA=1")


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel for one architecture."""

    kernel: str
    arch: str
    registers: int
    spilled_bytes: int


def usage(report: str) -> list[Usage]:
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        kernel, arch = re.match(r"(\w+)' for '(\w+)'", part).groups()
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", part)))
        found.append(Usage(kernel, arch, int(re.search(r"Used (\d+) registers", part)[1]), spills))
    return found


def report(folder: str, name: str) -> str:
    return (TREE / "cuda" / folder / f"{name}.o.ptxas").read_text()


def test_usage_reads_ptxas() -> None:
    text = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers\n"
    )
    assert usage(text) == [Usage("_Z1kv", "sm_80", 40, 16)]


@pytest.mark.parametrize(("folder", "name"), [("sm80", n) for n in SM80] + [("sm90", n) for n in SM90])
def test_resources(folder: str, name: str) -> None:
    """No spills; no warning that ptxas ignored setmaxnreg (C7508) or serialised wgmma (C7510, C7513)."""
    text = report(folder, name)
    kernels = usage(text)
    assert kernels
    assert [k for k in kernels if k.spilled_bytes] == []
    assert not re.search(r"warning|C75\d\d|Potential Performance Loss", text), text


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton's wheel has the disassemblers too."""
    import triton

    cache = (TREE / "CMakeCache.txt").read_text()
    nvcc = re.search(r"^CUDA_NVCC:INTERNAL=(.+)$", cache, re.MULTILINE)
    folders = [Path(nvcc[1]).parent] if nvcc else []
    folders.append(Path(triton.__file__).parent / "backends/nvidia/bin")
    return next((str(f / name) for f in folders if (f / name).is_file()), shutil.which(name))


def disassembly(folder: str, name: str) -> str:
    pytest.importorskip("triton")
    if (cuobjdump := tool("cuobjdump")) is None:
        pytest.skip("needs cuobjdump")
    command = [cuobjdump, "-sass", str(TREE / "cuda" / folder / f"{name}.o")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", [n for n in SM80 if "bf16" in n])
def test_sm80_instructions(name: str) -> None:
    sass = disassembly("sm80", name)
    copies = () if name.startswith("stem") else ("LDGSTS.E.BYPASS.128",)  # its 3 channels are gathered
    for instruction in ("HMMA.16816", "LDSM.16.M88.4", *copies):
        assert instruction in sass


@pytest.mark.parametrize("name", [n for n in SM90 if "bf16" in n])
def test_sm90_instructions(name: str) -> None:
    sass = disassembly("sm90", name)
    for instruction in ("HGMMA.64x", "UTMALDG", "SYNCS"):
        assert instruction in sass


@pytest.mark.parametrize("name", SM90)
def test_fences_of_the_whole_gpu(name: str) -> None:
    """Two, in a cluster's barriers; one whenever a stage is let go would take longer than the products."""
    kernels = disassembly("sm90", name).split("Function :")[1:]
    fences = [kernel.count("MEMBAR.ALL.GPU") for kernel in kernels]
    assert kernels
    assert max(fences) <= 2, fences


@pytest.mark.parametrize("name", [n for n in SM80 if "bf16" in n])
def test_later_architectures(name: str, tmp_path: Path) -> None:
    """The PTX that later GPUs compile for themselves, compiled for sm_100: no spills there either."""
    pytest.importorskip("triton")
    cuobjdump, ptxas = tool("cuobjdump"), tool("ptxas")
    if cuobjdump is None or ptxas is None:
        pytest.skip("needs cuobjdump and ptxas")
    subprocess.run(
        [cuobjdump, "-xptx", "all", str(TREE / "cuda/sm80" / f"{name}.o")],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    sources = list(tmp_path.glob("*.ptx"))
    assert sources
    for source in sources:
        command = [ptxas, "-v", "-arch=sm_100", str(source), "-o", str(source.with_suffix(".cubin"))]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        kernels = usage(result.stderr)
        assert kernels
        assert [k for k in kernels if k.spilled_bytes] == []
