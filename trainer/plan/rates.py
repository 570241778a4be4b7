"""Rates of GPUs by name, and of the links between them: datasheets' figures, and what of them a step reaches.

Figures of datasheets are NVIDIA's own, with the document behind each group. Of matrix products they are those without
sparsity and with sums in float32, which is how torch computes. What of them a step reaches was measured on an H100 and
an H200 (docs/benchmarks.md); for all other cards it is assumed, and the plan says so.

All figures were written from memory of the documents named: on 2026-11-27 none of these could be opened. For H100 (all
three), H200, B200, A100 (SXM), A10, A10G, A30, A40, L4, L40, L40S, T4, V100 (SXM2), P100, RTX A5000, A6000, 6000 Ada,
PRO 6000, 3060 to 3090, 4070 Ti, 4080, 4090 and 5090, the figure of products or that of memory, seldom both, was found
again in a seller's table or another project's code, which are no proof. Wrong figures move expected times alone, and
which of two layouts is thought faster.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.errors import ConfigError

# Of its datasheet's rate, what one large matrix product reaches: 730 to 780 of 989 TFLOP/s on an H100, 2026-11-23. A
# step's products reach the same: fitted to its rows in docs/benchmarks.md, together with trainer/plan/time.py's bytes.
PRODUCT_SHARE = 0.76
# Cards that their power limits further, so that the clock falls under load: assumed, from the power per FLOP/s. An H100
# PCIe has 350 W where an H100 SXM has 700 W for 1.3 times the rate; an L4 has 72 W, where a 4090 has 450 W for 1.4.
LOW_POWER_SHARE = 0.6
# Of its datasheet's rate, what collectives reach over a link; assumed. nccl-tests report some 370 GB/s over the 450 of
# an H100's NVLink. Over PCIe all GPUs of a machine share host bridges, and those without peer-to-peer go through host
# memory.
NVLINK_SHARE, PCIE_SHARE, NETWORK_SHARE = 0.8, 0.5, 0.8
# Gbit/s of a machine's network to others where nobody told and nothing was found: one card of 100, the least that
# machines with several data centre GPUs are usually sold with. Those made for training have 4 to 32 times as much.
USUAL_NETWORK_GBPS = 100.0


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects the GPUs of a machine: GB/s of one GPU in one direction by the standard, and the share reached."""

    name: str
    gb_per_second: float
    share: float

    @property
    def bytes_per_second(self) -> float:
        """What a GPU should reach in one direction while all of the machine send."""
        return 1e9 * self.share * self.gb_per_second


def _nvlink(generation: int, gb_per_second: float) -> Link:
    return Link(name=f"NVLink {generation}", gb_per_second=gb_per_second, share=NVLINK_SHARE)


def _pcie(generation: int, gb_per_second: float) -> Link:
    return Link(name=f"PCIe {generation}", gb_per_second=gb_per_second, share=PCIE_SHARE)


