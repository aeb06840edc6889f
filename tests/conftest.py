"""Two cores are all there is: one thread a test, so that nothing waits for itself."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
