"""How the policy learns: in hindsight, by PPO, while it is deployed."""
