"""The training methods behind one contract, and the CPU service that stands in for a GPU."""
