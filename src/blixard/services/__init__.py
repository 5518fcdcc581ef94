"""Use cases. Time, randomness and the store are arguments, so that tests and simulations can set them."""
