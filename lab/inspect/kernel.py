"""One compiled kernel and its recorded launch: the facts that `lab inspect` compares."""

import re
from collections import Counter
from dataclasses import dataclass, field

from lab.inspect import binary
from lab.inspect import gpu as gpus

# Classes of NVIDIA's machine instructions by what they do. An opcode belongs to the first class whose pattern
# fits. An instruction counts once, however often a loop runs it. The table has the classes in this order.
MIX = {
    "global load, 128 bit": r"LDG\.\S*128",
    "global load, 64 bit": r"LDG\.\S*64",
    "global load, 32 bit or less": r"LDG\b|LD\.",
    "cp.async": r"LDGSTS",
    "bulk copy": r"UBLKCP|UTMALDG|UTMASTG",
    "prefetch to L2": r"CCTL\S*PF2|UBLKPF|UTMAPF",
    "global store, 128 bit": r"STG\.\S*128",
    "global store, 64 bit": r"STG\.\S*64",
    "global store, 32 bit or less": r"STG\b|ST\.",
    "local memory (spills)": r"LDL|STL",
    "shared load": r"LDS\b",
    "shared store": r"STS\b",
    "shared matrix load or store": r"LDSM|STSM",
    "tensor core": r"[HIQDB]G?MMA",
    "fused multiply-add": r"FFMA|HFMA2|DFMA",
    "other float arithmetic": r"FADD|FMUL|FMNMX|FSETP|FSEL|HADD2|HMUL2|HMNMX2|HSETP2|FCHK|DADD|DMUL|FSET",
    "conversion": r"F2F|F2I|I2F|F2FP|I2FP|FRND",
    "special function": r"MUFU",
    "shuffle": r"SHFL|REDUX|VOTE|MATCH",
    "block barrier": r"BAR\b",
    "mbarrier": r"SYNCS",
    "atomic": r"ATOM|RED\b|REDG",
    "dependent launch": r"ACQBULK|PREEXIT",
    "integer and address": r"U?IMAD|U?IADD|U?LEA|VIADD|U?ISETP|U?SHF|"
    r"U?LOP3|U?PRMT|IABS|U?IMNMX|VIMNMX|U?BREV|U?FLO"
    r"|U?POPC|U?BMSK|U?SGXT|PLOP3|UPLOP3|U?SEL\b|IDP|U?ISCADD|U?LOP",
    "constant and register move": r"LDC|ULDC|U?MOV|S2U?R|CS2R|R2UR?|R2P|P2R|UP2UR|UR2UP",
    "control flow and fence": r"BRA|EXIT|BSSY|BSYNC|CALL|RET|WARPSYNC|"
    r"NANOSLEEP|YIELD|BREAK|JMP|BRX|NOP|DEPBAR"
    r"|LDGDEPBAR|MEMBAR|ERRBAR|FENCE|CCTL|LEPC|ENDCOLLECTIVE|CGAERRBAR|BMOV|BPT|KILL"
    r"|UCGABAR|ELECT",
}
PATTERNS = {name: re.compile(pattern) for name, pattern in MIX.items()}
INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[\w.]+)?)"
)


def opcodes(sass):
    """The opcodes of a disassembly in their order, without the padding at the end."""
    found = [m[1] for m in map(INSTRUCTION.match, sass.splitlines()) if m]
    while found and found[-1] == "NOP":
        found.pop()
    return found


def mix(sass):
    """{class of instruction: its number in the code}: every class of MIX, then "other" and "all"."""
    counts = Counter(
        next((name for name, p in PATTERNS.items() if p.match(code)), "other") for code in opcodes(sass)
    )
    return {name: counts[name] for name in (*MIX, "other")} | {"all": counts.total()}


@dataclass
class Kernel:
    """The facts about a kernel.

    Per thread: `registers`, `spills` (bytes of local memory, including the stack). Per block: `threads`,
    `shared_*` in bytes. `blocks`: how many can be resident on one multiprocessor; `occupancy`: their share of
    its warps; see gpu.Occupancy.
    """

    backend: str
    name: str  # as the source calls it
    instance: str  # the instantiation (CUDA), or the configuration (Triton)
    arch: str
    grid: tuple
    threads: int
    registers: int
    spills: int
    shared_static: int
    shared_dynamic: int
    blocks: int
    occupancy: float
    limit: str
    mix: dict
    cluster: int = 1
    dependent_launch: bool = False
    # sass | ptx | ttgir -> text, or the LabError that says why there is none
    texts: dict = field(default_factory=dict, repr=False)

    def facts(self):
        """All facts but the code, for JSON."""
        return {key: value for key, value in vars(self).items() if key != "texts"}


def measured(gpu, cubin, function, threads, shared_dynamic, **rest):
    """Makes a Kernel from the file of a cubin and the launch."""
    used = binary.usage(cubin, function)
    # From sm_90 on, the shared memory of a kernel that uses any includes what the driver reserves.
    static = max(0, used["SHARED"] - gpu.reserved) if gpu.arch != "sm_80" else used["SHARED"]
    fits = gpus.occupancy(gpu, used["REG"], static + shared_dynamic, threads)
    sass = binary.disassembly(cubin, function)
    kernel = Kernel(
        arch=gpu.arch,
        threads=threads,
        registers=used["REG"],
        spills=used["STACK"] + used["LOCAL"],
        shared_static=static,
        shared_dynamic=shared_dynamic,
        blocks=fits.blocks,
        occupancy=fits.share,
        limit=fits.limit,
        mix=mix(sass),
        **rest,
    )
    kernel.texts["sass"] = sass
    return kernel
