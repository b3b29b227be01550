"""Seconds of a collective on H100 nodes, from the speeds of links: nothing here was timed.

    seconds = call + hops * seconds of a hop + bytes on the wire / speed of the slowest link

A ring passes every rank once to gather or to scatter, twice to reduce on all; of its hops one a node crosses the
network.  A tree, which all_reduce may take instead, climbs and descends the logarithm of the number of nodes.  NCCL
chooses the faster of both by this sum; rings of a node cross the network through all of its adapters.
"""

import math
from dataclasses import dataclass

from fastgrpo.distributed.traffic import wire_bytes


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of GPUs and what joins them; each field may be replaced by what nccl-tests report of one's own cluster."""

    gpus_per_node: int = 8
    # NVIDIA's data sheet of the H100 SXM: NVLink 900 GB/s, which is both directions of 18 links together
    node_bytes_per_second: float = 450e9
    # NVIDIA's data sheet of ConnectX-7: InfiniBand NDR, 400 Gb/s; a DGX H100 has one adapter a GPU
    network_bytes_per_second: float = 50e9
    # assumed: what large messages reach of the above
    reached_share: float = 0.8
    # the constants by which NCCL 2.27 itself chooses algorithms (its tuning model, "simple" protocol)
    call_seconds: float = 8.4e-6
    ring_hop_seconds: float = 3.4e-6
    tree_hop_seconds: float = 4.0e-6
    network_hop_seconds: float = 14e-6
    tree_share: float = 0.92

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} of a cluster must be positive, got {value}; see the fields of Cluster")

    def seconds(self, kind: str, payload_bytes: int, num_ranks: int, per_node: int | None = None) -> float:
        """Of one collective of ``num_ranks``, ``per_node`` of them in each node; all of a node's where not given."""
        per_node = min(num_ranks, self.gpus_per_node if per_node is None else per_node)
        if num_ranks == 1:
            return 0.0
        num_nodes = -(-num_ranks // per_node)
        speed = self._bytes_per_second(num_nodes, per_node)
        turns = 2 if kind == "all_reduce" else 1
        hops = (num_ranks - num_nodes) * self.ring_hop_seconds + (num_nodes - 1) * self.network_hop_seconds
        ring = self.call_seconds + turns * hops + wire_bytes(kind, payload_bytes, num_ranks) / speed
        if kind != "all_reduce":
            return ring
        climb = (per_node - 1) * self.tree_hop_seconds + math.log2(num_nodes) * self.network_hop_seconds
        return min(ring, self.call_seconds + 2 * climb + 2 * payload_bytes / (self.tree_share * speed))

    def _bytes_per_second(self, num_nodes: int, per_node: int) -> float:
        """Of one rank, when all ranks of a node speak at once."""
        if num_nodes == 1:
            return self.reached_share * self.node_bytes_per_second
        # the adapters of a node share its rings among them
        across = per_node * self.network_bytes_per_second
        within = self.node_bytes_per_second if per_node > 1 else across
        return self.reached_share * min(within, across)
