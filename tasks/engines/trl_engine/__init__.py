"""Training with TRL's GRPOTrainer, in a process of its own."""