# PCI Express base specification: GB/s of 16 lanes in one direction. NVLink bridges connect pairs, so that rings of more
# GPUs still go over PCIe, which is what cards with bridges have here.
PCIE_3, PCIE_4, PCIE_5 = _pcie(3, 15.8), _pcie(4, 31.5), _pcie(5, 63.0)
PCIE_4_X8, PCIE_5_X8 = _pcie(4, 15.8), _pcie(5, 31.5)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    names          as the driver has them and as people type them, in the form of `_normal`; the first one is shown
    half, single   TFLOP/s of products in bf16 or fp16, and in float32
    gb_per_second  of its memory
    memory_gib     about what nvidia-smi tells, in whole GiB
    bf16           whether it computes in bf16; else `half` is of fp16 alone
    product_share  of `half` and `single`, what a large product reaches
    measured       the date on which a step was measured on it; empty where its shares are assumed
    """

    names: tuple[str, ...]
    half: float
    single: float
    gb_per_second: float
    memory_gib: int
    link: Link
    bf16: bool = True
    product_share: float = PRODUCT_SHARE
    measured: str = ""

    @property
    def name(self) -> str:
        return self.names[0]

    def datasheet_flops_per_second(self, precision: str) -> float:
        """What the datasheet says of products in this precision (no, bf16 or fp16), which none reaches."""
        return 1e12 * (self.single if precision == "no" else self.half)

    def flops_per_second(self, precision: str) -> float:
        """What large products reach in this precision."""
        return self.product_share * self.datasheet_flops_per_second(precision)

    def source(self) -> str:
        """Where its rates come from, in words."""
        return f"{self.name} measured {self.measured}" if self.measured else f"{self.name} assumed"


def _gpu(
    names: str,
    half: float,
    single: float,
    memory: tuple[float, int],
    link: Link,
    *,
    bf16: bool = True,
    product_share: float = PRODUCT_SHARE,
    measured: str = "",
) -> Gpu:
    """names  separated by |;  memory  its GB/s and GiB"""
    return Gpu(
        names=tuple(names.split("|")),
        half=half,
        single=single,
        gb_per_second=memory[0],
        memory_gib=memory[1],
        link=link,
        bf16=bf16,
        product_share=product_share,
        measured=measured,
    )


_LOW = LOW_POWER_SHARE
GPUS: tuple[Gpu, ...] = (
    # "NVIDIA HGX B200" datasheet: 36 PFLOP/s of 8 in bf16 with sparsity, NVLink 1.8 TB/s in both directions.
    _gpu("B200", 2250, 75, (7700, 179), _nvlink(5, 900)),
    # "NVIDIA H200 Tensor Core GPU" datasheet; measured by scripts/gpu_check.py (docs/gpu_checks.md).
    _gpu("H200", 989.4, 67, (4800, 140), _nvlink(4, 450), measured="2026-11-27"),
    _gpu("H200 NVL", 835.5, 60, (4800, 140), PCIE_5),
    # "NVIDIA H100 Tensor Core GPU" datasheet; measured: docs/benchmarks.md.
    _gpu("H100|H100 80GB HBM3|H100 SXM|H100 SXM5", 989.4, 67, (3350, 80), _nvlink(4, 450), measured="2026-11-23"),
    _gpu("H100 PCIe|H100 80GB PCIe", 756, 51, (2000, 80), PCIE_5, product_share=_LOW),
    _gpu("H100 NVL", 835.5, 60, (3900, 93), PCIE_5, product_share=_LOW),
    # "NVIDIA GH200 Grace Hopper Superchip" datasheet, with 96 GB; one GPU in a machine.
    _gpu("GH200|GH200 480GB", 989.4, 67, (4000, 95), _nvlink(4, 450)),
    # "NVIDIA H20", "NVIDIA H800": the H100's chip with fewer units, and with fewer links.
    _gpu("H20", 148, 44, (4000, 95), _nvlink(4, 450)),
    _gpu("H800", 989.4, 67, (3350, 80), _nvlink(4, 200)),
    # "NVIDIA A100 Tensor Core GPU" datasheet; A800: with fewer links.
    _gpu("A100|A100 SXM4 80GB|A100 SXM 80GB|A100 80GB|A100 SXM", 312, 19.5, (2039, 80), _nvlink(3, 300)),
    _gpu("A100 40GB|A100 SXM4 40GB|A100 SXM 40GB", 312, 19.5, (1555, 40), _nvlink(3, 300)),
    _gpu("A100 80GB PCIe|A100 PCIe 80GB|A100 PCIe", 312, 19.5, (1935, 80), PCIE_4),
    _gpu("A100 40GB PCIe|A100 PCIe 40GB", 312, 19.5, (1555, 40), PCIE_4),
    _gpu("A800|A800 SXM4 80GB", 312, 19.5, (2039, 80), _nvlink(3, 200)),
    # Datasheets of each, of the Ampere and Ada generations for servers. A10G: "NVIDIA A10G", made for AWS.
    _gpu("A30", 165, 10.3, (933, 24), PCIE_4),
    _gpu("A10", 125, 31.2, (600, 22), PCIE_4, product_share=_LOW),
    _gpu("A10G", 70, 31.5, (600, 22), PCIE_4),
    _gpu("A40", 149.7, 37.4, (696, 45), PCIE_4),
    _gpu("L4", 121, 30.3, (300, 22), PCIE_4, product_share=_LOW),
    _gpu("L40", 181, 90.5, (864, 45), PCIE_4),
    _gpu("L40S", 362, 91.6, (864, 45), PCIE_4),
    # Datasheets of the workstation cards: "NVIDIA RTX A6000", "NVIDIA RTX 6000 Ada Generation", ...
    _gpu("RTX A4000|A4000", 76.7, 19.2, (448, 16), PCIE_4),
    _gpu("RTX A5000|A5000", 111.1, 27.8, (768, 24), PCIE_4),
    _gpu("RTX A6000|A6000", 154.8, 38.7, (768, 48), PCIE_4),
    _gpu("RTX 5000 Ada", 261.1, 65.3, (576, 32), PCIE_4),
    _gpu("RTX 6000 Ada", 364.2, 91.1, (960, 48), PCIE_4),
    _gpu(
        "RTX PRO 6000 Blackwell|RTX PRO 6000 Blackwell Server Edition|RTX PRO 6000 Blackwell Workstation Edition|"
        "RTX PRO 6000",
        503.8,
        126,
        (1792, 95),
        PCIE_5,
    ),
    # "NVIDIA RTX Blackwell GPU architecture" whitepaper, appendix A: FP16 with FP32 accumulate.
    _gpu("RTX 5070", 61.7, 30.9, (672, 12), PCIE_5),
    _gpu("RTX 5070 Ti", 87.9, 43.9, (896, 16), PCIE_5),
    _gpu("RTX 5080", 112.6, 56.3, (960, 16), PCIE_5),
    _gpu("RTX 5090", 209.5, 104.8, (1792, 32), PCIE_5),
    # "NVIDIA Ada GPU architecture" whitepaper, appendix A: FP16 with FP32 accumulate. The Super cards came later:
    # theirs is twice the float32 rate of their data sheet, as it is on all others of the generation.
    _gpu("RTX 4060", 30.2, 15.1, (272, 8), PCIE_4_X8),
    _gpu("RTX 4060 Ti", 44.1, 22.1, (288, 16), PCIE_4_X8),
    _gpu("RTX 4070", 58.3, 29.1, (504, 12), PCIE_4),
    _gpu("RTX 4070 SUPER", 71, 35.5, (504, 12), PCIE_4),
    _gpu("RTX 4070 Ti", 80.2, 40.1, (504, 12), PCIE_4),
    _gpu("RTX 4070 Ti SUPER", 88.2, 44.1, (672, 16), PCIE_4),
    _gpu("RTX 4080", 97.5, 48.7, (717, 16), PCIE_4),
    _gpu("RTX 4080 SUPER", 104.4, 52.2, (736, 16), PCIE_4),
    _gpu("RTX 4090", 165.2, 82.6, (1008, 24), PCIE_4),
    # "NVIDIA Ampere GA102 GPU architecture" whitepaper: FP16 with FP32 accumulate.
    _gpu("RTX 3060", 25.5, 12.7, (360, 12), PCIE_4),
    _gpu("RTX 3060 Ti", 32.4, 16.2, (448, 8), PCIE_4),
    _gpu("RTX 3070", 40.6, 20.3, (448, 8), PCIE_4),
    _gpu("RTX 3070 Ti", 43.5, 21.7, (608, 8), PCIE_4),
    _gpu("RTX 3080", 59.5, 29.8, (760, 10), PCIE_4),
    _gpu("RTX 3080 Ti", 68.2, 34.1, (912, 12), PCIE_4),
    _gpu("RTX 3090", 71, 35.6, (936, 24), PCIE_4),
    _gpu("RTX 3090 Ti", 80, 40, (1008, 24), PCIE_4),
    # "NVIDIA Turing GPU architecture" whitepaper, "NVIDIA T4" datasheet: no bf16.
    _gpu("RTX 2080 Ti", 53.8, 13.4, (616, 11), PCIE_3, bf16=False),
    _gpu("T4", 65, 8.1, (320, 15), PCIE_3, bf16=False, product_share=_LOW),
    # "NVIDIA V100 Tensor Core GPU" and "NVIDIA Tesla P100" datasheets.
    _gpu("V100|V100 SXM2 16GB|V100 SXM2", 125, 15.7, (900, 16), _nvlink(2, 150), bf16=False),
    _gpu("V100 32GB|V100 SXM2 32GB|V100 SXM3 32GB", 125, 15.7, (900, 32), _nvlink(2, 150), bf16=False),
    _gpu("V100 PCIe|V100 PCIe 16GB", 112, 14, (900, 16), PCIE_3, bf16=False),
    _gpu("V100 PCIe 32GB", 112, 14, (900, 32), PCIE_3, bf16=False),
    _gpu("V100S|V100S PCIe 32GB", 130, 16.4, (1134, 32), PCIE_3, bf16=False),
    _gpu("P100|P100 PCIe|P100 PCIe 16GB", 18.7, 9.3, (732, 16), PCIE_3, bf16=False),
    _gpu("P100 SXM2|P100 SXM2 16GB", 21.2, 10.6, (732, 16), _nvlink(1, 80), bf16=False),
)
# What drivers put around the name of a card and what tells no two cards apart. "Laptop", "D", "Max-Q", "MIG 1g.5gb" and
# "Quadro" do, and stay: such a card is unknown rather than taken for another.
NO_MEANING = frozenset({"nvidia", "geforce", "tesla", "generation"})


def _normal(name: str) -> str:
    words = re.split(r"[\s_-]+", name.lower())
    return " ".join(word for word in words if word and word not in NO_MEANING)


def _by_name() -> dict[str, Gpu]:
    found: dict[str, Gpu] = {}
    for gpu in GPUS:
        for name in gpu.names:
            if found.setdefault(_normal(name), gpu) is not gpu:
                raise ValueError(f"{name} stands for two GPUs")
    return found


_BY_NAME = _by_name()


def gpu_of(name: str) -> Gpu | None:
    """The GPU of this name, as the driver has it ("NVIDIA H100 80GB HBM3") or short ("H100"); None for others."""
    return _BY_NAME.get(_normal(name))


def named_gpu(name: str) -> Gpu:
    """The GPU that --gpu_name names. Raises ConfigError for one that is not known, with the known ones."""
    gpu = gpu_of(name)
    if gpu is None:
        raise ConfigError(
            f"--gpu_name {name!r}: the rates of such a GPU are not known here. Known are"
            f" {', '.join(known.name for known in GPUS)}, also as the driver names them (nvidia-smi -L)"
        )
    return gpu


def slowest(names: Iterable[str]) -> str:
    """Of the GPUs of a run, the one for which all wait: the slowest, or one whose rates are not known."""
    return min(sorted(set(names)), key=_speed)


def _speed(name: str) -> float:
    gpu = gpu_of(name)
    return 0.0 if gpu is None else gpu.product_share * (gpu.half if gpu.bf16 else gpu.single)
