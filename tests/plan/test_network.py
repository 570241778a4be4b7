"""The rate of a machine's network, read from folders as Linux has them."""

from __future__ import annotations

from pathlib import Path

from trainer.plan.network import network_gbps


def port(
    sys: Path, card: str, rate: str, *, state: str = "4: ACTIVE", layer: str = "InfiniBand", number: int = 1
) -> None:
    folder = sys / "infiniband" / card / "ports" / str(number)
    folder.mkdir(parents=True)
    for name, text in (("rate", rate), ("state", state), ("link_layer", layer)):
        (folder / name).write_text(text + "\n")


def card(sys: Path, name: str, speed: str, *, state: str = "up", physical: bool = True) -> None:
    folder = sys / "net" / name
    folder.mkdir(parents=True)
    (folder / "speed").write_text(speed + "\n")
    (folder / "operstate").write_text(state + "\n")
    if physical:
        (folder / "device").mkdir()


def test_active_ports_of_infiniband_are_added_up_without_slower_ones_beside_them(tmp_path: Path) -> None:
    for number in range(4):
        port(tmp_path, f"mlx5_{number}", "400 Gb/sec (4X NDR)")
    port(tmp_path, "mlx5_4", "200 Gb/sec (4X HDR)")  # for files
    port(tmp_path, "mlx5_5", "400 Gb/sec (4X NDR)", state="1: DOWN")
    port(tmp_path, "mlx5_6", "400 Gb/sec (8X)", layer="Ethernet")
    card(tmp_path, "eth0", "100000")
    assert network_gbps(tmp_path) == 1600


def test_ports_of_roce_count_where_there_is_no_infiniband(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0", "100 Gb/sec (4X EDR)", layer="Ethernet")
    port(tmp_path, "mlx5_1", "100 Gb/sec (4X EDR)", layer="Ethernet", number=2)
    port(tmp_path, "mlx5_2", "2.5 Gb/sec (1X SDR)", state="2: INIT")
    assert network_gbps(tmp_path) == 200


def test_of_plain_cards_the_fastest_that_is_connected_counts(tmp_path: Path) -> None:
    card(tmp_path, "lo", "", physical=False)
    card(tmp_path, "docker0", "400000", physical=False)
    card(tmp_path, "eth0", "1000")
    card(tmp_path, "eth1", "25000")
    card(tmp_path, "eth2", "100000", state="down")
    assert network_gbps(tmp_path) == 25


def test_what_linux_does_not_tell_is_unknown(tmp_path: Path) -> None:
    assert network_gbps(tmp_path / "missing") is None
    card(tmp_path, "eth0", "-1")  # a virtual machine's card
    port(tmp_path, "mlx5_0", "", layer="Unspecified")
    assert network_gbps(tmp_path) is None
    (tmp_path / "net" / "eth0" / "speed").unlink()
    (tmp_path / "net" / "eth0" / "speed").mkdir()  # cannot be read, as of a card that is not connected
    assert network_gbps(tmp_path) is None
