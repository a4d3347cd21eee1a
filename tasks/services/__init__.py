"""The services of one machine: which there are, how they are started, found again and stopped."""
