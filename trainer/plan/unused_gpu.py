"""Why torch does not use an NVIDIA GPU that is in this machine, as torch and nvidia-smi tell it, and what to do."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # vendor, and the first byte of the class: VGA and 3D controllers
OTHER_TORCH = "https://pytorch.org/get-started/locally lists them"


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """What torch says of itself.

    cuda   the version of CUDA that it was built for; None for a build without CUDA
    error  what it raises when CUDA is asked for, in one line; empty where it raises nothing
    """

    version: str
    cuda: str | None
    error: str


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What nvidia-smi says.

    gpus   names of the GPUs
    cuda   the newest CUDA version that the driver can run; empty where it is not told
    error  why it lists nothing, in one line; empty where it lists GPUs
    """

    gpus: tuple[str, ...] = ()
    version: str = ""
    cuda: str = ""
    error: str = ""


def why_unused(torch: TorchBuild, driver: Driver, cards: int, environment: Mapping[str, str]) -> str:
    """Why no GPU is used though there is one, and what to do; empty where no NVIDIA GPU is in this machine.

    driver  what nvidia-smi says of it
    cards   NVIDIA cards on the PCI bus, which are there without a driver too
    """
    if not driver.gpus and not cards:
        return ""
    names = ", ".join(sorted(set(driver.gpus)))
    here = f"{len(driver.gpus)} GPU(s) ({names})" if driver.gpus else f"{cards} NVIDIA card(s)"
    said = f"torch {torch.version} says: {torch.error}" if torch.error else f"torch {torch.version} finds none"
    if not driver.gpus:
        return (
            f"{here} in this machine, which no driver serves here ({driver.error}): install NVIDIA's driver and start"
            " the machine anew; a container is to be started with its GPUs (docker run --gpus all, apptainer --nv)"
        )
    if torch.cuda is None:
        known = f" for CUDA {driver.cuda} or older" if driver.cuda else ""
        return (
            f"{here} in this machine, but torch {torch.version} is a build without CUDA: install one{known};"
            f" {OTHER_TORCH}"
        )
    if driver.cuda and _version(driver.cuda) < _version(torch.cuda):
        return (
            f"{here} in this machine, but their driver {driver.version} runs CUDA up to {driver.cuda}, and {said}:"
            f" update the driver, or install a torch for CUDA {driver.cuda} or older; {OTHER_TORCH}"
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return (
            f"{here} in this machine, but CUDA_VISIBLE_DEVICES is '{visible}', which shows torch none of them: unset"
            " it, or name their numbers, as in 0"
        )
    return f"{here} in this machine, driver {driver.version}, but {said}"


def ask_driver() -> Driver:
    """What nvidia-smi says here."""
    try:
        done = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return Driver(error="nvidia-smi is not found")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(error=f"nvidia-smi: {error}")
    if done.returncode:
        return Driver(error=f"nvidia-smi says: {_one_line(done.stdout + done.stderr)}")
    return driver_of_listing(done.stdout)


def driver_of_listing(listing: str) -> Driver:
    """What `nvidia-smi -q -x` wrote."""
    try:
        log = ElementTree.fromstring(listing)
    except ElementTree.ParseError as error:
        return Driver(error=f"nvidia-smi wrote what cannot be read: {error}")
    gpus = tuple(gpu.findtext("product_name", "unnamed") for gpu in log.iter("gpu"))
    if not gpus:
        return Driver(error="nvidia-smi lists no GPU")
    return Driver(gpus=gpus, version=log.findtext("driver_version", ""), cuda=log.findtext("cuda_version", ""))


def cards_on_the_bus(devices: Path = PCI_DEVICES) -> int:
    """NVIDIA's graphics cards on the PCI bus, as Linux lists them; 0 elsewhere."""
    found = 0
    for device in devices.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        found += vendor == NVIDIA and kind.startswith(DISPLAY)
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _one_line(text: str) -> str:
    return " ".join(text.split())
