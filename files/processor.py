"""What a measurement was made on."""

import platform
from pathlib import Path


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'a CPU'} ({platform.machine()})"
