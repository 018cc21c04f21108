"""Cards, and how long a kernel should take on one: a model to be proved wrong by a measurement.

A processor (SM) is a closed queueing network. Its customers are the blocks that it holds (or warps, where those do not
wait for each other), each of which comes round with an item: a row, a pass, a stretch. An item is served by the memory
(its bytes at the processor's share of copy speed) and by the schedulers (its instructions), and waits: for memory's
latency wherever nothing hides it, for barriers, and for the latency of its own instructions. Exact mean value analysis
gives items per second for each number of customers; a last round that fills the card in part is counted with as many
customers as it has. ``RAMP`` (launch, first bytes, last block) is added to a kernel and to what it is compared with.

The constants (``CARDS`` and the capitals) were set once, before any kernel was changed on their account, so that they
gave what an audit had predicted for the kernels of that day (tests/test_predict.py keeps both). A measurement may
change them, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Card:
    """``copy``: bytes read and written a second, by a copy. ``shared``: bytes of a processor, and that a block may
    have. ``doubles``: lanes of a processor's float64 units."""

    name: str
    arch: int
    processors: int
    gigahertz: float
    copy: float
    shared: int
    block_shared: int
    doubles: int

    @property
    def cycle(self) -> float:
        return 1e-9 / self.gigahertz


CARDS = {
    "A100": Card("A100", 80, 108, 1.41, 1.70e12, 164 << 10, 163 << 10, 32),
    "H100": Card("H100", 90, 132, 1.73, 3.00e12, 228 << 10, 227 << 10, 64),
    "H200": Card("H200", 90, 132, 1.73, 4.20e12, 228 << 10, 227 << 10, 64),
}
RAMP = 2.5e-6  # seconds of a launch that copying does not pay either
LATENCY = 0.45e-6  # of memory
CACHED = 0.18e-6  # of L2
BARRIER = 0.06e-6
STALL = 6.0  # cycles an instruction of a warp that has its scheduler for itself
ISSUE = 0.86  # instructions a cycle that a scheduler issues at best
LINE = 1.23  # cycles of the load unit for each line that a load touches
STORED = 0.33  # of what a store takes, that its block waits for
MOST = 0.965  # of copy speed
DENSE = 0.95  # of copy speed, at which a dense product of few rows of x reads its weight
REPEATED = 250  # instructions of a row kernel's warp for the elements of its bracket, beyond those in the table


@dataclass(frozen=True)
class Work:
    """What a kernel does on one shape.

    Attributes:
        customers: of a block: itself, or its warps.
        items: of a customer; ``load`` and ``store`` are bytes of one, ``slots`` the instructions of all of its warps.
        serial: instructions of one warp for an item.
        waits: seconds in which an item has neither memory nor schedulers.
        cache: cycles of the load unit for an item.
        in_flight: bytes that a customer has on their way at most.
        ahead: items that it has on their way beside the one that it works on.
        after: seconds of what is launched behind.
        dense_bytes: of the weight that a dense product would read; 0: it is compared with a copy of the same bytes.
    """

    kernel: str
    size: tuple[int, int]
    dtype: str
    registers: int
    threads: int
    grid: int
    items: float
    load: float
    slots: float
    serial: float
    waits: float
    in_flight: float
    store: float = 0.0
    shared: int = 0
    cache: float = 0.0
    customers: int = 1
    ahead: float = 0.0
    after: float = 0.0
    dense_bytes: int = 0

    @property
    def shape(self) -> str:
        return f"{self.size[0]} x {self.size[1]}"


@dataclass(frozen=True)
class Prediction:
    work: Work
    card: str
    blocks: int  # that a processor can hold
    in_flight: float  # bytes, of those that it does hold
    slots: float  # an element
    seconds: float
    share: float  # of copy speed, or times dense


def resident(registers: int, threads: int, shared: int, card: Card) -> int:
    """Blocks that a processor can hold."""
    warps = -(-threads // WARP)
    by_registers = 65536 // (-(-registers // 8) * 8 * WARP * warps)
    by_memory = card.shared // (-(-(shared + 1024) // 128) * 128)
    return max(1, min(by_registers, by_memory, 64 // warps, 32))


def throughput(work: Work, card: Card, customers: float) -> float:
    """Items a second of a processor that holds so many customers."""
    cycle, bandwidth = card.cycle, card.copy / card.processors
    issue = work.slots * cycle / (4 * ISSUE)
    services = ((work.load + STORED * work.store) / bandwidth, issue, work.cache * cycle)
    delay = work.waits + max(0.0, work.serial * STALL * cycle - issue)
    queues, found, number = [0.0] * len(services), 0.0, 0
    while number < customers:
        number += 1
        times = [service * (1 + queue) for service, queue in zip(services, queues, strict=True)]
        rate = number / (delay + sum(times))
        found += (rate - found) * min(1.0, customers - (number - 1))  # the last may be there for a part of the time
        queues = [rate * time for time in times]
    return min(found, MOST * bandwidth / (work.load + work.store))


def predict(work: Work, card: Card) -> Prediction:
    blocks = resident(work.registers, work.threads, work.shared, card)
    rounds, rest = divmod(work.grid / card.processors, blocks)
    seconds = RAMP + work.after
    for held, turns in ((blocks, rounds), (rest, 1)):
        customers = held * work.customers
        if customers and turns:
            seconds += turns * customers * work.items / throughput(work, card, customers * (1 + work.ahead))
    items = work.items * work.customers * work.grid
    moved = (work.load + work.store) * items
    yardstick = RAMP + (work.dense_bytes / (DENSE * card.copy) if work.dense_bytes else moved / card.copy)
    return Prediction(
        work, card.name, blocks, (blocks if rounds else rest) * work.customers * work.in_flight,
        work.slots * items * WARP / (work.size[0] * work.size[1]), seconds, yardstick / seconds,
    )  # fmt: skip
