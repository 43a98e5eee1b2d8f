"""Clients on Flower's nodes: the one place that imports flwr. Only its messages are used, no strategy."""
