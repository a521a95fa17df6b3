"""One torch thread: two would wait for each other on a busy machine, a hundred times as long."""

import torch

torch.set_num_threads(1)
