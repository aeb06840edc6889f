"""The parts of the CIFAR-10 benchmark: data, nets, training, methods, tables."""
