"""Settings of every test process and of the processes it starts; in place before torch is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # busy processes with several threads each slow one another down tenfold
os.environ["HF_HUB_OFFLINE"] = "1"
