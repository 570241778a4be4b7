"""The table of GPUs knows cards by the names that drivers give them, and takes none for another."""

from __future__ import annotations

import pytest

from trainer.errors import ConfigError
from trainer.plan.rates import GPUS, gpu_of, named_gpu, slowest

# As nvidia-smi lists them, with drivers from 418 to 580.
DRIVERS = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA B200": "B200",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA H20": "H20",
    "NVIDIA A100-SXM4-80GB": "A100",
    "A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB PCIe",
    "NVIDIA A100 80GB PCIe": "A100 80GB PCIe",
    "NVIDIA A30": "A30",
    "NVIDIA A10": "A10",
    "NVIDIA A10G": "A10G",
    "NVIDIA A40": "A40",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA RTX A6000": "RTX A6000",
    "RTX A6000": "RTX A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 4080": "RTX 4080",
    "NVIDIA GeForce RTX 4070 Ti SUPER": "RTX 4070 Ti SUPER",
    "NVIDIA GeForce RTX 4070": "RTX 4070",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 3080": "RTX 3080",
    "NVIDIA GeForce RTX 3060": "RTX 3060",
    "Tesla T4": "T4",
    "Tesla V100-SXM2-16GB": "V100",
    "Tesla V100-SXM2-32GB": "V100 32GB",
    "Tesla V100-PCIE-16GB": "V100 PCIe",
    "Tesla V100S-PCIE-32GB": "V100S",
    "Tesla P100-PCIE-16GB": "P100",
    "Tesla P100-SXM2-16GB": "P100 SXM2",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000 Blackwell",
}


def test_cards_are_known_by_the_names_of_their_drivers() -> None:
    assert {name: getattr(gpu_of(name), "name", None) for name in DRIVERS} == DRIVERS


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3060 Laptop GPU", "NVIDIA GeForce RTX 4090 D"),
        *("NVIDIA GeForce RTX 2080 with Max-Q Design", "Quadro RTX 6000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", ""),
        *("NVIDIA GeForce GTX 1080 Ti", "AMD Instinct MI300X", "RTX", "NVIDIA", "H100 80GB HBM4"),
    ],
)
def test_a_card_that_only_sounds_like_another_is_unknown(name: str) -> None:
    assert gpu_of(name) is None


def test_every_name_in_the_table_and_every_short_one_finds_its_card() -> None:
    for gpu in GPUS:
        assert all(named_gpu(name) is gpu for name in (*gpu.names, gpu.name.lower(), f"NVIDIA {gpu.name}"))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'H1000'.*Known are .*H100, .*RTX 4090.*nvidia-smi") as caught:
        named_gpu("H1000")
    assert all(gpu.name in str(caught.value) for gpu in GPUS)


def test_of_cards_that_differ_the_slowest_counts_and_an_unknown_one_before_all() -> None:
    assert slowest(["NVIDIA H100 80GB HBM3", "NVIDIA L4", "NVIDIA H100 80GB HBM3"]) == "NVIDIA L4"
    # A V100 has more TFLOP/s than an L4, but not in bf16, which alone all of a run could compute in.
    assert slowest(["Tesla V100-SXM2-16GB", "NVIDIA L4"]) == "Tesla V100-SXM2-16GB"
    assert slowest(["NVIDIA L4", "new card"]) == slowest(["new card", "NVIDIA L4"]) == "new card"


def test_figures_are_in_the_order_that_datasheets_have() -> None:
    """A slip of a digit, or a figure with sparsity among those without, breaks a ratio that holds for all cards."""
    for gpu in GPUS:
        assert 1.5 <= gpu.half / gpu.single <= 30, gpu.name
        # FLOPs that a byte from memory allows: 25 of a P100, 419 of an L40S, and twice that would be sparsity's.
        assert 20 <= 1e3 * gpu.half / gpu.gb_per_second <= 460, gpu.name
        assert 8 <= gpu.memory_gib <= 180 and 15 <= gpu.link.gb_per_second <= 900, gpu.name
