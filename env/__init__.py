"""What a controller sees and pays: scenarios, state, cost, simulator, Gymnasium environment.

Importing this package registers "Offloading-v0" with Gymnasium; it does not import torch.
"""

from gymnasium.envs.registration import register, registry

__all__: list[str] = []

if "Offloading-v0" not in registry:
    register(id="Offloading-v0", entry_point="env.offloading:OffloadingEnv")
