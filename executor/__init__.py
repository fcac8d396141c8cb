"""The executor: runs a split model on real nodes; knows nothing of env/ or agents/."""
