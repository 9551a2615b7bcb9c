"""Published figures of the devices memopt plans for, so that a plan needs no device.

Rates are dense (no sparsity), with fp32 accumulation, of the boards named; links are one direction of the bus. They
are upper limits: the cost model's efficiency, or a calibration on the device, says what is reached. Capacities are
what torch calls "total capacity", which is below the number on the box; drivers differ by some hundred MiB, so the
least seen in the public reports named in `source` is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

MIB, GIB = 1024**2, 1024**3

# PCI Express, one direction of x16 after line coding (128b/130b): 8, 16, 32 GT/s a lane (PCI-SIG base specifications).
PCIE3, PCIE4, PCIE5 = (16 * rate * 1e9 / 8 * 128 / 130 for rate in (8, 16, 32))

CUDA_LAUNCH = 4e-6  # seconds; assumed for every card until calibrated: no datasheet prints it
CUDA_BLOCK = 512  # kMinBlockSize, c10/core/AllocatorConfig.h

# dtype -> the field that holds its rate, widest first: the widest a step touches decides.
RATES = (
    ("float64", "fp32"),
    ("complex128", "fp32"),
    ("complex64", "fp32"),
    ("float32", "fp32"),
    ("bfloat16", "bf16"),
    ("float16", "fp16"),
    ("float8_e4m3fn", "fp8"),
    ("float8_e5m2", "fp8"),
)


@dataclass(frozen=True)
class Device:
    """memory: bytes torch can use. memory_bandwidth, host_to_device, device_to_host: bytes a second.

    fp32, tf32, bf16, fp16, fp8: floating-point operations a second; 0 where the device has no units for it.
    launch_seconds: least seconds any kernel takes. allocator_block: bytes an allocation is rounded up to.
    compute_capability: (major, minor) on CUDA. source: where each figure comes from. efficiency: share of the published
    rates that a good kernel reaches; 1.0 once the rates were measured (memopt/runtime/calibrate.py). codecs: codec ->
    elements a second it packs, and unpacks, where that was measured.
    """

    name: str
    memory: int
    memory_bandwidth: float
    fp32: float
    tf32: float
    bf16: float
    fp16: float
    fp8: float
    host_to_device: float
    device_to_host: float
    launch_seconds: float
    allocator_block: int
    kind: Literal["cuda", "cpu"]
    compute_capability: tuple[int, int] | None
    source: str
    efficiency: float = 0.7
    codecs: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)

    def flops(self, dtypes: Collection[str]) -> float:
        """Operations a second on these dtypes: the rate of the widest, fp32 if none is floating or it has no units.

        float32 runs at fp32, not tf32, as torch does unless told otherwise; float64 is taken for float32.
        """
        field = next((rate for dtype, rate in RATES if dtype in dtypes), "fp32")
        return float(getattr(self, field)) or self.fp32


def _cuda(
    name: str,
    memory: int,
    bandwidth: float,
    rates: tuple[float, float, float, float, float],
    link: float,
    capability: tuple[int, int],
    source: str,
) -> Device:
    """rates: fp32, tf32, bf16, fp16, fp8 in Tflop/s; bandwidth in GB/s; link in bytes a second."""
    fp32, tf32, bf16, fp16, fp8 = (rate * 1e12 for rate in rates)
    return Device(
        name, memory, bandwidth * 1e9, fp32, tf32, bf16, fp16, fp8, link, link, CUDA_LAUNCH, CUDA_BLOCK, "cuda",
        capability, source,
    )  # fmt: skip


HOPPER = (67.0, 494.7, 989.4, 989.4, 1978.9)  # the datasheets print twice the tensor rates: with sparsity
_GPUS = (
    _cuda("h200", 139 * GIB, 4800, HOPPER, PCIE5, (9, 0),
          "NVIDIA H200 Tensor Core GPU datasheet (SXM): 141 GB, 4.8 TB/s, PCIe Gen5; rates halved from sparse. "
          "https://www.nvidia.com/en-us/data-center/h200/ Memory: 139 GiB, stated of the H200 the GPU suite runs on"),
    _cuda("h100", int(79.11 * GIB), 3350, HOPPER, PCIE5, (9, 0),
          "NVIDIA H100 Tensor Core GPU datasheet (SXM): 80 GB, 3.35 TB/s, PCIe Gen5; rates halved from sparse. "
          "https://www.nvidia.com/en-us/data-center/h100/ Memory: Lightning-AI/lightning-thunder#474"),
    _cuda("a100-80gb", int(79.15 * GIB), 2039, (19.5, 156, 312, 312, 0), PCIE4, (8, 0),
          "NVIDIA A100 Tensor Core GPU datasheet (SXM 80 GB): 2,039 GB/s, PCIe Gen4. "
          "https://www.nvidia.com/en-us/data-center/a100/ Memory: huggingface/accelerate#1864"),
    _cuda("a100-40gb", int(39.50 * GIB), 1555, (19.5, 156, 312, 312, 0), PCIE4, (8, 0),
          "NVIDIA A100 Tensor Core GPU datasheet (SXM 40 GB): 1,555 GB/s, PCIe Gen4. "
          "https://www.nvidia.com/en-us/data-center/a100/ Memory: TianheWu/CoSeR#10"),
    _cuda("l40s", int(44.42 * GIB), 864, (91.6, 183, 362, 362, 733), PCIE4, (8, 9),
          "NVIDIA L40S datasheet: 48 GB, 864 GB/s, PCIe Gen4; dense tensor rates. "
          "https://www.nvidia.com/en-us/data-center/l40s/ Memory: stepfun-ai/Step-Video-T2V#8"),
    _cuda("l4", 22 * GIB, 300, (30.3, 60, 121, 121, 242), PCIE4, (8, 9),
          "NVIDIA L4 Tensor Core GPU datasheet: 24 GB, 300 GB/s, PCIe Gen4; tensor rates halved from sparse. "
          "https://www.nvidia.com/en-us/data-center/l4/ Memory: 22 GiB assumed, as ECC takes part of the 24 GB"),
    _cuda("rtx4090", int(23.52 * GIB), 1008, (82.6, 82.6, 165.2, 165.2, 330.3), PCIE4, (8, 9),
          "NVIDIA Ada GPU Architecture whitepaper, appendix A (GeForce RTX 4090): 24 GB, 1,008 GB/s, PCIe Gen4. "
          "Memory: Soul-AILab/SoulX-FlashTalk#5"),
    _cuda("rtx3090", int(23.69 * GIB), 936, (35.6, 35.6, 71, 71, 0), PCIE4, (8, 6),
          "NVIDIA Ampere GA102 GPU Architecture whitepaper (GeForce RTX 3090): 24 GB, 936 GB/s, PCIe Gen4. "
          "Memory: GaoLii/DSP#10 (23.70 GiB, rounded down)"),
    _cuda("t4", int(14.56 * GIB), 320, (8.1, 0, 0, 65, 0), PCIE3, (7, 5),
          "NVIDIA T4 Tensor Core GPU datasheet: 16 GB, 320 GB/s, PCIe Gen3. "
          "https://www.nvidia.com/en-us/data-center/tesla-t4/ Memory: Zheng-Chong/CatVTON#133"),
)  # fmt: skip

# Assumed until calibrated (`memopt doctor --calibrate`): one laptop core with AVX2 at 2 GHz, 2 x 8 fused
# multiply-adds a cycle, and a single DDR4-3200 channel. memory 0: asked of the machine at lookup, see `device`.
_CPU = Device(
    name="cpu", memory=0, memory_bandwidth=20e9, fp32=64e9, tf32=0.0, bf16=0.0, fp16=0.0, fp8=0.0,
    host_to_device=10e9, device_to_host=10e9, launch_seconds=5e-6, allocator_block=1, kind="cpu",
    compute_capability=None,
    source="Memory: what psutil reports of this machine. Rates: assumed, one AVX2 core at 2 GHz and one DDR4 channel, "
    "until `memopt doctor --calibrate` measures them",
)  # fmt: skip

# The cpu's memory stands at 0 here, because reading the catalogue must not look at the machine; `device` fills it in.
CATALOGUE: Mapping[str, Device] = {entry.name: entry for entry in (*_GPUS, _CPU)}


def device(name: str) -> Device:
    """The catalogue's device of this name; "cpu" with this machine's memory. ValueError naming the known ones."""
    found = CATALOGUE.get(name.strip().lower()) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"device {name!r} is not known; known are {', '.join(CATALOGUE)}")
    return _with_memory(found) if found.kind == "cpu" else found


def _with_memory(cpu: Device) -> Device:
    """The cpu with its physical memory, or the container's limit where that is lower. Bytes."""
    import psutil  # here, because reading the catalogue needs only the standard library

    return replace(cpu, memory=min(int(psutil.virtual_memory().total), _container_limit()))


def _container_limit() -> int:
    """Bytes a cgroup allows this process (version 2, then 1); no limit reads as a number larger than any memory."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as limit:
                text = limit.read().strip()
        except OSError:
            continue
        if text.isdecimal():
            return int(text)
    return 1 << 62
