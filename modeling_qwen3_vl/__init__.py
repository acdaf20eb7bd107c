"""How the network computes: the plain model with its four ports."""
