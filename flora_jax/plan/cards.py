"""The cards that plans are made for: what their datasheets say, and what of it is taken as reachable.

Peaks (memory, bandwidth, dense 16-bit products, links) are NVIDIA's datasheets for H100 SXM, H200 SXM,
A100 SXM 80 GB and L4; L2, cores, clocks and limits of a block are the architecture papers' (Hopper,
Ampere, Ada). Memory is what the driver leaves of the datasheet's, where that is known.

Shares and launch costs are assumptions until a run on the card says otherwise. Bandwidth: a large copy
on an H100 SXM was measured at 3.0 of its 3.35 TB/s; the same share stands for every card. Products:
600 to 700 TFLOP/s of an H100's 989, and 0.66 stands for every card. A small kernel inside a CUDA graph
takes 2 µs, launching a graph 4 µs. An H200 was measured since, once: a copy has 0.89 to 0.94 of the
datasheet's bandwidth, a large product 0.71 to 0.80 of the peak, one of 32 rows reads its weight at 0.56
to 0.73 of the bandwidth; a decode step takes 1.1 (15B) to 1.37 times (1B) what these say. Knows nothing
of models.
"""

from __future__ import annotations

import dataclasses

from flora_jax.errors import InputError

BANDWIDTH_SHARE = 0.895
PRODUCT_SHARE = 0.66
LAUNCH_US = 2.0
GRAPH_LAUNCH_US = 4.0
# Tensor cores of a streaming multiprocessor.
MATRIX_UNITS = 4
# An all-reduce of a few kilobytes over NVLink: its messages' way, not their bytes.
ALL_REDUCE_US = 12.0


@dataclasses.dataclass(frozen=True)
class Card:
    """One GPU.

    Args:
        name: as ``--gpu`` has it.
        title: as the driver names it.
        memory_bytes: of the device.
        peak_bandwidth: bytes a second, datasheet.
        peak_half: 16-bit operations a second, dense, accumulated in float32, datasheet.
        peak_link: bytes a second to other cards, one way, datasheet.
        l2_bytes: second-level cache.
        capability: compute capability, major and minor.
        cores: streaming multiprocessors.
        clock_ghz: their boost clock.
        matrix_clock_ghz: the clock that ``peak_half`` is for.
        matrix_ops: multiplications with addition of one tensor core in one of its clocks, 16 bits.
        fpus_per_core: float32 lanes of one.
        threads_per_core: resident at most.
        shared_per_core: bytes of shared memory.
        shared_per_block: of one block at most.
        bandwidth_share: of ``peak_bandwidth`` that is taken as reachable.
        product_share: of ``peak_half`` likewise.
        launch_us: a small kernel inside a CUDA graph, in microseconds.
        graph_launch_us: launching a graph.
    """

    name: str
    title: str
    memory_bytes: int
    peak_bandwidth: float
    peak_half: float
    peak_link: float
    l2_bytes: int
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    matrix_clock_ghz: float
    matrix_ops: int
    fpus_per_core: int
    threads_per_core: int
    shared_per_core: int
    shared_per_block: int
    bandwidth_share: float = BANDWIDTH_SHARE
    product_share: float = PRODUCT_SHARE
    launch_us: float = LAUNCH_US
    graph_launch_us: float = GRAPH_LAUNCH_US

    @property
    def bandwidth(self) -> float:
        """Bytes a second that are taken as reachable."""
        return self.peak_bandwidth * self.bandwidth_share

    @property
    def products(self) -> float:
        """16-bit operations a second that are taken as reachable."""
        return self.peak_half * self.product_share


_H100 = Card(
    name="h100",
    title="NVIDIA H100 80GB HBM3",
    memory_bytes=84_942_979_072,
    peak_bandwidth=3.35232e12,
    peak_half=989.4e12,
    peak_link=450e9,
    l2_bytes=50 << 20,
    capability=(9, 0),
    cores=132,
    clock_ghz=1.98,
    matrix_clock_ghz=1.83,
    matrix_ops=512,
    fpus_per_core=128,
    threads_per_core=2048,
    shared_per_core=233_472,
    shared_per_block=232_448,
)
CARDS = {
    card.name: card
    for card in (
        _H100,
        # An H100 with other memory.
        dataclasses.replace(
            _H100,
            name="h200",
            title="NVIDIA H200",
            memory_bytes=150_100_000_000,
            peak_bandwidth=4.8e12,
        ),
        Card(
            name="a100",
            title="NVIDIA A100-SXM4-80GB",
            memory_bytes=84_900_000_000,
            peak_bandwidth=2.039e12,
            peak_half=312e12,
            peak_link=300e9,
            l2_bytes=40 << 20,
            capability=(8, 0),
            cores=108,
            clock_ghz=1.41,
            matrix_clock_ghz=1.41,
            matrix_ops=256,
            fpus_per_core=64,
            threads_per_core=2048,
            shared_per_core=167_936,
            shared_per_block=166_912,
        ),
        Card(
            name="l4",
            title="NVIDIA L4",
            memory_bytes=23_600_000_000,
            peak_bandwidth=300e9,
            peak_half=121e12,
            peak_link=32e9,  # PCIe 4.0 x16: it has no NVLink.
            l2_bytes=48 << 20,
            capability=(8, 9),
            cores=58,
            clock_ghz=2.04,
            matrix_clock_ghz=2.04,
            matrix_ops=128,
            fpus_per_core=128,
            threads_per_core=1536,
            shared_per_core=102_400,
            shared_per_block=101_376,
        ),
    )
}


def card(name: str) -> Card:
    """A card by its name.

    Raises:
        InputError: no card of the table has it.
    """
    found = CARDS.get(name)
    if found is None:
        raise InputError(f"--gpu is {name!r}, expected one of {', '.join(CARDS)}")
    return found
