"""A server and its nodes on real machines, by Flower's own programs."""
