"""The rate of this machine's network to other machines, as Linux tells it."""

from __future__ import annotations

import re
from pathlib import Path

SYS = Path("/sys/class")
INFINIBAND = "InfiniBand"


def network_gbps(sys_class: Path = SYS) -> float | None:
    """Gbit/s of all cards that a run's collectives would use; None where Linux does not tell.

    Ports of InfiniBand, or else of other cards with its interface (RoCE, EFA), which NCCL uses side by side: their
    sum. Of those, only the fastest ones, since a slower port beside them is for files or administration. Where there
    are none, the fastest of the plain network cards that are connected.
    """
    ports = [port for port in sys_class.glob("infiniband/*/ports/*") if _text(port / "state").endswith("ACTIVE")]
    of_infiniband = [port for port in ports if _text(port / "link_layer") == INFINIBAND]
    rates = [rate for port in of_infiniband or ports if (rate := _number(_text(port / "rate"))) > 0]
    if rates:
        return sum(rate for rate in rates if rate == max(rates))
    # Bridges, tunnels and containers' ends have no device. A card that is not connected says -1 or refuses to be read.
    cards = [card for card in sys_class.glob("net/*") if (card / "device").exists()]
    megabits = [_number(_text(card / "speed")) for card in cards if _text(card / "operstate") == "up"]
    return max(megabits) / 1000 if megabits and max(megabits) > 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):  # what this driver does not tell
        return ""


def _number(text: str) -> float:
    """The number with which the text begins: "200 Gb/sec (4X HDR)"; 0 where there is none."""
    found = re.match(r"-?\d+(\.\d+)?", text)
    return float(found[0]) if found else 0.0
