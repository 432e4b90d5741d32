"""One thread before anything else: a fork after a multi-threaded autograd run hangs, and gloo ranks share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
