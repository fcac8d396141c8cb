"""What decides: controllers from static plans to the policy at work, its guard, the oracle."""
