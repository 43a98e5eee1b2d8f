"""Clients on Flower's nodes: the one place that imports flwr. Only its messages are used, no strategy."""

SUPERNODE = "scalefl.engines.flower.supernode"
"""The module that runs Flower's SuperNode."""
LONGEST_PAUSE = "SCALEFL_SUPERNODE_PAUSE"
"""The variable of its environment that says for how many seconds it may pause."""
