"""Small models of every common kind, and the tests that run each method on each of them."""
