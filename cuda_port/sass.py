"""What the hardware will run: registers and memory of a kernel, and its instructions per value.

NVIDIA's assembler, which the wheels of CUDA 12 contain, says what a kernel takes;
`nvdisasm` (package nvidia-cuda-nvdisasm) shows its instructions. Neither needs a device.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tbq.errors import BackendError
from tbq.extras import install_command

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_]*)")
BRANCH = re.compile(r"BRA\s.*`\((\.L_x_\d+)\)")
LABEL = re.compile(r"^(\.L_x_\d+):")


@dataclass(frozen=True)
class Resources:
    """What a thread, or a block of threads, takes: registers, bytes spilled, of stack, shared."""

    registers: int
    spilled: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Block:
    """Instructions without a label or a branch among them, and whether they repeat.

    Attributes:
        opcodes: their names.
        loops: whether the block ends with a branch to its own start.
    """

    opcodes: tuple[str, ...]
    loops: bool

    def count(self, *names: str) -> int:
        """Return how many instructions have one of these names."""
        return sum(name in names for name in self.opcodes)


def program(name: str) -> str | None:
    """Return where a program of the CUDA toolkit is: among the wheels, on the path, or nowhere."""
    for place in map(Path, sys.path):
        found = sorted(place.glob(f"nvidia/*/bin/{name}")) or sorted(
            place.glob(f"triton/backends/nvidia/bin/{name}")
        )
        if found:
            return str(found[0])
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


def assemble(ptx: str, compute_capability: tuple[int, int], cubin: Path | None = None) -> Resources:
    """Assemble PTX, into a file if one is named, and return what it takes."""
    ptxas = program("ptxas")
    if ptxas is None:
        raise BackendError("ptxas", f"not found; {install_command('cuda12')}")
    arch = "sm_{}{}".format(*compute_capability)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        target = cubin or Path(folder, "kernel.cubin")
        command = [ptxas, "-v", f"-arch={arch}", str(source), "-o", str(target)]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise BackendError("ptxas", ran.stderr.strip()[:400])
    numbers = {
        name: [int(found) for found in re.findall(pattern, ran.stderr)]
        for name, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("spilled", r"(\d+) bytes spill stores"),
            ("stack", r"(\d+) bytes stack frame"),
            ("shared", r"(\d+) bytes smem"),
        )
    }
    return Resources(**{name: max(found, default=0) for name, found in numbers.items()})


def instructions(cubin: Path) -> list[Block] | None:
    """Return the instructions of an assembled kernel; None without nvdisasm."""
    nvdisasm = program("nvdisasm")
    if nvdisasm is None:
        return None
    command = [nvdisasm, "-c", str(cubin)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return blocks(ran.stdout)


def blocks(listing: str) -> list[Block]:
    """Split a listing of nvdisasm at labels and branches."""
    found, label, opcodes = [], "", []
    for line in listing.splitlines():
        start = LABEL.match(line)
        if start:
            found.append(Block(tuple(opcodes), False))
            label, opcodes = start[1], []
        instruction = INSTRUCTION.search(line)
        if instruction and instruction[1] != "NOP":
            opcodes.append(instruction[1])
        branch = BRANCH.search(line)
        if branch:
            found.append(Block(tuple(opcodes), branch[1] == label))
            opcodes = []
    found.append(Block(tuple(opcodes), False))
    return [block for block in found if block.opcodes]


def hottest(found: list[Block]) -> Block:
    """Return the block that does most of the work, by its arithmetic and its reads of tables."""
    return max(found, key=lambda b: b.count("FADD", "FMUL") + 8 * b.count("LDS"))


def fused_beyond_division(found: list[Block]) -> int:
    """Return how many fused multiply-adds there are that no division or root explains.

    Those are sequences of at most FUSED_PER_ROOT around each approximation that they refine, and
    in routines for what the sequence cannot handle, after the kernel's own instructions.
    """
    opcodes = [name for block in found for name in block.opcodes]
    return max(0, opcodes.count("FFMA") - FUSED_PER_ROOT * opcodes.count("MUFU"))


FUSED_PER_ROOT = 12
