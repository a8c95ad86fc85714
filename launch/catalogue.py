"""The catalogue of devices: peaks, memory and links as their vendors publish them.

Peaks are dense (half of the figures "with sparsity"), in TFLOP/s with fp32 accumulation. A link is one direction of one
device in GB/s (half of NVLink's "total bandwidth"). Memory is what a process sees (torch.cuda.mem_get_info), which is
less than the name says. The network is that of the vendor's reference system, per device in Gbit/s, and for cards
without one a guess of 10: say --network_gbit where it matters.
"""

import re

from megaswift.errors import LaunchError, nearest
from megaswift.planner.machine import GIGA, Device

TERA = 1e12
PCIE4, PCIE5 = 32.0, 64.0  # GB/s in one direction of x16, by the specification


def _device(
    name: str,
    generation: str,
    *,
    memory: float,
    bandwidth: float,
    peaks: dict[str, float],
    link: float,
    network: float,
    source: str,
    kind: str = "nvlink",
    per_node: int = 8,
) -> Device:
    """Return one entry: memory in GiB, bandwidth and link in GB/s, peaks in TFLOP/s, network in Gbit/s."""
    return Device(
        name=name,
        generation=generation,
        memory_gib=memory,
        memory_bytes_s=bandwidth * GIGA,
        peak_flops={precision: value * TERA for precision, value in peaks.items()},
        link_bytes_s=link * GIGA,
        link=kind,
        network_bytes_s=network / 8 * GIGA,
        per_node=per_node,
        source=source,
    )


def _card(
    name: str, generation: str, *, memory: float, bandwidth: float, peaks: dict[str, float], source: str
) -> Device:
    """Return a card on PCIe 4 without NVLink."""
    return _device(
        name,
        generation,
        memory=memory,
        bandwidth=bandwidth,
        peaks=peaks,
        link=PCIE4,
        network=10,
        source=source,
        kind="pcie",
    )


_A100 = {"fp32": 156.0, "fp16": 312.0, "bf16": 312.0}  # fp32 is TF32
_H100 = {"fp32": 494.7, "fp16": 989.4, "bf16": 989.4, "fp8": 1978.9}
_H100_PCIE = {"fp32": 378.0, "fp16": 756.0, "bf16": 756.0, "fp8": 1513.0}
_B200 = {"fp32": 1100.0, "fp16": 2250.0, "bf16": 2250.0, "fp8": 4500.0, "mxfp8": 4500.0, "nvfp4": 9000.0}
_B300 = {**_B200, "nvfp4": 13500.0}
_GB200 = {"fp32": 1250.0, "fp16": 2500.0, "bf16": 2500.0, "fp8": 5000.0, "mxfp8": 5000.0, "nvfp4": 10000.0}
_GB300 = {**_GB200, "nvfp4": 15000.0}

