"""Compile Triton kernels for GPUs that are not there, and read what the compiler made of them.

`captured` collects the launches of a host function instead of running them, on CPU tensors; `compiled` specialises and
compiles one as a launch on a GPU would. Not under TRITON_INTERPRET=1, where `triton.jit` makes no compilable function.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a block may have, by compute capability."""
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTC.*MMA"}


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments it was launched with."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@contextlib.contextmanager
def captured() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; outputs stay uninitialised."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a GPU.

    Attributes:
        kernel: its name.
        capability: compute capability it is compiled for, as 80 or 90.
        warps: of a block.
        registers: of a thread.
        shared: bytes of shared memory of a block.
        stack: bytes of stack of a thread: spills, or an array indexed at run time.
        serialised: whether ptxas put a wait after every wgmma (its warnings C7510 to C7520).
        products: whether the kernel multiplies matrices that matrix instructions take (not float32 in full precision).
        opcodes: how many of each instruction, by full name as in "LDG.E.128".
    """

    kernel: str
    capability: int
    warps: int
    registers: int
    shared: int
    stack: int
    serialised: bool
    products: bool
    opcodes: dict[str, int]

    def count(self, pattern: str) -> int:
        """How many instructions have a name that starts as the regular expression says."""
        return sum(number for name, number in self.opcodes.items() if re.match(pattern, name))

    def problems(self) -> list[str]:
        """What is wrong with the compiled kernel, [] if nothing is."""
        found = []
        spilled = self.count("LDL|STL")
        if self.stack or spilled:
            found.append(f"{self.stack} bytes of stack, {spilled} local loads and stores")
        if self.shared > SHARED_MEMORY[self.capability]:
            found.append(f"{self.shared} bytes of shared memory, the GPU has {SHARED_MEMORY[self.capability]}")
        if self.products and not self.count(MATRIX_INSTRUCTION[self.capability]):
            found.append(f"no {MATRIX_INSTRUCTION[self.capability]} instruction")
        if self.serialised:
            found.append("ptxas serialised wgmma")
        if self.products and not self.count(r"UTMALDG|LDG.*\.128"):
            found.append("no TMA and no 128-bit load")
        return found


def _signature(launch: Launch, target: GPUTarget) -> tuple[Any, Any]:
    """(source, options) that Triton would compile for this launch."""
    backend = make_backend(target)
    kernel, options = launch.kernel, {**launch.options, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(*launch.args, **options)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, given)
    return ASTSource(kernel, signature, constexprs, attrs), parsed


def identity(launch: Launch, capability: int) -> tuple[Any, ...]:
    """Equal for launches that one compiled kernel serves."""
    source, options = _signature(launch, GPUTarget("cuda", capability, 32))
    return launch.kernel.__name__, capability, source.hash(), options.hash()


def compiled(launch: Launch, capability: int) -> Resources:
    """Compile the kernel of a launch for compute capability `capability` (80, 90, 100) and read its resources.

    Raises:
        triton.CompilationError and others: Triton or ptxas refuses it.
    """
    target = GPUTarget("cuda", capability, 32)
    source, options = _signature(launch, target)
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,  # a kernel found in the cache would come without ptxas's words on it
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True),
        contextlib.redirect_stdout(log),
    ):
        kernel = triton.compile(source, target=target, options=options.__dict__)
        opcodes = _opcodes(kernel.asm["cubin"], Path(cache))
    said = log.getvalue()
    registers, stack = (
        int(found[1]) if (found := re.search(pattern, said)) else 0
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack frame")
    )
    ttir = kernel.asm["ttir"]
    precise = re.search(r"tt\.dot.*f32>.*f32>", ttir) and "inputPrecision = tf32" not in ttir
    return Resources(
        kernel=launch.kernel.__name__,
        capability=capability,
        warps=kernel.metadata.num_warps,
        registers=registers,
        shared=kernel.metadata.shared,
        stack=stack,
        serialised=bool(re.search(r"\(C75(1\d|20)\)", said)),
        products="tt.dot" in ttir and not precise,
        opcodes=opcodes,
    )


def _opcodes(cubin: bytes, folder: Path) -> dict[str, int]:
    """The instructions of a compiled kernel, counted."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    nvdisasm = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    sass = subprocess.run([nvdisasm, "-c", file], capture_output=True, text=True, check=True).stdout
    return dict(collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", sass)))
