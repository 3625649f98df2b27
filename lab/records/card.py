"""The state of the card and the software, as an env record. Reads only: no setting of the card is ever
changed."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from lab.records.schema import Env
from lab.tune import tuned

PEERS = {  # module -> distribution
    "flashinfer": "flashinfer-python",
    "gemlite": "gemlite",
    "liger_kernel": "liger-kernel",
}
# nvidia-smi's bit mask of reasons why the clock is below its maximum (NVML's nvmlClocksEventReason...), idle
# aside.
THROTTLE = {
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "hardware power brake",
    0x100: "display clocks",
}
QUERY = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "mem_mhz": "clocks.mem",
    "sm_max_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "ecc": "ecc.mode.current",
    "throttle": "clocks_throttle_reasons.active",
}
# Without these a throttled card or a noisy one looks like a slow kernel.
HARMFUL = (
    "software power cap",
    "hardware slowdown",
    "software thermal",
    "hardware thermal",
    "hardware power brake",
)


def parse_query(text: str, fields) -> dict:
    """The values of one line of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`; what is absent is
    None."""
    values = {}
    for field, raw in zip(fields, (part.strip() for part in text.split(","))):
        if not raw or raw.startswith("[") or raw in ("N/A", "Unknown Error"):
            values[field] = None
        elif field == "throttle":
            values[field] = [name for bit, name in THROTTLE.items() if int(raw, 16) & bit]
        elif field in ("driver", "ecc"):
            values[field] = raw
        else:
            values[field] = float(raw)
    return values


def state(index: int = 0) -> dict:
    """Clocks (MHz), power (W), temperature (C), throttle reasons, driver and ECC now; {} where nvidia-smi is
    absent."""
    command = [
        "nvidia-smi",
        f"--id={visible(index)}",
        "--query-gpu=" + ",".join(QUERY.values()),
        "--format=csv,noheader,nounits",
    ]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return parse_query(out.strip().splitlines()[0], QUERY)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}


def visible(index: int) -> str:
    """nvidia-smi's name of torch's device `index`, which CUDA_VISIBLE_DEVICES may have renumbered."""
    listed = [item.strip() for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item.strip()]
    return listed[index] if index < len(listed) else str(index)


def commit() -> str | None:
    """The git commit of this code, with + and a hash of the difference when files were edited; None outside
    git.

    LAB_COMMIT names it where a copy of the tree travelled without its history.
    """
    if os.environ.get("LAB_COMMIT"):
        return os.environ["LAB_COMMIT"]

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, timeout=20, check=True
        ).stdout

    try:
        name = git("rev-parse", "--short", "HEAD").decode().strip()
        # Untracked kernels are as much a part of what ran; reports and records are not.
        edited = git("diff", "HEAD", "--", ".", ":/lab", ":/cuda_src", ":/triton_kernels")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}+{hashlib.sha1(edited).hexdigest()[:6]}" if edited else name


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def compiler() -> str | None:
    """The nvcc that built the CUDA extension; None where it is not built."""
    try:
        from lab import _cuda

        return str(_cuda.build_info().get("compiler"))
    except (ImportError, AttributeError):
        return None


def processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    except OSError:
        return platform.processor() or None


def environment(run: str, when: str, device: str, settings: dict, notes=()) -> Env:
    """The env record of this moment. when: before | after."""
    row = Env(
        run,
        when,
        device,
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        torch=torch.__version__,
        triton=version("triton"),
        nvcc=compiler(),
        python=platform.python_version(),
        cpu=processor(),
        commit=commit(),
        cuda=torch.version.cuda,
        settings=settings,
        notes=list(notes),
        peers={module: version(dist) or "not installed" for module, dist in PEERS.items()},
    )
    if device == "cuda":
        index = torch.cuda.current_device()
        p = torch.cuda.get_device_properties(index)
        row.gpu, row.capability = p.name, f"{p.major}.{p.minor}"
        row.sms, row.l2_bytes, row.memory_bytes = p.multi_processor_count, p.L2_cache_size, p.total_memory
        row.tuned = tuned.digests(f"sm_{p.major}{p.minor}")
        for field, value in state(index).items():
            setattr(row, field, value)
        harmful = [reason for reason in row.throttle or () if reason in HARMFUL]
        if harmful:
            row.notes.append(f"the card was throttled {when} the run: {', '.join(harmful)}")
    return row