# fmt: off
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device("V100-32G", "volta", memory=31.7, bandwidth=900, peaks={"fp32": 15.7, "fp16": 125.0}, link=150,
                network=100, source="NVIDIA V100 datasheet (SXM2); DGX-2: 8 x 100 Gbit/s for 16"),
        _device("A100-40G", "ampere", memory=39.4, bandwidth=1555, peaks=_A100, link=300, network=200,
                source="NVIDIA A100 datasheet (SXM4); DGX A100: 8 x 200 Gbit/s"),
        _device("A100-80G", "ampere", memory=79.15, bandwidth=2039, peaks=_A100, link=300, network=200,
                source="NVIDIA A100 datasheet (SXM4); DGX A100: 8 x 200 Gbit/s"),
        _device("A100-PCIe-80G", "ampere", memory=79.15, bandwidth=1935, peaks=_A100, link=PCIE4, network=25,
                kind="pcie", source="NVIDIA A100 datasheet (PCIe)"),
        _device("A800-80G", "ampere", memory=79.15, bandwidth=2039, peaks=_A100, link=200, network=200,
                source="NVIDIA A800 datasheet (SXM4, NVLink 400 GB/s)"),
        _device("H100-80G", "hopper", memory=79.1, bandwidth=3350, peaks=_H100, link=450, network=400,
                source="NVIDIA H100 datasheet (SXM5); DGX H100: 8 x 400 Gbit/s"),
        _device("H100-96G", "hopper", memory=95.0, bandwidth=2400, peaks=_H100, link=450, network=400,
                source="torchtitan benchmarks: 96 GB HBM2e, 2.4 TB/s, 500 W"),
        _device("H100-PCIe-80G", "hopper", memory=79.1, bandwidth=2000, peaks=_H100_PCIE, link=PCIE5, network=50,
                kind="pcie", source="NVIDIA H100 datasheet (PCIe)"),
        _device("H800-80G", "hopper", memory=79.1, bandwidth=3350, peaks=_H100, link=200, network=400,
                source="NVIDIA H800 (SXM5, NVLink 400 GB/s); DeepSeek-V3 report, section 3.1"),
        _device("H20-96G", "hopper", memory=95.1, bandwidth=4000, link=450, network=400,
                peaks={"fp32": 74.0, "fp16": 148.0, "bf16": 148.0, "fp8": 296.0}, source="NVIDIA H20 datasheet"),
        _device("H200-141G", "hopper", memory=139.8, bandwidth=4800, peaks=_H100, link=450, network=400,
                source="NVIDIA H200 datasheet (SXM5); DGX H200: 8 x 400 Gbit/s"),
        _device("GH200-96G", "hopper", memory=94.5, bandwidth=4000, peaks=_H100, link=450, network=200, per_node=4,
                source="NVIDIA GH200 datasheet; quad nodes of Alps: 4 x 200 Gbit/s"),
        _device("B200", "blackwell", memory=178.4, bandwidth=8000, peaks=_B200, link=900, network=400,
                source="NVIDIA HGX B200; DGX B200: 8 x 400 Gbit/s"),
        _device("B300", "blackwell", memory=268.0, bandwidth=8000, peaks=_B300, link=900, network=800,
                source="NVIDIA HGX B300; DGX B300: 8 x 800 Gbit/s"),
        _device("GB200", "blackwell", memory=184.0, bandwidth=8000, peaks=_GB200, link=900, network=400, per_node=72,
                source="NVIDIA GB200 NVL72: 360 PFLOP/s bf16 and 720 fp8 with sparsity over 72, halved"),
        _device("GB300", "blackwell", memory=276.0, bandwidth=8000, peaks=_GB300, link=900, network=800, per_node=72,
                source="NVIDIA GB300 NVL72: as GB200; 1080 PFLOP/s dense fp4 over 72"),
        _card("T4-16G", "turing", memory=14.6, bandwidth=320, peaks={"fp32": 8.1, "fp16": 65.0},
              source="NVIDIA T4 datasheet"),
        _card("A10-24G", "ampere", memory=22.0, bandwidth=600, peaks={"fp32": 62.5, "fp16": 125.0, "bf16": 125.0},
              source="NVIDIA A10 datasheet"),
        _card("A40-48G", "ampere", memory=44.4, bandwidth=696, peaks={"fp32": 74.8, "fp16": 149.7, "bf16": 149.7},
              source="NVIDIA A40 datasheet"),
        _card("A6000-48G", "ampere", memory=47.4, bandwidth=768, peaks={"fp32": 77.4, "fp16": 154.8, "bf16": 154.8},
              source="NVIDIA RTX A6000 datasheet"),
        _card("RTX3090-24G", "ampere", memory=23.7, bandwidth=936, peaks={"fp32": 35.6, "fp16": 71.0, "bf16": 71.0},
              source="NVIDIA GA102 whitepaper, table 2"),
        _card("L4-24G", "ada", memory=22.0, bandwidth=300, source="NVIDIA L4 datasheet",
              peaks={"fp32": 60.0, "fp16": 121.0, "bf16": 121.0, "fp8": 242.5}),
        _card("L40S-48G", "ada", memory=44.4, bandwidth=864, source="NVIDIA L40S datasheet",
              peaks={"fp32": 183.0, "fp16": 362.0, "bf16": 362.0, "fp8": 733.0}),
        _card("RTX4090-24G", "ada", memory=23.5, bandwidth=1008, source="NVIDIA Ada whitepaper, table 2",
              peaks={"fp32": 82.6, "fp16": 165.2, "bf16": 165.2, "fp8": 330.3}),
        _card("RTX5090-32G", "blackwell", memory=31.3, bandwidth=1792, source="NVIDIA RTX Blackwell whitepaper, table 3",
              peaks={"fp32": 104.8, "fp16": 209.5, "bf16": 209.5, "fp8": 419.0, "mxfp8": 419.0, "nvfp4": 1676.0}),
    )
}
# fmt: on


def find_device(name: str, *, memory_gib: float | None = None) -> Device:
    """Return the device that a name means: of the catalogue, in part, or as the driver writes it; raises LaunchError.

    "H100" is H100-80G, "NVIDIA A100-SXM4-40GB" is A100-40G. `memory_gib` chooses between sizes of one model.
    """
    words = _words(name)
    fitting = [device for device in DEVICES.values() if _means(words, device)]
    if not fitting:
        names = ", ".join(DEVICES)
        raise LaunchError(f"gpu={name} is not in the catalogue.{nearest(name, DEVICES)} Known: {names}.")
    sizes = [int(found) for found in re.findall(r"(\d+)\s*(?:gb|g|gib)\b", name.lower())]
    wanted = memory_gib or (sizes[0] if sizes else None)
    exact = [device for device in fitting if device.name.lower() == name.lower()]
    if exact:
        return exact[0]
    if wanted is None:
        preferred = [device for device in fitting if device.name in ("A100-80G", "H100-80G")]
        return (preferred or fitting)[0]
    return min(fitting, key=lambda device: abs(device.memory_gib - wanted))


def _words(name: str) -> set[str]:
    """Return the words of a name: "NVIDIA H100 80GB HBM3" -> {h100}, without vendor, memory and form factor."""
    text = re.sub(r"(geforce|nvidia|tesla|hbm\d\w?|sxm\d?|\bnvl\d*\b|\d+\s*(gb|g|gib)\b)", " ", name.lower())
    text = re.sub(r"\brtx\s*(?=\d{4})", "rtx", text).replace("rtx a6000", "a6000")
    return set(re.findall(r"[a-z0-9]+", text))


def _means(words: set[str], device: Device) -> bool:
    """Say whether every word of the device's name is among `words`, PCIe on both sides or on none."""
    own = _words(device.name)
    cards = device.link == "pcie"
    return own <= words and (("pcie" in words) == ("pcie" in own) or (cards and "pcie" not in own))
