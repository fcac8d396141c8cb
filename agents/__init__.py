"""Who decides: controllers, the learned policy, training, evaluation, deployment."""
