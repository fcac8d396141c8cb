"""What a controller sees and pays: scenarios, state, cost, simulator, Gymnasium environment."""
