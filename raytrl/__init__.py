"""raytrl: distributed post-training (SFT, reward models, DPO, PPO) on Ray."""

__version__ = "0.1.0"
