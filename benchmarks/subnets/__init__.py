"""A table of subnets of one trained net, and the tuners that are compared on it."""
